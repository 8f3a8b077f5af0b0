"""The documentation as a browser shows it: no error in the console, pictures and links there, search finds."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

pytest.importorskip("selenium", reason="needs the site and a browser: make docs")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 120  # for what a browser does; only a hang takes as long
SITE = Path(os.environ.get("SITE", "site"))
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html")) if SITE.exists() else []
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,1024"
)

if not PAGES:
    pytest.skip("there is no site: make docs", allow_module_level=True)
if CHROMIUM is None or DRIVER is None:
    pytest.skip("there is no chromium with its driver", allow_module_level=True)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(SITE)))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    serving.join(SECONDS)
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


def errors_of(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_with_its_pictures_and_no_error_in_the_console(browser: Any, address: str, page: str) -> None:
    browser.get(address + page)
    assert browser.find_elements(By.TAG_NAME, "h1")
    broken = browser.execute_script(
        "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)"
    )
    assert broken == []
    outside = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
    )
    assert [name for name in outside if not name.startswith("data:")] == []
    assert errors_of(browser) == []


@pytest.mark.parametrize("words", ["headroom", "bump_version", "DropLazily", "CapacityError"])
def test_search_finds_a_page_for_words_of_the_library(browser: Any, address: str, words: str) -> None:
    browser.get(address + "index.html")
    box = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    browser.execute_script("document.querySelector('#__search').click()")
    WebDriverWait(browser, SECONDS).until(lambda _: box.is_displayed())
    box.send_keys(words)
    box.send_keys(Keys.SPACE)
    # Addresses, read at one moment: the page draws the results anew as words come in, and an element found may be gone.
    found = WebDriverWait(browser, SECONDS).until(
        lambda driver: driver.execute_script(
            "return [...document.querySelectorAll('.md-search-result__item a')].map(link => link.href)"
        )
    )
    assert urlsplit(found[0]).path.endswith(".html")
    assert errors_of(browser) == []


@pytest.mark.parametrize("page", PAGES)
def test_pictures_say_in_words_what_they_show(page: str) -> None:
    pictures = re.findall(r"<img\b[^>]*>", (SITE / page).read_text("utf-8"))
    assert [picture for picture in pictures if not re.search(r'\balt="[^"]+"', picture)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    source = (SITE / page).read_text("utf-8")
    broken = []
    for link in re.findall(r'(?:href|src)="([^"]+)"', source):
        target, anchor = urldefrag(link)
        if urlsplit(link).scheme or (page == "404.html" and link.startswith("/")):
            continue
        path = SITE / unquote(urljoin("/" + page, target)).lstrip("/") if target else SITE / page
        if path.is_dir():
            path /= "index.html"
        if not path.exists() or (anchor and f'id="{anchor}"' not in path.read_text("utf-8")):
            broken.append(link)
    assert broken == []
