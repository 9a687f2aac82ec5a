"""Figures as a browser lays them out."""

from pathlib import Path
from typing import Any

import pytest
from browsing import Watched

from lorsa_utils.view import figures

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("middle", ["local", "subtoken_induction"])
def test_long_names_do_not_run_into_the_axis_title(middle: str, browser: Any, tmp_path: Path) -> None:
    names = ["a", "attention_sink", "induction", middle, "previous_token", "b"]
    figure = figures.new_figure("P12: families", "MHSA head", "family")
    figure.add_heatmap(z=[[0.9, 0.1]] * len(names), y=[f"{name} (166 heads)" for name in names])
    saved = figures.save_figure(figure, "P12_family_map", tmp_path)
    page = Watched(browser).open(saved)
    page.locator(".ytitle").wait_for(timeout=30_000)
    right_of_title = page.locator(".ytitle").evaluate("node => node.getBoundingClientRect().right")
    left_of_names = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.ytick text')].map(node => node.getBoundingClientRect().left))"
    )
    assert 0 < right_of_title < left_of_names
