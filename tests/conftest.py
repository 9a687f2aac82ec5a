"""Shared by all tests: one thread per worker, property tests without a deadline, kernels without a GPU."""

import os

import pytest
from hypothesis import settings

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # before torch is loaded, and inherited by the processes that tests start

import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)

# Triton reads this when it is loaded, so it is set before anything may load it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# In CI the same examples every time, so that a failure there is the fault of the change.
settings.register_profile("kit", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("kit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the notebooks before all, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("notebooks" not in item.path.parts, item.path not in slow))
