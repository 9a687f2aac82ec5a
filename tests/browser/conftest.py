"""Shared by the browser tests: one running browser for each file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as running:
        yield running
