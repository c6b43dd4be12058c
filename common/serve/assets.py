"""The files of the page, which shares its explorer and its look with the report."""

from pathlib import Path

import msgspec

from common.report import figures, html

HERE = Path(__file__).parent


def assets() -> dict[str, tuple[bytes, str]]:
    """By their paths: content and media type."""
    together, charts = html.together, {"running": figures.running().spec()}
    return {
        "/": (together(HERE / "page.html").encode(), "text/html"),
        "/page.css": (together(html.HERE / "page.css", HERE / "page.css").encode(), "text/css"),
        "/page.js": (
            together(html.HERE / "explorer.js", HERE / "page.js").encode(),
            "text/javascript",
        ),
        "/vega.js": (html.vega().encode(), "text/javascript"),
        "/charts.json": (msgspec.json.encode(charts), "application/json"),
    }
