"""A real browser for tests: Debian's chromium or any Chrome, through Playwright.

Its tests are skipped where there is none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)


def find_browser() -> str | None:
    """The path of a Chrome or Chromium."""
    found = [shutil.which(name) for name in NAMES] + [place for place in PLACES if Path(place).exists()]
    return next(filter(None, found), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A running browser; the test is skipped, with the reason, where there is none."""
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chrome or Chromium here; install chromium")
    reason = "playwright is not installed; pip install 'lorsa-utils[dev]'"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


class Watched:
    """A tab that remembers what went wrong in it and what it asked for."""

    def __init__(self, browser: Any, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, file: Path) -> Any:
        """Open a file from the disk."""
        self.page.goto(file.resolve().as_uri())
        return self.page

    @property
    def left(self) -> list[str]:
        """Requests that were not for files of this disk."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]


def keep_screenshot(page: Any, name: str, full: bool = False) -> None:
    """Keep a picture for people to look at, in build/screenshots or where LORSA_SCREENSHOTS says."""
    folder = Path(os.environ.get("LORSA_SCREENSHOTS") or Path(__file__).resolve().parents[1] / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=full)
