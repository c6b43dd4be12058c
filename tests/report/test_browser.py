"""report.html in a real browser, from disk.

The screenshots are for people: `pytest tests/report/test_browser.py --basetemp=DIR` leaves them in
DIR.
"""

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from common.report import content, html
from common.report.schema import Results, convert
from comparison import twins
from tests.chromium import (
    SCREENS,
    barriers,
    color_scheme,
    contrasts,
    each_screen,
    facts,
    logged,
    needs_axe,
    screenshot,
    show,
    words,
)

each_size = pytest.mark.parametrize("page", ["results", "large_results"], indirect=True)
long_large = pytest.param("large_results", marks=pytest.mark.long)
each_size_on_screens = pytest.mark.parametrize("page", ["results", long_large], indirect=True)
on_a_desktop = pytest.mark.parametrize("opened", [("desktop", "light")], indirect=True)


@pytest.fixture(scope="module", params=["results"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that compare.py writes for the results of conftest.py."""
    folder = tmp_path_factory.mktemp("report")
    results = request.getfixturevalue(request.param)
    result = convert(results, Results, folder)
    return html.write(folder, result, {**content.sections(result), "Twins": twins.section()})


@pytest.fixture(scope="module")
def opened(browser: WebDriver, page: Path, request: pytest.FixtureRequest) -> tuple[str, str]:
    """The page, opened once for the tests of a screen and a color scheme, which are returned."""
    screen, scheme = request.param
    show(browser, page.as_uri(), SCREENS[screen], scheme)
    return screen, scheme


def choose_review(browser: WebDriver, number: int) -> None:
    Select(browser.find_element(By.ID, "review")).select_by_value(str(number))


@each_size
def test_it_opens_fast_draws_every_chart_logs_nothing_and_prints_on_a_few_pages(
    browser: WebDriver, page: Path, results: dict[str, Any]
) -> None:
    assert page.stat().st_size < 5e6
    # The CPU seconds of the page, which other programs do not affect.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    show(browser, page.as_uri())
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    assert 0.1 < next(each["value"] for each in metrics if each["name"] == "TaskDuration") < 2
    assert logged(browser) == []
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(chart => [chart.dataset.chart, "
        "chart.querySelectorAll('svg .mark-symbol path, svg .mark-line path, svg .mark-rect path')"
        ".length])"
    )
    names = dict(marks)
    tuning = 1 + len(results["tuning"]["trials"][0]["options"])
    assert len(names) == 1 + 1 + len(results["runs"]) + 2 + 1 + 2 + 3 + 1 + tuning
    assert all(names.values()), names
    assert names["comparisons"] == 7 + 7 * 5 + 2  # pairs, their seeds, and the legend
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert 5 < len(re.findall(rb"/Type /Page\b", printed)) < 30
    # All sections are unfolded, except the thousands of rows of the full speed grid.
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    few = browser.find_elements(By.CSS_SELECTOR, "details:not(.long)")
    assert few and all(part.get_property("open") for part in few)


@each_size_on_screens
@each_screen
def test_nothing_is_wider_than_the_screen(
    browser: WebDriver, opened: tuple[str, str], tmp_path: Path
) -> None:
    screen, scheme = opened
    screenshot(browser, tmp_path / f"{screen}-{scheme}.png")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= SCREENS[screen]["width"]
    cut = browser.execute_script(
        "const edge = document.querySelector('section').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('.chart svg text')]"
        ".filter((text) => text.getBoundingClientRect().right > edge)"
        ".map((text) => text.textContent)"
    )
    assert cut == []
    legends = browser.execute_script(
        "return [...document.querySelectorAll('.chart .role-legend')].map((legend) => {"
        "const [own, box] = [legend, legend.closest('.chart')].map(e => e.getBoundingClientRect());"
        "return [legend.textContent, own.left - box.left, box.right - own.right]; })"
    )
    assert len(legends) > 15
    assert [legend for legend in legends if min(legend[1:]) < 0] == []
    # The summary begins with how well each model does.
    observed = browser.execute_script(
        "const table = document.querySelector('#summary .scroll');"
        "const edge = table.getBoundingClientRect().right;"
        "return [...table.querySelectorAll('thead th')]"
        ".filter((cell) => cell.getBoundingClientRect().right <= edge).map((c) => c.textContent)"
    )
    assert observed[:3] == ["framework", "model", "accuracy"]
    assert logged(browser) == []


@each_screen
def test_the_twins_are_side_by_side(browser: WebDriver, opened: tuple[str, str]) -> None:
    fold = browser.find_element(By.XPATH, "//details[summary='scan_direction']")
    fold.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    cells = fold.find_elements(By.TAG_NAME, "pre")
    assert ["jax.lax.scan" in cell.text for cell in cells] == [False, True]
    boxes = [cell.rect for cell in cells]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["height"] == boxes[1]["height"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    result = contrasts(browser, "#twins mark")
    assert len(result) > 50 and min(result) >= 4.5
    plain = cells[0].value_of_css_property("background-color")
    assert fold.find_element(By.TAG_NAME, "mark").value_of_css_property("background-color") != plain
    scroll = fold.find_element(By.CLASS_NAME, "scroll")
    scroll.send_keys(Keys.ARROW_RIGHT * 3)
    moved = "return arguments[0].scrollLeft > 0"
    wait = WebDriverWait(browser, 5)
    assert opened[0] == "desktop" or wait.until(lambda _: browser.execute_script(moved, scroll))
    assert logged(browser) == []


@each_screen
def test_tinted_words_can_be_read(browser: WebDriver, opened: tuple[str, str]) -> None:
    for tint in ("z", "change", "gradient", "leave_out"):
        Select(browser.find_element(By.ID, "tint")).select_by_value(tint)
        result = contrasts(browser)
        assert min(result) >= 4.5, tint
        assert max(result) > 1.3 * min(result), "the words are not tinted"


@needs_axe
@each_size_on_screens
@each_screen
def test_axe_finds_nothing(browser: WebDriver, opened: tuple[str, str]) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert barriers(browser) == []


@on_a_desktop
def test_the_loss_chart_hides_series_and_zooms(browser: WebDriver, opened: tuple[str, str]) -> None:
    chart = browser.find_element(By.CSS_SELECTOR, '[data-chart="loss"]')

    def lines() -> int:
        return len(chart.find_elements(By.CSS_SELECTOR, "svg .mark-line path"))

    def domain() -> list[float]:
        return browser.execute_script("return arguments[0].view.scale('x').domain()", chart)

    assert lines() == 6
    box = chart.find_element(By.CSS_SELECTOR, "input[type=checkbox]")
    box.send_keys(Keys.SPACE)
    WebDriverWait(browser, 5).until(lambda _: lines() == 5)
    whole = domain()
    zoom = browser.find_element(By.CSS_SELECTOR, '[aria-label="zoom in"]')
    zoom.send_keys(Keys.ENTER)
    low, high = domain()
    assert high - low == pytest.approx((whole[1] - whole[0]) / 2)
    browser.find_element(By.CSS_SELECTOR, '[aria-label="all epochs"]').send_keys(Keys.ENTER)
    assert domain() == whole
    point = chart.find_elements(By.CSS_SELECTOR, "svg .mark-symbol path")[-80]
    webdriver.ActionChains(browser).move_to_element(point).perform()
    tip = WebDriverWait(browser, 5).until(
        lambda b: b.find_element(By.CSS_SELECTOR, "#vg-tooltip-element.visible").text
    )
    assert "loss" in tip and "epochs" in tip
    assert logged(browser) == []


@on_a_desktop
def test_the_explorer_answers_mouse_and_keyboard(
    browser: WebDriver, opened: tuple[str, str], results: dict[str, Any]
) -> None:
    review = results["explorer"]["reviews"][0]
    values = review["models"]["torch gru"]
    assert [word.text for word in words(browser)] == review["words"]
    assert "right" in browser.find_element(By.CLASS_NAME, "verdict").text

    webdriver.ActionChains(browser).move_to_element(words(browser)[3]).perform()
    result = facts(browser)
    assert result["word"] == f"{review['words'][3]} (4 of {len(review['words'])})"
    assert float(result["update gate z"]) == pytest.approx(values["z"][3], abs=6e-4)
    assert float(result["reset gate r"]) == pytest.approx(values["r"][3], abs=6e-4)
    percent = float(result["probability so far"].removesuffix(" %"))
    assert percent == pytest.approx(100 * values["running"][3], abs=0.06)

    text = browser.find_element(By.CLASS_NAME, "words")
    for keys, index in ((Keys.HOME, 0), (Keys.ARROW_RIGHT * 2, 2), (Keys.END, -1)):
        text.send_keys(keys)
        assert facts(browser)["word"].startswith(review["words"][index] + " ")
        assert words(browser)[index].get_attribute("aria-selected") == "true"

    tint = Select(browser.find_element(By.ID, "tint"))
    tint.select_by_value("z")
    before = [word.value_of_css_property("background-color") for word in words(browser)]
    tint.select_by_value("leave_out")
    after = [word.value_of_css_property("background-color") for word in words(browser)]
    assert before != after

    Select(browser.find_element(By.ID, "model")).select_by_value("jax bigru")
    Select(browser.find_element(By.ID, "direction")).select_by_value("backward")
    text.send_keys(Keys.HOME)
    z = review["models"]["jax bigru"]["z"]["backward"][0]
    assert float(facts(browser)["update gate z (backward)"]) == pytest.approx(z, abs=6e-4)
    choose_review(browser, 1)
    assert "wrong" in browser.find_element(By.CLASS_NAME, "verdict").text
    assert logged(browser) == []


@on_a_desktop
def test_reviews_can_neither_break_the_page_nor_run(
    browser: WebDriver, opened: tuple[str, str], results: dict[str, Any]
) -> None:
    reviews = results["explorer"]["reviews"]
    pointer = webdriver.ActionChains(browser)  # leaves the words, which it would choose
    pointer.w3c_actions.pointer_action.move_to_location(0, 0)
    pointer.perform()
    choose_review(browser, 1)
    assert [word.text for word in words(browser)][:2] == reviews[1]["words"][:2]
    whole = browser.find_element(By.ID, "text")
    assert whole.get_property("textContent") == reviews[1]["text"]
    choose_review(browser, 2)
    mark = words(browser)[0]
    assert mark.text == "\u202eoverride"
    assert mark.value_of_css_property("unicode-bidi") == "isolate"
    choose_review(browser, 3)
    count = len(reviews[3]["words"])
    assert len(words(browser)) == count == 10_000
    browser.find_element(By.CLASS_NAME, "words").send_keys(Keys.END)
    assert facts(browser)["word"] == f"word{count - 1} ({count} of {count})"
    assert browser.execute_script("return window.broken") is None
    # Not even what got into the page as a script could run.
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = 'broken = 1';"
        "document.body.append(script)"
    )
    assert browser.execute_script("return window.broken") is None
    assert any("Content Security Policy" in message for message in logged(browser))


def test_light_and_dark_can_be_chosen(browser: WebDriver, page: Path) -> None:
    def background() -> str:
        return browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    show(browser, page.as_uri(), scheme="light")
    light = background()
    Select(browser.find_element(By.ID, "theme")).select_by_value("dark")
    dark = background()
    assert dark != light
    show(browser, page.as_uri(), scheme="light")
    assert background() == dark, "the choice is kept"
    Select(browser.find_element(By.ID, "theme")).select_by_value("")
    assert background() == light
    color_scheme(browser, "dark")
    assert background() == dark
