"""The page of the server, in a real browser. What the server answers is made up here,
but for one test.

`pytest tests/inference/test_serve_page.py --basetemp=DIR` leaves the screenshots in DIR.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

import torch_impl
from common.linear import run as linear
from common.serve.assets import assets
from common.serve.server import HEADERS
from tests.chromium import (
    SCREENS,
    barriers,
    contrasts,
    each_screen,
    facts,
    logged,
    needs_axe,
    screenshot,
    show,
    words,
)
from tests.inference.client import SIZES, Client

BROKEN = "<img src=x onerror='window.broken = 1'>"
RUNS = [
    {
        "name": name,
        "framework": "torch",
        "model": model,
        "classes": ["negative", "positive"],
        "hidden_size": 8,
        "num_layers": 1,
        "bidirectional": model == "bigru",
        "example": "an example of the data",
    }
    for name, model in (("mine", "gru"), (BROKEN, "bigru"), ("plain", "rnn"), ("same", "nn.gru"))
]


def explain(text: str, model: str) -> dict[str, Any]:
    """An invented explanation: only xyzzy is unknown, and all numbers depend on the text."""
    places = [place for place, word in enumerate(text.split()) if word != "xyzzy"]
    read = [text.split()[place] for place in places]
    rng = np.random.default_rng([*text.encode()])

    def either_way(low: float, *shape: int) -> Any:
        forward, backward = (rng.uniform(low, 1, shape).tolist() for _ in range(2))
        return {"forward": forward, "backward": backward} if model == "bigru" else forward

    n = len(read)
    gates = ["z", "r"] if model != "rnn" else []
    inside = {"units": {name: either_way(0, n, 8) for name in gates}}
    inside["units"]["state"] = either_way(-1, n, 8)
    return {
        "words": read,
        "all_words": text.split(),
        "places": places,
        "predicted": "positive",
        "probability": 0.75,
        **{name: either_way(0, n) for name in (*gates, "change")},
        "gradient": rng.uniform(-1, 1, n).tolist(),
        "leave_out": rng.uniform(-1, 1, n).tolist(),
        "running": rng.uniform(0, 1, n).tolist(),
        **inside,
    }


class Server(ThreadingHTTPServer):
    """Answers the texts in `held` only when their event is set; what was asked is in `asked`."""

    daemon_threads = True
    held: dict[str, Event]
    asked: list[tuple[str, str]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        runs = {"/runs": (json.dumps({"runs": RUNS}).encode(), "application/json")}
        self.answer(200, *(assets() | runs)[self.path])

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["content-length"])))
        (text,), run = question["texts"], question["run"]
        assert (self.path, question["units"]) == ("/explain", True)
        self.server.asked.append((run, text))
        if text in self.server.held:
            self.server.held[text].wait(10)
        if len(text) > 1000:
            self.answer(413, json.dumps({"error": f"too long: {BROKEN}"}).encode(), "a/json")
            return
        model = next(each["model"] for each in RUNS if each["name"] == run)
        result = {"run": run, "explanations": [explain(text, model)]}
        self.answer(200, json.dumps(result).encode(), "application/json")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as started:
        started.held, started.asked = {}, []
        Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


def url(server: Server, text: str = "a fine film", *runs: str) -> str:
    """The URL of the page with a text and runs."""
    state = urlencode([("text", text), *(("run", run) for run in runs)])
    return f"http://127.0.0.1:{server.server_port}/#{state}"


def panels(browser: WebDriver) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "#panels section")


def box(browser: WebDriver) -> WebElement:
    return browser.find_element(By.ID, "text")


def write(browser: WebDriver, *texts: str) -> None:
    """Put each text into the box, one shortly after the other."""
    browser.execute_async_script(
        "const [box, texts, done] = arguments;"
        "texts.forEach((text, i) => setTimeout(() => {"
        "  box.value = text; box.dispatchEvent(new Event('input')); }, 20 * i));"
        "setTimeout(done, 20 * texts.length);",
        box(browser),
        texts,
    )


def choose(browser: WebDriver, name: str, value: str) -> None:
    Select(browser.find_element(By.ID, name)).select_by_value(value)


def await_words(browser: WebDriver, text: str) -> None:
    """Wait until every panel shows these words."""
    visible = (
        "return [...document.querySelectorAll('.words')]"
        ".map((words) => [...words.children].map((word) => word.textContent).join(' '))"
    )
    WebDriverWait(browser, 10).until(lambda _: {*browser.execute_script(visible)} == {text}, text)


def pixels(browser: WebDriver, panel: WebElement) -> np.ndarray:
    """The stored pixels of the heat map: [units, words, 4]."""
    width, height, data = browser.execute_script(
        "const canvas = arguments[0].querySelector('canvas'), { width, height } = canvas;"
        "return [width, height,"
        " [...canvas.getContext('2d').getImageData(0, 0, width, height).data]]",
        panel,
    )
    return np.array(data).reshape(height, width, 4)


def test_typed_text_is_shown_for_every_run(browser: WebDriver, server: Server) -> None:
    show(browser, url(server))
    await_words(browser, "a fine film")
    box(browser).send_keys(" indeed")
    await_words(browser, "a fine film indeed")
    assert [panel.find_element(By.TAG_NAME, "h2").text for panel in panels(browser)] == [
        "mine",
        BROKEN,
    ]
    result = explain("a fine film indeed", "gru")
    (mine, _) = panels(browser)
    assert mine.find_element(By.CLASS_NAME, "verdict").text == "positive 75.0 % · 4 known words"
    assert [each.text for each in browser.find_elements(By.TAG_NAME, "output")] == [
        "positive 75.0 %",
        "positive 75.0 %",
        "",
        "",
    ]
    output = facts(mine)  # of the word that was typed last
    assert output["word"] == "indeed (4 of 4)"
    assert float(output["update gate z"]) == pytest.approx(result["z"][3], abs=6e-4)
    points = browser.execute_script(
        "return arguments[0].querySelector('.chart').view.data('words').map((p) => p.probability)",
        mine,
    )
    assert points == result["running"]
    assert logged(browser) == []
    names = browser.execute_script(
        "return performance.getEntriesByType('resource').map(({ name }) => new URL(name).host)"
    )
    assert {*names} == {f"127.0.0.1:{server.server_port}"}


def test_page_shows_the_answers_of_the_real_server(
    browser: WebDriver, client: Client, served: dict[str, Path], linear_run: Path
) -> None:
    show(browser, f"http://127.0.0.1:{client.port}/")
    gru, rnn = panels(browser)
    text = box(browser).get_property("value")
    assert text == json.loads((served["gru"] / "config.json").read_text())["example"]
    result = torch_impl.load(served["gru"]).explain(text)
    assert [word.text for word in words(gru)] == result["all_words"] == text.split()
    assert float(facts(gru)["update gate z"]) == pytest.approx(result["z"][-1], abs=6e-4)
    output = (
        f"{result['predicted']} {result['probability']:.1%} · {len(result['words'])} known words"
    )
    verdict = gru.find_element(By.CLASS_NAME, "verdict").text
    assert verdict.replace(" %", "%") == output
    assert pixels(browser, gru).shape == (SIZES["hidden_size"], len(result["words"]), 4)
    choose(browser, "inside", "state")
    assert pixels(browser, rnn).any()
    browser.find_element(By.CSS_SELECTOR, "#runs [value=linear]").send_keys(Keys.SPACE)
    await_words(browser, text)
    output = linear.load(linear_run).explain(text)
    panel = panels(browser)[2]
    read = [word.text for word in words(panel) if not word.get_attribute("aria-disabled")]
    assert read == output["words"]
    last = {"word": f"{read[-1]} ({len(read)} of {len(read)})"}
    assert facts(panel) == last | {"contribution": f"{output['contribution'][-1]:.3f}"}
    assert not any(each.is_displayed() for each in panel.find_elements(By.TAG_NAME, "figure"))
    assert logged(browser) == []


def test_link_restores_text_and_runs(browser: WebDriver, server: Server) -> None:
    show(browser, url(server, "first", "same", "no such run"))
    assert [panel.find_element(By.TAG_NAME, "h2").text for panel in panels(browser)] == ["same"]
    write(browser, "first & more + 100 %")
    browser.find_element(By.CSS_SELECTOR, "#runs [value=plain]").send_keys(Keys.SPACE)
    await_words(browser, "first & more + 100 %")
    link = browser.current_url
    browser.get("about:blank")
    show(browser, link)
    await_words(browser, "first & more + 100 %")
    assert [panel.find_element(By.TAG_NAME, "h2").text for panel in panels(browser)] == [
        "plain",
        "same",
    ]


def test_no_answer_overtakes_another(browser: WebDriver, server: Server) -> None:
    show(browser, url(server, "one", "mine"))
    server.held["one two"] = Event()
    write(browser, "one t", "one tw", "one two")
    WebDriverWait(browser, 10).until(lambda _: server.asked[-1] == ("mine", "one two"))
    write(browser, "one two three")
    time.sleep(0.5)
    await_words(browser, "one")
    server.held["one two"].set()
    await_words(browser, "one two three")
    assert [text for _, text in server.asked] == ["one", "one two", "one two three"]


def test_by_keyboard(browser: WebDriver, server: Server) -> None:
    show(browser, url(server, "it is a fine film"))
    mine, other = panels(browser)
    mine.find_element(By.CLASS_NAME, "words").send_keys(Keys.HOME, Keys.ARROW_RIGHT * 2)
    for panel in (mine, other):  # which follows
        assert facts(panel)["word"] == "a (3 of 5)"
        line = panel.find_element(By.CLASS_NAME, "unit").text
        assert line.startswith("a: mean ")
    z = explain("it is a fine film", "gru")["units"]["z"][2]
    output = f"a: mean {np.mean(z):.3f}, least {min(z):.3f} (unit {np.argmin(z) + 1}), "
    line = mine.find_element(By.CLASS_NAME, "unit").text
    assert line == f"{output}most {max(z):.3f} (unit {np.argmax(z) + 1})"
    column, canvas = (mine.find_element(By.CSS_SELECTOR, t) for t in (".column", "canvas"))
    assert column.rect["x"] == pytest.approx(canvas.rect["x"] + canvas.rect["width"] * 2 / 5, abs=2)
    write(browser, "it is a fine film indeed")  # whoever looks at a word stays with it
    await_words(browser, "it is a fine film indeed")
    assert facts(mine)["word"] == "a (3 of 6)"
    browser.find_element(By.CSS_SELECTOR, "#runs [value=mine]").send_keys(Keys.SPACE)
    assert panels(browser) == [other]
    room = 0.7 * other.rect["width"]  # for the chart, which is wider now
    chart = (By.CSS_SELECTOR, ".chart svg")
    WebDriverWait(browser, 10).until(lambda _: other.find_element(*chart).rect["width"] > room)
    browser.find_element(By.CSS_SELECTOR, "#runs [value=same]").send_keys(Keys.SPACE)
    await_words(browser, "it is a fine film indeed")
    assert len(panels(browser)) == 2
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len({*ids}) == len(ids)


def test_gates_and_states_of_all_units(browser: WebDriver, server: Server) -> None:
    text = "it is a fine film"
    show(browser, url(server, text, *(run["name"] for run in RUNS)))
    mine, both, plain, _ = panels(browser)

    def shown(values: list[list[float]]) -> np.ndarray:
        """The opacities of the words; those of orange words are negative."""
        return np.clip(np.transpose(values), -1, 1) * 255

    def opacities(panel: WebElement) -> np.ndarray:
        result = pixels(browser, panel)
        return np.where(result[..., 0] > result[..., 2], -1, 1) * result[..., 3]

    units = explain(text, "gru")["units"]
    np.testing.assert_allclose(opacities(mine), shown(2 * np.array(units["z"]) - 1), atol=1)
    figure = plain.find_element(By.CSS_SELECTOR, "figure:last-child")
    assert figure.text == "It has no update gate z"
    assert "update gate z" not in facts(plain)
    choose(browser, "inside", "state")
    states = explain(text, "rnn")["units"]["state"]
    np.testing.assert_allclose(opacities(plain), shown(states), atol=1)
    choose(browser, "direction", "backward")
    backward = explain(text, "bigru")["units"]["state"]["backward"]
    np.testing.assert_allclose(opacities(both), shown(backward), atol=1)
    assert "update gate z (backward)" in facts(both)
    choose(browser, "order", "mean")
    result = opacities(mine)
    order = np.argsort(-np.mean(units["state"], axis=0))
    np.testing.assert_allclose(result, shown(np.array(units["state"])[:, order]), atol=1)
    label = mine.find_element(By.TAG_NAME, "canvas").get_attribute("aria-label")
    least, most = np.min(units["state"]), np.max(units["state"])
    assert label == (
        "Heat map of the state: 5 words from left to right, 8 units from top to bottom, values "
        f"from {least:.3f} to {most:.3f}"
    )
    canvas = mine.find_element(By.TAG_NAME, "canvas")
    move = webdriver.ActionChains(browser).move_to_element_with_offset(canvas, 0, 10)
    move.perform()
    assert facts(mine)["word"] == "a (3 of 5)"
    unit = order[4]
    here = f"here {units['state'][2][unit]:.3f} (unit {unit + 1})"
    assert mine.find_element(By.CLASS_NAME, "unit").text.endswith(here)


def test_texts_and_names_are_never_html(browser: WebDriver, server: Server) -> None:
    text = f"<script>window.broken=1</script> {BROKEN} \u202eoverride"
    show(browser, url(server, text))
    await_words(browser, text)
    write(browser, "x" * 1001)
    alert = browser.find_element(By.ID, "error")
    WebDriverWait(browser, 10).until(lambda _: alert.text)
    assert alert.text == f"too long: {BROKEN}"
    assert browser.execute_script("return window.broken") is None
    assert browser.find_elements(By.CSS_SELECTOR, "img, main script") == []


def test_missing_answer_is_reported(browser: WebDriver, server: Server) -> None:
    show(browser, url(server))
    alert = browser.find_element(By.CSS_SELECTOR, "[role=alert]")
    assert alert.text == ""

    def stale() -> list[bool]:
        return ["stale" in panel.get_attribute("class") for panel in panels(browser)]

    write(browser, "x" * 1001)
    WebDriverWait(browser, 10).until(lambda _: alert.text == f"too long: {BROKEN}")
    WebDriverWait(browser, 10).until(lambda _: stale() == [True, True])
    write(browser, "short")
    await_words(browser, "short")
    assert (alert.text, stale()) == ("", [False, False])
    server.shutdown()
    server.server_close()
    write(browser, "shorter")
    WebDriverWait(browser, 10).until(lambda _: alert.text == "The server gives no answer.")
    await_words(browser, "short")
    WebDriverWait(browser, 10).until(lambda _: stale() == [True, True])


def test_no_known_word(browser: WebDriver, server: Server) -> None:
    show(browser, url(server, "xyzzy"))
    (mine, _) = panels(browser)
    assert mine.find_element(By.CLASS_NAME, "verdict").text == "positive 75.0 % · no known word"
    grey = words(mine)
    assert [(word.text, word.get_attribute("aria-disabled")) for word in grey] == [
        ("xyzzy", "true")
    ]
    hidden = [".word", "figure"]
    for selector in hidden:
        assert not mine.find_element(By.CSS_SELECTOR, selector).is_displayed()
    write(browser, "known xyzzy")
    await_words(browser, "known xyzzy")
    assert [word.get_attribute("aria-disabled") for word in words(mine)] == [None, "true"]
    assert facts(mine)["word"] == "known (1 of 1)"
    assert mine.find_element(By.CLASS_NAME, "verdict").text == "positive 75.0 % · 1 known word"
    for selector in hidden:
        assert mine.find_element(By.CSS_SELECTOR, selector).is_displayed()
    write(browser, "")
    WebDriverWait(browser, 10).until(lambda _: "no known" in mine.text)
    assert logged(browser) == []


LONG = "the film was not so bad that nobody would see it again " * 10


def test_light_and_dark_can_be_chosen(browser: WebDriver, server: Server) -> None:
    def background() -> str:
        return browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    show(browser, url(server))
    light = background()
    choose(browser, "theme", "dark")
    assert (dark := background()) != light
    browser.refresh()
    assert background() == dark, "the choice is kept"


@pytest.fixture(scope="module")
def opened(browser: WebDriver, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A long text, opened once for the tests of a screen and a color scheme, which are returned."""
    screen, scheme = request.param
    with serving() as server:
        show(
            browser, url(server, LONG + "x" * 90, "mine", BROKEN, "plain"), SCREENS[screen], scheme
        )
        yield screen, scheme


@each_screen
def test_nothing_is_wider_than_the_screen(
    browser: WebDriver, opened: tuple[str, str], tmp_path: Path
) -> None:
    screen, scheme = opened
    screenshot(browser, tmp_path / f"{screen}-{scheme}.png")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= SCREENS[screen]["width"]
    columns = {panel.rect["x"] for panel in panels(browser)}
    assert len(columns) == (3 if screen == "desktop" else 1)
    choose(browser, "tint", "leave_out")
    result = contrasts(browser)
    assert min(result) >= 4.5
    assert max(result) > 1.3 * min(result), "the words are not tinted"
    assert logged(browser) == []


@needs_axe
@each_screen
def test_axe_finds_nothing(browser: WebDriver, opened: tuple[str, str]) -> None:
    assert barriers(browser) == []
    write(browser, "x" * 1001)
    WebDriverWait(browser, 10).until(lambda _: panels(browser)[2].get_attribute("class"))
    assert barriers(browser) == []
    write(browser, "")
    WebDriverWait(browser, 10).until(lambda _: "no known" in panels(browser)[2].text)
    assert barriers(browser) == []
