"""report.html, made from results.json and what its caller adds to the sections, as the twins' code:
one file that needs no network and nothing beside it.

Everything that came from data is text: the template escapes it, and what the script needs is JSON
in which <, > and & are escaped, from which it builds text nodes. The page's security policy lets
only the two scripts run that are written here, known by their hashes, and nothing be fetched.
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
# Of these figures the first that is there gives the page its title.
HEADLINES = ("accuracy", "comparisons", "speed", "tuning")


def write(folder: Path, results: Results, sections: content.Sections) -> Path:
    """Write report.html into the folder; returns its path."""
    titles = {figure.name: figure.title for figure in content.shown(sections)}
    charts = {figure.name: figure.spec() for figure in content.shown(sections)}
    explorer = None
    if results.explorer:
        charts["running"] = figures.running().spec()
        # To four significant digits, which is more than the page shows.
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
    """What stands in these files."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@cache  # it takes a second
def vega() -> str:
    """Vega-Lite and all that it needs."""
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
    # JSON has no infinity and no NaN: msgspec writes null.
    environment.policies["json.dumps_function"] = lambda it, **_: msgspec.json.encode(it).decode()
    environment.filters["stripped"] = tables.stripped
    environment.tests["standing_out"] = tables.stands_out
    return environment
