"""The files of the page, which shares its explorer and its style with the report."""

from functools import cache
from pathlib import Path

import msgspec

HERE = Path(__file__).parent
PATHS = ("/", "/page.css", "/page.js", "/vega.js", "/charts.json")


@cache
def assets() -> dict[str, tuple[bytes, str]]:
    """Content and media type of each path."""
    # On first use, because it takes a second or two and 120 MiB.
    from common.report import figures, html

    charts = msgspec.json.encode({"running": figures.running().spec()})
    page = html.together(HERE / "page.html")
    style = html.together(html.HERE / "page.css", HERE / "page.css")
    script = html.together(html.HERE / "explorer.js", HERE / "page.js")
    contents = (
        (page.encode(), "text/html"),
        (style.encode(), "text/css"),
        (script.encode(), "text/javascript"),
        (html.vega().encode(), "text/javascript"),
        (charts, "application/json"),
    )
    return dict(zip(PATHS, contents, strict=True))
