"""The planted model, built once for all tests of circuits."""

import planted
import pytest
import torch

from lorsa_utils.models import LanguageModel


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    with torch.no_grad():
        return planted.planted_model()
