"""Shared by these tests: one tiny model with a Lorsa and text."""

import pytest
from tiny_heads import Tiny, tiny_heads


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_heads(tmp_path_factory.mktemp("model"))
