"""The report of a results.json: its content, and errors in results.json."""

import copy
import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from markdown_it import MarkdownIt

import compare
from common.report import content, figures, html, markdown
from common.report.schema import Bin, Results, convert
from tests.training.cases import Command, refused

SECTIONS = ("runs", "parity", "speed", "questions", "explorer", "tuning")


@pytest.fixture
def changed(results: dict[str, Any]) -> dict[str, Any]:
    """Small results that a test may change."""
    few = {**results, "explorer": {**results["explorer"]}, "runs": results["runs"][:2]}
    few["explorer"]["reviews"] = results["explorer"]["reviews"][:3]
    return copy.deepcopy(few)


def only(results: dict[str, Any], *sections: str) -> dict[str, Any]:
    """The results with only these sections, because drawing takes long."""
    others = {*SECTIONS} - {*sections}
    return {name: value for name, value in results.items() if name not in others}


def read(results: dict[str, Any]) -> Results:
    return convert(results, Results, Path("results.json"))


def page_of(results: dict[str, Any], folder: Path) -> str:
    result = read(results)
    return html.write(folder, result, content.sections(result)).read_text()


def titles(results: dict[str, Any]) -> dict[str, list[str]]:
    """The titles of all figures, by the first word of their names."""
    result: dict[str, list[str]] = {}
    for figure in content.shown(content.sections(read(results))):
        result.setdefault(figure.name.partition("-")[0], []).append(figure.title)
    return result


