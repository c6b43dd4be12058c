"""Writes report.html, a single file that needs no network, from results.json and its sections.

All data is shown as text: the template escapes it, and the scripts build text nodes from JSON in
which <, > and & are escaped. The content security policy of the page allows only its two scripts,
by their hashes, and no requests.
"""

import base64
import hashlib
import json
from functools import cache
from pathlib import Path

import msgspec
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from common.report import content, figures, tables
from common.report.schema import Results

HERE = Path(__file__).parent
# The title of the page is that of the first of these figures that exists.
HEADLINES = ("accuracy", "comparisons", "speed", "tuning")


def write(folder: Path, results: Results, sections: content.Sections) -> Path:
    """Write report.html into the folder; returns its path."""
    titles = {figure.name: figure.title for figure in content.shown(sections)}
    charts = {figure.name: figure.spec() for figure in content.shown(sections)}
    explorer = None
    if results.explorer:
        charts["running"] = figures.running().spec()
        # Four significant digits are more than the page shows.
        explorer = json.loads(
            msgspec.json.encode(results.explorer), parse_float=lambda x: float(f"{float(x):.4g}")
        )
    scripts = [vega(), together(HERE / "explorer.js", HERE / "page.js")]
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    template = _environment().get_template("page.html")
    path = folder / "report.html"
    page = template.render(
        headline=next((titles[name] for name in HEADLINES if name in titles), "Parity"),
        introduction=content.introduction(results),
        sections=sections,
        data={"charts": charts, "explorer": explorer},
        style=together(HERE / "page.css"),
        scripts=scripts,
        hashes=[base64.b64encode(digest).decode() for digest in digests],
    )
    path.write_text(page, encoding="utf-8")
    return path


def together(*paths: Path) -> str:
    """The concatenated content of these files."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@cache  # takes a second
def vega() -> str:
    """Vega-Lite with its dependencies."""
    bundle = "window.vegaEmbed = vegaEmbed;"
    return vl_convert.javascript_bundle(bundle, vl_version=figures.VEGA_LITE)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("common.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # JSON has neither infinity nor NaN; msgspec writes null.
    environment.policies["json.dumps_function"] = lambda value, **_: msgspec.json.encode(
        value
    ).decode()
    environment.filters["stripped"] = tables.stripped
    environment.tests["standing_out"] = tables.stands_out
    return environment
