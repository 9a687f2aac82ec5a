"""Head pages in a real browser: what the pointer shows and the keyboard says is what the module computes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from browsing import Watched, keep_screenshot
from tiny_heads import DEAD, tiny_heads

from lorsa_utils.view import pages
from lorsa_utils.view.evidence import Context, Head

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[Head]:
    return list(tiny_heads(tmp_path_factory.mktemp("model")).evidence().heads([5, DEAD]))


def opened(tab: Watched, head: Head, folder: Path) -> Any:
    (folder / "page.html").write_text(pages.head_page(head), encoding="utf-8")
    return tab.open(folder / "page.html")


def value(text: str) -> float:
    return float(text.replace("−", "-").replace("+", "").replace(" %", ""))


def check_table(figure: Any, context: Context, column: int) -> None:
    """The table of sources shows the z pattern and the attention of one query."""
    i = column - context.n_before
    z, attention = context.z_pattern[i, : column + 1], context.attention[i, : column + 1]
    body, foot = (
        [[cell.inner_text() for cell in row.locator("td").all()] for row in figure.locator(f"{part} tr").all()]
        for part in ("tbody", "tfoot")
    )
    for row, source in zip(body, z.abs().argsort(descending=True, stable=True).tolist(), strict=False):
        shown_z, shown_a = value(row[2]), value(row[4]) / 100
        assert shown_z == pytest.approx(float(z[source]), abs=0.006)
        close = [number for number in range(len(z)) if abs(float(z[number]) - shown_z) < 0.006]
        assert any(abs(float(attention[number]) - shown_a) < 0.006 for number in close)
    whole = value(foot[-1][2])
    assert whole == pytest.approx(float(z.sum()), abs=0.006), "the last line is the activation before the selection"


def column_here(figure: Any) -> int:
    return int(figure.locator(".here").get_attribute("data-j"))


def test_hover_draws_the_z_pattern(browser: Any, heads: list[Head], tmp_path: Path) -> None:
    tab = Watched(browser)
    page = opened(tab, heads[0], tmp_path)
    for number in (0, len(heads[0].contexts) - 1):
        context, figure = heads[0].contexts[number], page.locator(f'[data-context="{number}"]')
        figure.scroll_into_view_if_needed()
        peak = context.n_before + context.peak
        check_table(figure, context, peak)
        tokens = figure.locator("[data-j][role=button]:visible").all()
        for token in tokens[:: max(1, len(tokens) // 3)]:
            token.hover()
            column = int(token.get_attribute("data-j"))
            assert "here" in token.get_attribute("class")
            check_table(figure, context, column)
            z = context.z_pattern[column - context.n_before, : column + 1]
            marked = {int(one.get_attribute("data-j")): one for one in figure.locator(".source").all()}
            shares = (z.abs() / z.abs().sum()).tolist()
            assert set(marked) >= {j for j, share in enumerate(shares) if share > 0.011}
            assert not set(marked) & {j for j, share in enumerate(shares) if share < 0.009}
            for j, one in marked.items():
                assert ("minus" in one.get_attribute("class")) == (float(z[j]) < 0)
                if one.get_attribute("data-z") or (shares[j] == max(shares) and shares[j] > 0.051):
                    assert value(one.get_attribute("data-z")) == pytest.approx(float(z[j]), abs=0.006)
        page.locator("h1").hover()
        check_table(figure, context, peak)
    keep_screenshot(page, "head_page_1200")
    assert not tab.problems
    assert not tab.left


def test_keyboard_and_screen_reader(browser: Any, heads: list[Head], tmp_path: Path) -> None:
    tab = Watched(browser)
    page = opened(tab, heads[0], tmp_path)
    context = heads[0].contexts[0]
    figure, live = page.locator('[data-context="0"]'), page.locator("#live")
    peak = context.n_before + context.peak
    stops = page.locator('.context [role=button][tabindex="0"]')
    assert stops.count() == len(heads[0].contexts), "one stop of the tab key for each context"
    figure.locator('[tabindex="0"][role=button]').focus()
    assert f"activation {float(context.activation[context.peak]):.2f}" in live.inner_text()
    page.keyboard.press("ArrowLeft")
    assert column_here(figure) == peak - 1
    check_table(figure, context, peak - 1)
    assert page.evaluate("document.activeElement.dataset.j") == str(peak - 1)
    page.keyboard.press("Home")
    assert context.n_before <= column_here(figure) < peak - 1
    page.keyboard.press("Escape")
    assert column_here(figure) == peak
    snapshot = page.locator("main").aria_snapshot()
    assert "radio" in snapshot
    assert f'group "1. activation {float(context.activation[context.peak]):.2f}"' in snapshot
    assert "columnheader" in snapshot
    assert not tab.problems


def test_attention_and_whole_contexts_can_be_asked_for(browser: Any, heads: list[Head], tmp_path: Path) -> None:
    page = opened(Watched(browser), heads[0], tmp_path)
    context, figure = heads[0].contexts[0], page.locator('[data-context="0"]')
    page.get_by_label("attention of its QK group").check()
    attention = context.attention[context.peak]
    for token in figure.locator("[data-z]").all():
        shown, column = value(token.get_attribute("data-z")) / 100, int(token.get_attribute("data-j"))
        assert shown == pytest.approx(float(attention[column]), abs=0.006)
    assert figure.locator(".far").first.is_hidden()
    figure.locator(".gap").first.click()
    assert figure.locator(".far").first.is_visible()
    other = page.locator('[data-context="1"]')
    assert other.locator(".far").first.is_hidden()
    page.get_by_label("whole contexts").check()
    assert other.locator(".far").first.is_visible()
    assert other.locator("[data-j]:visible").count() == len(heads[0].contexts[1].tokens)


@pytest.mark.parametrize("token", ["שלום", "\u202eabc", '"><script>alert(1)</script><img src=x onerror=alert(1)>'])
def test_token_text_stays_text(token: str, browser: Any, heads: list[Head], tmp_path: Path) -> None:
    contexts = [
        dataclasses.replace(one, tokens=[token if text else "" for text in one.tokens]) for one in heads[0].contexts
    ]
    head = dataclasses.replace(heads[0], contexts=contexts, raised=[(token, 1.0)] * 3, explanation=token)
    tab = Watched(browser)
    page = opened(tab, head, tmp_path)
    figure = page.locator('[data-context="0"]')
    figure.locator("[tabindex='0']").hover()
    shown = pages.visible(token)
    assert figure.locator(".here").inner_text() == shown
    assert figure.locator("tbody tr .word").first.inner_text() in (shown, "added up")
    assert page.locator(".card .word").first.inner_text() == shown
    assert page.locator("img").count() == 0
    assert not tab.problems, "a dialog would be one"
    assert not tab.left


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, True), (320, False)])
def test_fits_and_can_be_read(width: int, dark: bool, browser: Any, heads: list[Head], tmp_path: Path) -> None:
    for name, head in (("alive", heads[0]), ("dead", heads[1])):
        tab = Watched(browser, width, dark=dark)
        page = opened(tab, head, tmp_path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out to the right"
        assert worst_contrast(page) >= 4.5
        keep_screenshot(page, f"head_page_{name}_{width}_{'dark' if dark else 'light'}")
        assert not tab.problems
        page.close()


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ""];
  const texts = "h1, h2, p, td, th, caption, .t, .word, .soft, .gap, a, label, summary, figcaption";
  for (const element of document.querySelectorAll(texts)) {
    if (!element.checkVisibility() || !element.textContent.trim()) continue;
    const behind = [];
    for (let node = element; node; node = node.parentElement) behind.unshift(getComputedStyle(node).backgroundColor);
    const text = light(over([...behind, getComputedStyle(element).color])), back = light(over(behind));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 120)];
  }
  return worst;
}"""


def worst_contrast(page: Any) -> float:
    """The smallest ratio of luminance of text and its background (WCAG asks for 4.5)."""
    ratio, where = page.evaluate(CONTRAST)
    print(f"contrast {ratio:.2f} at {where}")
    return float(ratio)