def test_report_needs_only_results_json(
    changed: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(changed))
    status, output, error = command(compare.main, "report", tmp_path)
    assert (status, output, error) == (0, f"{tmp_path / 'report.html'}\n", "")
    page = (tmp_path / "report.html").read_text()
    assert all(f'<section id="{key}"' in page for key in ("summary", *SECTIONS[1:]))
    assert page.count("<script") == 3  # the data, Vega and the page's own: none from a review
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(", page.split("<body>")[0])
    assert re.findall(r'href="(?!#)', page) == []
    for figure in content.shown(content.sections(read(changed))):
        for kind, start in (("png", b"\x89PNG"), ("svg", b"<svg")):
            path = tmp_path / "figures" / f"{figure.name}.{kind}"
            assert path.read_bytes().startswith(start)


def test_a_bar_in_a_name_ends_no_cell_of_report_md(changed: dict[str, Any], tmp_path: Path) -> None:
    changed = only(changed, "runs")
    for run in changed["runs"]:
        run["categories"]["a|b"] = run["categories"].pop("books")
    result = read(changed)
    lines = markdown.write(tmp_path, result, content.sections(result)).read_text().split("\n")
    row = next(line for line in lines if "b |" in line)
    assert row.startswith(r"| a\|b | 250 |")


HOSTILE = "<img src=x onerror=alert(1)> a|b `c` &lt; *d* [e](f) \\"


def hostile(value: Any, key: str = "") -> Any:
    """Results whose free texts all contain Markdown and HTML."""
    if isinstance(value, dict):
        free = key in ("categories", "environment")
        return {
            f"{name}{HOSTILE}" if free and name != "command" else name: hostile(each, name)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [hostile(each, key) for each in value]
    if not isinstance(value, str) or key in ("state", "check"):
        return value
    return f"# {value}{HOSTILE}\n\n# <b>\n"


def test_no_text_from_data_has_an_effect_in_report_md(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    result = read(hostile(changed))
    sections = content.sections(result)
    report = markdown.write(tmp_path, result, sections).read_text()
    assert report.count("onerror") > 100
    tokens = MarkdownIt("commonmark").enable("table").parse(report)
    kinds = {each.type for token in tokens for each in (token, *(token.children or ()))}
    assert not any(kind.startswith(("html", "link", "code_inline", "em_")) for kind in kinds)
    headings = [kind for blocks in sections.values() for kind, _ in blocks if kind == "heading"]
    count = sum(token.type == "heading_open" for token in tokens)
    assert count == 1 + len(headings) + sum(
        any(kind not in ("hint", "explorer") for kind, _ in blocks) for blocks in sections.values()
    )
    tables = [
        table for blocks in sections.values() for kind, table in blocks if "rows" in dir(table)
    ]
    widths = [len(table.header) + 1 for table in tables for _ in range(len(table.rows) + 2)]
    rows = [line for line in report.split("\n") if line.startswith("|")]
    assert [re.sub(r"\\.", "", row).count("|") for row in rows] == widths
    figure = content.shown(sections)[0].title
    assert " ".join(figure.split()) in "".join(
        each.content for token in tokens for each in (token.children or ())
    )


def test_missing_results_are_omitted(changed: dict[str, Any], tmp_path: Path) -> None:
    for key in SECTIONS:
        visible = {"summary", "loss", "confusion"} if key == "runs" else {key}
        page = page_of(only(changed, key), tmp_path)
        assert {*re.findall(r'<section id="(\w+)"', page)} == visible | {"environment"}


def test_the_best_trial_is_named(changed: dict[str, Any]) -> None:
    changed = only(changed, "tuning")
    trials = changed["tuning"]["trials"]
    trials[4].update(losses=[0.5, 0.25, 0.3])
    trials[2].update(losses=[0.2])  # pruned
    (title,) = (t for t in titles(changed)["tuning"] if t.startswith("Of"))
    start = "Of 20 trials, 4 has the lowest validation loss, 0.25; the loss of the initial options"
    assert title.startswith(start)
    assert title.endswith("; 4 were pruned; 4 failed")
    changed["tuning"]["trials"] = [trials[3]]
    assert "No trial of 1 was completed; 1 failed" in titles(changed)["tuning"]


def test_every_question_has_its_answer_in_a_sentence(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    changed = only(changed, "questions")
    page = page_of(changed, tmp_path)
    questions = changed["questions"]
    requested = [questions["vanishing"], questions["gates"], *questions["comparisons"]]
    for answer in requested:
        assert page.count(answer["conclusion"]) == 1
    questions["gates"]["groups"] = []  # of a language without our stop words
    page = page_of(changed, tmp_path)
    assert 'data-chart="gates-z"' not in page and questions["gates"]["conclusion"] in page


def test_latencies_are_shown_where_there_are_any(changed: dict[str, Any], tmp_path: Path) -> None:
    changed = only(changed, "speed")
    headings = ["<h3>Inference</h3>", "<h3>Overhead of a call</h3>"]
    page = page_of(changed, tmp_path)
    assert all(heading in page for heading in headings)
    assert "<td>ONNX Runtime</td>" in page
    title = "In inference, torch_impl.GRU is the fastest: 2.00 times nn.GRU, the median of 6 tasks"
    assert titles(changed)["inference"] == [title]
    for name in ("inference", "calls"):  # as of an earlier version
        del changed["speed"][name]
    page = page_of(changed, tmp_path)
    assert not any(heading in page for heading in headings) and 'id="speed"' in page


def test_nan_does_not_break_the_page(changed: dict[str, Any], tmp_path: Path) -> None:
    changed = only(changed, "parity", "runs", "explorer")
    changed["parity"][0]["error"] = math.inf
    changed["runs"][0]["losses"][3] = math.nan
    changed["explorer"]["reviews"][0]["models"]["torch gru"]["z"][0] = math.nan
    page = page_of(changed, tmp_path)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(data[1], parse_constant=refuse)


def test_a_model_that_is_not_trained_step_by_step(changed: dict[str, Any], tmp_path: Path) -> None:
    changed = only(changed, "runs")
    linear = changed["runs"][0]
    linear.update(framework="sklearn", model="linear", implementation="NB-SVM")
    for name in ("losses", "loss_epochs", "first_step_seconds"):
        del linear[name]
    assert "sklearn linear" in page_of(changed, tmp_path)
    assert titles(changed)["loss"][0].endswith("(jax gru)")
    assert "sklearn linear" in titles(changed)["confusion"][0]
    changed["runs"] = [linear]
    assert "loss" not in titles(changed)
    assert 'id="loss"' not in page_of(changed, tmp_path)


def test_the_calibration(changed: dict[str, Any], tmp_path: Path) -> None:
    changed = only(changed, "runs")
    assert 'id="calibration"' not in page_of(changed, tmp_path)  # as of an earlier version
    bins = [{"count": 400, "confidence": 0.6, "accuracy": 0.55}]
    bins += [{"count": 600, "confidence": 0.95, "accuracy": 0.9}]
    for run, error in zip(changed["runs"], (0.05, 0.021), strict=True):
        run.update(calibration_error=error, reliability=bins)
    assert 'id="calibration"' in page_of(changed, tmp_path)
    title = "The probabilities of jax gru are off by 2.1 points, those of torch gru by 5.0"
    assert titles(changed)["reliability"] == [title]


def test_titles_agree_with_the_numbers(changed: dict[str, Any]) -> None:
    results = only(changed, "runs")
    first, second = changed["runs"]
    first.update(accuracy=0.9, accuracy_interval=[0.88, 0.92])
    second.update(accuracy=0.8, accuracy_interval=[0.78, 0.82])
    result = "80.00% (jax gru) to 90.00% (torch gru) of 1,000 reviews are classified correctly"
    above = "the 95 % interval of torch gru is above that of the next"
    assert titles(results)["accuracy"] == [f"{result}; {above}"]
    second["accuracy_interval"] = [0.78, 0.88]
    apart = "torch gru and jax gru cannot be told apart: their 95 % intervals overlap"
    assert titles(results)["accuracy"] == [f"{result}; {apart}"]
    first["confusion"] = [[450, 50], [100, 400]]
    assert titles(results)["confusion"][0].endswith("100 of 500 positive taken for negative")
    second["losses"][-1] = 0.01
    ends = f"0.010 (jax gru) to {first['losses'][-1]:.3f} (torch gru)"
    assert titles(results)["loss"] == [f"Training ends at a loss of {ends}"]
    results = only(changed, "questions")
    series = changed["questions"]["vanishing"]["series"][0]
    series["median"][-1] = series["median"][0] / 250
    assert "250-fold in the tanh RNN, untrained" in titles(results)["vanishing"][0]
    series["median"][-1] = 0.0
    assert "to nothing in the tanh RNN, untrained" in titles(results)["vanishing"][0]
    output = "torch gru +7.00 points against torch rnn"
    assert titles(results)["comparisons"] == [
        f"A difference can be told in 1 of 7 pairs: {output}",
        "By the length of the review, 3 of 21 intervals exclude zero; by chance alone 1.1 would",
        "By category, 2 of 14 intervals exclude zero; by chance alone 0.7 would",
    ]
    first, *_, last = changed["questions"]["comparisons"]
    first["seeds"] = 4
    for title in titles(results)["comparisons"]:
        assert re.search("too few seeds to tell", title, re.IGNORECASE)
    first["seeds"] = 5
    assert titles(results)["gates"][0].startswith("The update gate z is largest at sentiment words")
    changed["questions"]["gates"]["effects"][0]["by_seed"] = [0.8]
    assert all("too few seeds to tell" in title for title in titles(results)["gates"])
    last["interval"] = [-0.02, -0.001]
    assert titles(results)["comparisons"][0].endswith(
        f"in 2 of 7 pairs: {output} and jax gru -1.00 points against torch gru"
    )
    changed["questions"]["comparisons"] = [last]
    last.update(interval=[-0.02, 0.0], by_length=[], by_category=[])
    assert titles(results)["comparisons"] == ["A difference can be told in 0 of 1 pairs"]


def review(results: dict[str, Any]) -> dict[str, Any]:
    return results["explorer"]["reviews"][1]


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda results: results.update(schema=2), "$.schema"),
        (
            lambda results: results["runs"][0].pop("losses"),
            "loss_epochs: different lengths - at `$.runs[0]`",
        ),
        (lambda results: results["runs"][0]["losses"].pop(), "$.runs[0]"),
        (lambda results: results["runs"][1]["confusion"].pop(), "runs[1].confusion"),
        (lambda results: results["runs"][1]["categories"].popitem(), "runs[1].categories"),
        (lambda results: results["data"].pop("vectors"), "`vectors` - at `$.data`"),
        (lambda results: results["environment"].clear(), "environment: command is missing"),
        (lambda results: results["parity"][3].update(error=None), "$.parity[3].error"),
        (lambda results: results["speed"]["rows"][2].update(quartiles=[1]), "rows[2].quartiles"),
        (lambda results: results["speed"].update(rows=[]), "$.speed"),
        (lambda results: results["speed"]["inference"][3].update(p50=0), "inference[3].p50"),
        (lambda results: results["questions"]["vanishing"]["distances"].pop(), "vanishing"),
        (lambda results: results["questions"]["gates"].update(effects={}), "gates.effects"),
        (lambda results: results["questions"]["comparisons"].append("x"), "comparisons[7]"),
        (lambda results: results.update(explorer=None), "$.explorer"),
        (lambda results: results["explorer"]["reviews"].clear(), "$.explorer.reviews"),
        (lambda results: review(results).pop("true"), "`true` - at `$.explorer.reviews[1]`"),
        (lambda results: review(results)["models"].clear(), "$.explorer.reviews[1].models"),
        (lambda results: review(results)["words"].append(1), "$.explorer.reviews[1].words["),
        (lambda results: review(results)["words"].pop(), "$.explorer.reviews[1]"),
        (
            lambda results: review(results)["models"]["jax bigru"]["z"]["forward"].pop(),
            "models.jax bigru.z: expected one number for each word - at `$.explorer.reviews[1]`",
        ),
        (lambda results: review(results).update(text="\ud800"), "surrogates"),
        (lambda results: results["tuning"]["trials"].clear(), "$.tuning.trials"),
        (lambda results: results["tuning"]["trials"][2].update(state="good"), "trials[2].state"),
        (
            lambda results: results["tuning"]["trials"][1]["options"].popitem(),
            "trials[1].options: differ from trials[0] - at `$.tuning`",
        ),
    ],
)
def test_bad_results_get_one_clear_line_and_leave_nothing(
    damage: Callable[[dict], object],
    place: str,
    changed: dict[str, Any],
    command: Command,
    tmp_path: Path,
) -> None:
    damage(changed)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed))
    error = refused(command(compare.main, "report", tmp_path))
    assert error.startswith(f"error: {path}: ") and place in error
    assert [*tmp_path.iterdir()] == [path]


