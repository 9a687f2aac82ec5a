"""JupyterLab for tests: a server of its own, a notebook run in it, and the explorer used as a person would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import Watched, keep_screenshot

from lorsa_utils import store

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "for-this-test"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are drawn too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def open_lab(folder: Path) -> Iterator[str]:
    """A JupyterLab of its own on a free port; yields its address."""
    for name, content in SETTINGS.items():
        store.write_json(folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings", content)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    options += ["--ip=127.0.0.1", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    names = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    places = dict(zip((*names, "IPYTHONDIR"), ("settings", "workspaces", "config", "runtime", "ipython"), strict=True))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {name: str(folder / place) for name, place in places.items()} | {"PYTHONPATH": path}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        wait_until_up(port, server, folder / "lab.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def wait_until_up(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", timeout=2)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    pytest.fail("JupyterLab did not start: " + log.read_text()[-2000:])


def run_all(browser: Any, address: str, name: str, minutes: float) -> Watched:
    """Open a notebook, run all its cells, and wait for the last one."""
    tab = Watched(browser, 1300, 1000)
    page = tab.page
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'", timeout=120_000
    )
    failed = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
    run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
    page.evaluate(f"() => {{ window.done = false; {run}.then(() => {{ window.done = true; }}); }}")
    page.wait_for_function(f"() => window.done || {failed}", timeout=60_000 * minutes)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.count() == 0, errors.first.inner_text()
    return tab


def explore(page: Any) -> None:
    """Use every panel as a person would, and read what changed."""
    heads = page.locator(".lorsa-mono select")
    heads.scroll_into_view_if_needed()
    before = heads.locator("option").all_inner_texts()
    heads.select_option(index=1)
    chosen = before[1].split()[0]
    line = page.locator(".lorsa .line").first
    page.locator(".lorsa p", has_text=f"Head {chosen} at").first.wait_for(timeout=20_000)

    slider = page.locator(".widget-slider", has_text="token").locator(".noUi-handle")
    position = int(page.locator(".widget-slider", has_text="token").locator(".widget-readout").inner_text())
    here = line.locator(".here").inner_text()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    moved = "before => document.querySelector('.lorsa .line .here')?.innerText !== before"
    page.wait_for_function(moved, arg=here, timeout=20_000)
    assert int(page.locator(".widget-slider", has_text="token").locator(".widget-readout").inner_text()) == position - 2

    sentence = page.locator(".widget-textarea textarea")
    sentence.fill("")
    sentence.press_sequentially("A zebra ran. A zebra", delay=20)
    tokens = "[...document.querySelectorAll('.lorsa .line .t')].map((token) => token.innerText).join('')"
    page.wait_for_function(f"() => {tokens}.replaceAll('␣', ' ').endsWith('A zebra ran. A zebra')", timeout=20_000)
    keep_screenshot(page, "explorer_live")

    firing = page.locator(".lorsa", has_text="Most active there").locator("tr")
    strongest = firing.nth(1).locator("td").first.inner_text()
    field = page.locator(".widget-text", has_text="head").locator("input[type=number]").first
    field.fill(strongest)
    field.press("Enter")
    page.locator(".lorsa p", has_text=f"Head {strongest} at").first.wait_for(timeout=20_000)
    scale = page.locator(".widget-slider", has_text="scale").locator(".noUi-handle")
    scale.scroll_into_view_if_needed()
    panel = page.locator(".lorsa", has_text="next token after")
    assert "times 0," in panel.inner_text()

    def rows_at(presses: int, scale_now: int) -> list[list[str]]:
        for _ in range(presses):
            scale.press("ArrowRight")
        page.locator(".lorsa p", has_text=f"times {scale_now},").first.wait_for(timeout=20_000)
        return [row.locator("td").all_inner_texts() for row in panel.locator("tr").all()[1:]]

    untouched = rows_at(2, 1)
    assert untouched
    assert all(cells[1] == cells[2] for cells in untouched), "scale 1 is the untouched model"
    changed = rows_at(8, 5)
    assert any(cells[1] != cells[2] for cells in changed), "an active head matters when written five times as strongly"
    keep_screenshot(page, "explorer_steering")
