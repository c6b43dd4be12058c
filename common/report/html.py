"""report.html, made from results.json alone: one file that needs no network and nothing beside it.

Everything that came from data is text: the template escapes it, and what the script needs is JSON
in which <, > and & are escaped, from which it builds text nodes. The page's security policy lets
only the two scripts run that are written here, known by their hashes, and nothing be fetched.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.report import figures, markdown
from common.report.figures import Figure

HERE = Path(__file__).parent
# Of these sections the first that is there gives the page its title.
HEADLINES = ("accuracy", "comparisons", "speed")


def write(folder: Path, results: Mapping[str, Any], found: Mapping[str, Sequence[Figure]]) -> Path:
    """Write report.html into the folder, with the figures `found`; returns its path."""
    charts = {figure.name: figure.spec() for every in found.values() for figure in every}
    if "explorer" in results:
        charts["running"] = figures.running().spec()
    scripts = [_vega(), (HERE / "page.js").read_text(encoding="utf-8")]
    parity = [{**check, "strain": _strain(check)} for check in results["parity"]]
    page = _environment().get_template("page.html")
    path = folder / "report.html"
    path.write_text(
        page.render(
            results={**results, "parity": parity},
            headline=next((found[name][0].title for name in HEADLINES if name in found), "Parity"),
            figures=found,
            columns=markdown.COLUMNS,
            few_classes=figures.FEW_CLASSES,
            data={"charts": charts, "explorer": _rounded(results.get("explorer"))},
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
    filters: dict[str, Callable[..., Any]] = {
        "name": figures.name_of,
        "task": figures.task_name,
        "row": markdown.row,
        "percent": lambda share: f"{share:.2%}",
        "points": lambda share: f"{100 * share:+.2f}",
    }
    environment.filters |= filters
    return environment


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _strain(check: Mapping[str, Any]) -> float:
    """How much of its bound an error takes; a bound of 0 is that of a tensor of zeros."""
    return check["error"] / check["bound"] if check["bound"] else check["error"]


def _rounded(value: Any) -> Any:
    """With numbers to four significant digits, which is more than the page shows, and no NaN."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value
