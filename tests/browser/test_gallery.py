"""The gallery in a real browser: every picture is drawn, every link leads somewhere, nothing leaves the disk."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from browsing import Watched, keep_screenshot
from tiny_heads import tiny_heads

from lorsa_utils.kit import notebook
from lorsa_utils.view import figures, gallery, pages

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("images", [True, False])
def test_pictures_and_links(images: bool, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LORSA_STATIC_IMAGES", "1")
    figures.can_draw_png.cache_clear()
    if not images:
        monkeypatch.setattr("lorsa_utils.view.figures.draw_png", lambda figure: None)
    run = notebook.start("06_head_explorer", "smoke", tmp_path / "run")
    for label in ("P4_layer_fvu", "P5_table", "more"):
        run.show(go.Figure(go.Scatter(x=[1, 2], y=[3, 4])), label, f"Caption of {label}.")
    tiny = tiny_heads(tmp_path / "model")
    chosen = [1, 5]
    pages.write_pages(tiny.evidence().heads(chosen), run.folder / "heads", chosen)
    run.record("x", 1.0)
    for width in (1200, 400) if images else (400,):
        tab = Watched(browser, width)
        page = tab.open(gallery.write_index(run.folder, "smoke"))
        for plate in page.locator("figure.plate").all():
            plate.scroll_into_view_if_needed()
            if images:
                image = plate.locator("img").element_handle()
                page.wait_for_function("image => image.complete && image.naturalWidth > 300", arg=image)
            else:
                plate.frame_locator("iframe").locator(".main-svg").first.wait_for(timeout=30_000)
        assert page.locator("figure.plate").count() == 3
        assert page.locator("iframe").count() == (0 if images else 3)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        keep_screenshot(page, f"gallery_{'images' if images else 'frames'}_{width}")
        assert not tab.problems
        assert not tab.left
    links = {link.evaluate("link => link.href") for link in page.locator("a").all()}
    files = {link: Path(link.removeprefix("file://")) for link in links if "#" not in link}
    assert len([link for link in files if "/heads/" in link]) == 2
    assert all(file.is_file() for file in files.values())
    for link in [link for link in sorted(files) if link.endswith(".html")] if images else []:
        other = Watched(browser)
        other.page.goto(link)
        assert other.page.locator("h1, .plotly-graph-div").count()
        assert not other.problems, link
        assert not other.left
