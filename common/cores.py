"""The number of available cores."""


def cores() -> int:
    """The number of cores this process may use, by its affinity and the container's quota."""
    import joblib  # not at import, because encoding workers never count cores and start sooner

    return int(joblib.cpu_count())
