"""A headless Chromium for the tests, or the reason why there is none."""

import shutil
from contextlib import contextmanager

import pytest

ARGUMENTS = [
    "--no-sandbox",
    # Otherwise it calls on its maker's servers by itself.
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    # A sandboxed frame stays sandboxed; a process of its own takes longer to start than a test.
    "--disable-features=IsolateSandboxedIframes",
]


@contextmanager
def chromium():
    """A browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("Chromium is not installed (README names the package)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
