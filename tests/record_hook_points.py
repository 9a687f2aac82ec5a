"""Write hook_points.json: what TransformerLens reads and writes at layer 1 of the tiny models.

TransformerLens is no dependency. To record again, in a copy of the environment:
`pip install transformer-lens==4.3.0; python tests/record_hook_points.py`.
"""

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
from tiny_models import KINDS, random_tokens, save_tiny_model
from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

HOOKS = ("blocks.1.ln1.hook_out", "blocks.1.hook_attn_out")


def last_position(folder: Path) -> dict[str, list[float]]:
    """[d_model] values at the last of twelve tokens, by hook point."""
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        values = bridge.run_with_cache(random_tokens(1, 12))[1]
    return {hook: [round(value, 5) for value in values[hook][0, -1].tolist()] for hook in HOOKS}


if __name__ == "__main__":
    recorded: dict[str, object] = {"transformer-lens": importlib.metadata.version("transformer-lens")}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            recorded[kind] = last_position(save_tiny_model(Path(folder), kind))
    Path(__file__).with_name("hook_points.json").write_text(json.dumps(recorded) + "\n", encoding="utf-8")
