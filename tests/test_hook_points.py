"""The two hook points hold what TransformerLens has under their names (recorded by record_hook_points.py)."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import KINDS, random_tokens, save_tiny_model

from lorsa_utils.models import load_model

RECORDED = json.loads(Path(__file__).with_name("hook_points.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_input_and_output_are_those_of_transformer_lens(kind: str, tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path, kind), device="cpu")
    values = model.capture(random_tokens(1, 12), [1])[1]
    for hook, value in zip(("blocks.1.ln1.hook_out", "blocks.1.hook_attn_out"), values, strict=True):
        torch.testing.assert_close(value[0, -1], torch.tensor(RECORDED[kind][hook]), atol=2e-4, rtol=0)
