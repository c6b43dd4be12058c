"""The files of the page."""


def assets() -> dict[str, tuple[bytes, str]]:
    """By their paths: content and media type."""
    return {"/": (b"<!doctype html><title>GRU twins</title>", "text/html; charset=utf-8")}
