"""Pages in a real browser: Debian's chromium, without a network.

axe-core, which detects accessibility problems, comes from the npm registry:
`npm install axe-core`, and AXE_CORE=node_modules/axe-core/axe.min.js.
"""

import base64
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    reason = "needs chromium and chromedriver (apt: chromium-driver)"
    pytest.skip(reason, allow_module_level=True)
needs_axe = pytest.mark.skipif(
    "AXE_CORE" not in os.environ, reason="AXE_CORE does not name axe.min.js"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update "
    # No host outside can be reached: no name resolves, and no program listens on the proxy's port.
    "--proxy-server=http://127.0.0.1:9 "
    "--host-resolver-rules=MAP\u0020*\u0020~NOTFOUND,EXCLUDE\u0020127.0.0.1"
)
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
SCREENS = {"desktop": DESKTOP, "phone": PHONE}
each_screen = pytest.mark.parametrize(
    "opened",
    [
        ("desktop", "light"),
        ("phone", "dark"),
        pytest.param(("desktop", "dark"), marks=pytest.mark.long),
        pytest.param(("phone", "light"), marks=pytest.mark.long),
    ],
    indirect=True,
    ids="-".join,
)


def start(folder: Path) -> WebDriver:
    """A browser whose profile is in this folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split(" --"):
        options.add_argument("--" + flag.removeprefix("--"))
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    started.set_script_timeout(110)  # axe-core on the largest page, while other tests run
    return started


def show(
    browser: WebDriver, url: str, metrics: dict[str, Any] = DESKTOP, scheme: str = "light"
) -> None:
    """Open the page anew and wait until it is drawn."""
    browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    color_scheme(browser, scheme)
    browser.get(url)
    ready = "return document.documentElement.dataset.ready"
    WebDriverWait(browser, 20).until(lambda browser: browser.execute_script(ready))


def color_scheme(browser: WebDriver, scheme: str) -> None:
    """Prefer a color scheme, and no motion."""
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def logged(browser: WebDriver) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def screenshot(browser: WebDriver, path: Path) -> None:
    """Save a screenshot of the whole page."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    width = browser.execute_script("return innerWidth")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16_000), "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", options)
    path.write_bytes(base64.b64decode(shot["data"]))


def facts(place: WebDriver | WebElement) -> dict[str, str]:
    """The values that the explorer shows for the selected word, on the page or in a panel."""
    names, values = (place.find_elements(By.CSS_SELECTOR, f".word {t}") for t in ("dt", "dd"))
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


def words(place: WebDriver | WebElement) -> list[WebElement]:
    """The words of the explorer."""
    return place.find_elements(By.CSS_SELECTOR, ".words > *")


def contrasts(browser: WebDriver, selector: str = ".words > *") -> list[float]:
    """The contrast ratios (WCAG) of text and background, by default of the explorer's words."""
    script = """
        const light = (color) => {
          const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3)
            .map((v) => color.startsWith("rgb") ? v / 255 : +v)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        return [...document.querySelectorAll(arguments[0])].map((word) => {
          const { color, backgroundColor } = getComputedStyle(word);
          const [a, b] = [light(color), light(backgroundColor)].sort();
          return (b + 0.05) / (a + 0.05);
        });
    """
    return browser.execute_script(script, selector)


def barriers(browser: WebDriver) -> list[tuple[str, str, list[str]]]:
    """The accessibility problems that axe-core finds: rule, explanation and elements."""
    browser.execute_script(Path(os.environ["AXE_CORE"]).read_text())
    result = browser.execute_async_script(
        "const done = arguments[0]; axe.run({resultTypes: ['violations']})"
        ".then(done, error => done({error: String(error)}))"
    )
    assert "error" not in result, result
    assert len(result["passes"]) > 20
    return [
        (violation["id"], violation["help"], [node["html"][:200] for node in violation["nodes"]])
        for violation in result["violations"]
    ]
