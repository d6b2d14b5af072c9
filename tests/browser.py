"""Headless Chromium, where there is one: pages as people see them.

Playwright drives the browser of the system (Debian: apt-get install chromium) and comes with
`setup_also=browser bash launch/setup.sh`; without either the tests that need it are skipped.
"""

import shutil
from contextlib import contextmanager

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium():
    """A browser of Playwright's, or the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"there is none of {', '.join(_NAMES)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def seen(browser, address, *, width, dark=False):
    """The page of an address; it must say no error and ask nobody else."""
    scheme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda one: one.type in ("error", "warning") and faults.append(one.text))
    page.on("request", lambda one: one.url.startswith((address, "data:")) or faults.append(one.url))
    page.goto(address)
    yield page
    page.close()
    assert not faults


def check_reading(frame):
    """In a page or frame nothing that axe-core calls serious, nothing wider than the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(frame).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not [(one["help"], [node["target"] for node in one["nodes"]]) for one in serious]
    assert frame.evaluate("document.documentElement.scrollWidth <= innerWidth")
