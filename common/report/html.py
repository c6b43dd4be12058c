"""report.html, made from results.json alone: one file that needs no network and nothing beside it.

Everything that came from data is text: the template escapes it, and what the script needs is JSON
in which <, > and & are escaped, from which it builds text nodes. The page's security policy lets
only the two scripts run that are written here, known by their hashes, and nothing be fetched.
"""

import base64
import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.report import content, figures, tables
from common.report.schema import Results

HERE = Path(__file__).parent
# Of these sections the first that is there gives the page its title.
HEADLINES = ("accuracy", "comparisons", "speed")


def write(folder: Path, results: Results, found: content.Figures) -> Path:
    """Write report.html into the folder, with the figures `found`; returns its path."""
    charts = {figure.name: figure.spec() for every in found.values() for figure in every}
    if results.explorer:
        charts["running"] = figures.running().spec()
    explorer = msgspec.to_builtins(results.explorer) if results.explorer else None
    scripts = [_vega(), (HERE / "page.js").read_text(encoding="utf-8")]
    page = _environment().get_template("page.html")
    path = folder / "report.html"
    path.write_text(
        page.render(
            headline=next((found[name][0].title for name in HEADLINES if name in found), "Parity"),
            introduction=content.introduction(results),
            sections=content.sections(results, found),
            environment=results.environment,
            data={"charts": charts, "explorer": _rounded(explorer)},
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            scripts=[Markup(script) for script in scripts],
            hashes=[_hash(script) for script in scripts],
        ),
        encoding="utf-8",
    )
    return path


@cache  # it takes a second
def _vega() -> str:
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
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"stripped": tables.stripped}
    environment.tests |= {"standing_out": tables.stands_out}
    return environment


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _rounded(value: Any) -> Any:
    """With numbers to four significant digits, which is more than the page shows, and no NaN."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value