def test_a_report_that_cannot_be_finished_leaves_the_old_one(
    changed: dict[str, Any], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "results.json").write_text(json.dumps(changed))
    (tmp_path / "report.md").write_text("the old one")
    monkeypatch.setattr(figures.Figure, "save", lambda *_: None)
    monkeypatch.setattr(html, "write", full)
    error = refused(command(compare.main, "report", tmp_path))
    assert error == f"error: {tmp_path}: cannot be written (No space left on device)\n"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}
    assert (tmp_path / "report.md").read_text() == "the old one"


def test_only_report_takes_a_folder(command: Command, tmp_path: Path) -> None:
    error = refused(command(compare.main, "speed", tmp_path))
    assert error == f"error: {tmp_path}: only report takes a folder; the others take --out\n"


def test_a_model_has_one_colour_in_all_charts(results: dict[str, Any]) -> None:
    bins = [Bin(400, 0.6, 0.55)]
    runs = [
        msgspec.structs.replace(run, calibration_error=0.1, reliability=bins)
        for run in read(results).runs
    ]
    colours: dict[str, set[str]] = {}

    def note(part: dict[str, Any]) -> None:
        if isinstance(part.get("range"), list) and str(part["range"][0]).startswith("#"):
            for name, colour in zip(part["domain"], part["range"], strict=True):
                colours.setdefault(name.rpartition(" ")[2], set()).add(colour)

    for draw in (lambda runs: figures.accuracy(runs, 1000), figures.losses, figures.reliability):
        for visible in (runs, runs[2:], runs[::-1]):
            json.loads(json.dumps(draw(visible).spec()), object_hook=note)
    assert all(len(result) == 1 for result in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == 4
    vanishing = read(results).questions.vanishing
    color = figures.vanishing(vanishing).spec()["layer"][0]["encoding"]["color"]["scale"]
    of_series = dict(zip(color["domain"], color["range"], strict=True))
    assert {of_series[name] for name in of_series if name.startswith("GRU")} == colours["gru"]
    rnn = {of_series[name] for name in of_series if name.startswith("tanh RNN")}
    assert len(rnn) == 1 and rnn.isdisjoint(colours["gru"])
    for run in runs:
        bar = figures.largest("classes", "", run, ["a", "b"]).spec()["layer"][0]["mark"]
        assert {bar["color"]} == colours[run.model]
