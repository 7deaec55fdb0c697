"""The page for people, in a real browser: a picture is chosen, or dropped, and the answer is seen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

from edge_client.inference.pictures import Pixels
from export.flavours import Flavour
from tests.conftest import wait_until
from tests.edge_client.inference.exported import CLASSES
from tests.edge_client.inference.serving import Serving, encoded, serving, text

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (apt install chromium-driver)"
)

DROP = """
const data = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)), files = new DataTransfer();
files.items.add(new File([data], "dropped.jpg", { type: "image/jpeg" }));
document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
"""


@pytest.fixture(scope="module")
def service(models: dict[Flavour, Path]) -> Iterator[Serving]:
    with serving(models["int8"], "--max-megapixels", "1") as started:
        yield started


@pytest.fixture
def browser(service: Serving, tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(executable_path=DRIVER))
    try:
        driver.get(service.url)
        yield driver
        severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert [message for message in severe if "the server responded with a status of 413" not in message] == []
    finally:
        driver.quit()


def said(browser: Chrome) -> str:
    return browser.find_element(By.ID, "said").text


def test_a_picture_that_is_chosen_is_answered_with_bars(
    browser: Chrome, service: Serving, photograph: Pixels, tmp_path: Path
) -> None:
    Image.fromarray(photograph).save(tmp_path / "pagoda.png")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "pagoda.png"))
    wait_until(lambda: " ms" in said(browser), 30, "an answer")
    rows = browser.find_elements(By.CSS_SELECTOR, "#answer tr")
    names = [row.find_element(By.TAG_NAME, "td").text for row in rows]
    (best,) = service.form(encoded(photograph, "PNG"))[1]["answers"][0]["labels"]
    assert sorted(names) == sorted(CLASSES)
    assert names[0] == best
    assert said(browser).startswith(f"{best}, in ")
    shares = [float(bar.get_attribute("value")) for bar in browser.find_elements(By.CSS_SELECTOR, "#answer meter")]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0, abs=0.01)
    assert browser.find_element(By.ID, "shown").is_displayed()


def test_a_picture_that_is_dropped_is_answered(browser: Chrome, photograph: Pixels) -> None:
    browser.execute_script(DROP, text(encoded(photograph)))
    wait_until(lambda: " ms" in said(browser), 30, "an answer")
    assert browser.find_element(By.ID, "shown").get_attribute("alt") == "dropped.jpg"


def test_a_picture_that_is_refused_says_why(browser: Chrome, tmp_path: Path) -> None:
    Image.new("RGB", (1200, 1000)).save(tmp_path / "large.png")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "large.png"))
    wait_until(lambda: "at most 1 million are taken" in said(browser), 30, "the reason")
    assert browser.find_element(By.ID, "said").get_attribute("class") == "error"


def test_the_page_for_programs_shows_the_description(browser: Chrome) -> None:
    browser.find_element(By.LINK_TEXT, "For programs").click()
    wait_until(lambda: "POST /v1/classify" in browser.find_element(By.TAG_NAME, "body").text, 30, "the description")
    assert "GET /readyz" in browser.find_element(By.TAG_NAME, "body").text
