"""Small random Lorsa modules, SAEs, attention layers and activations, for tests that need no language model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorsa_utils.activations import ActivationBatch, Part, own_rows
from lorsa_utils.config import LorsaConfig, RotaryConfig, SAEConfig
from lorsa_utils.lorsa import SAE, Lorsa, SparseModule
from lorsa_utils.models import AttentionSite
from lorsa_utils.text import Sequences

D_MODEL, N_HEADS, D_HEAD = 16, 2, 4
ROTARY = RotaryConfig(rope_type="default", rotary_dim=D_HEAD, theta=100.0)

Module = TypeVar("Module", bound=SparseModule)


@st.composite
def rotaries(draw: st.DrawFn, d_qk: int) -> RotaryConfig:
    """No rotation, full or partial, every scaling, both pairings; with an original context short enough to matter."""
    if d_qk < 2 or draw(st.integers(0, 4)) == 0:
        return RotaryConfig()
    return RotaryConfig(
        rope_type=draw(st.sampled_from(("default", "linear", "llama3"))),
        rotary_dim=2 * draw(st.integers(1, d_qk // 2)),
        theta=draw(st.sampled_from((10.0, 10000.0))),
        adjacent_pairs=draw(st.booleans()),
        factor=draw(st.sampled_from((2.0, 8.0))),
        low_freq_factor=1.0,
        high_freq_factor=draw(st.sampled_from((2.0, 4.0))),
        original_context=draw(st.sampled_from((4, 16, 64))),
    )


@st.composite
def lorsa_configs(draw: st.DrawFn) -> LorsaConfig:
    """Shapes from one head up, groups of one head included, k from 1 to all heads."""
    n_qk, group, d_qk = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return LorsaConfig(
        d_model=draw(st.integers(1, 7)),
        n_ov_heads=n_qk * group,
        n_qk_heads=n_qk,
        d_qk=d_qk,
        k=draw(st.integers(1, n_qk * group)),
        attn_scale=draw(st.sampled_from((0.0, 0.3, 1.0))),
        rotary=draw(rotaries(d_qk)),
        qk_norm=draw(st.booleans()),
        score=draw(st.sampled_from(("relu", "abs"))),
    )


def randomized(module: Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> Module:
    """The module with every parameter drawn anew, biases and norm gains included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.to(dtype)


def random_lorsa(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Lorsa:
    """24 heads in 3 groups on 16 dimensions, k 5."""
    config = LorsaConfig(d_model=D_MODEL, n_ov_heads=24, n_qk_heads=3, d_qk=D_HEAD, k=5, rotary=ROTARY)
    return randomized(Lorsa(config.replace(**changes)), seed, dtype)


def random_sae(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> SAE:
    """24 features on 16 dimensions, k 5."""
    return randomized(SAE(SAEConfig(d_model=D_MODEL, n_features=24, k=5).replace(**changes)), seed, dtype)


def random_inputs(
    batch: int, length: int, d_model: int = D_MODEL, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[batch, length, d_model] normal draws."""
    x = torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def toy_site(layer: int = 0) -> AttentionSite:
    """A random attention layer: 2 heads of width 4 on 16 dimensions, biases everywhere."""
    generator = torch.Generator().manual_seed(100 + layer)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    maps = {f"W_{name}": draw(N_HEADS, D_MODEL, D_HEAD) for name in "QKV"}
    biases = {f"b_{name}": draw(N_HEADS, D_HEAD) for name in "QKV"}
    return AttentionSite(
        attn_scale=D_HEAD**-0.5,
        rotary=ROTARY,
        W_O=draw(N_HEADS, D_HEAD, D_MODEL),
        b_O=draw(D_MODEL),
        layer=layer,
        **maps,
        **biases,
    )


class ToySource:
    """What `toy_site` layers read and write on random inputs; BOS and padding of uneven lengths do not count."""

    def __init__(
        self, n_sequences: int = 20, context: int = 12, layers: Sequence[int] = (0,), seed: int = 0, padded: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layers, self.n_sequences, self.context = tuple(layers), n_sequences, context
        self.tokens = torch.randint(0, 256, (n_sequences, context), generator=generator)
        ends = torch.full((n_sequences, 1), context)
        if padded:
            ends = torch.randint(2, context + 1, (n_sequences, 1), generator=generator)
        places = torch.arange(context)
        self.mask = (places > 0) & (places < ends)
        self.inputs = {layer: 3 * torch.randn(n_sequences, context, D_MODEL, generator=generator) for layer in layers}
        sites = {layer: toy_site(layer) for layer in layers}
        self.outputs = {
            layer: sites[layer].head_outputs(x).sum(dim=2) + sites[layer].b_O for layer, x in self.inputs.items()
        }
        self.n_tokens = int(self.mask.sum())

    def batches(
        self, batch_size: int, start: int = 0, layers: Sequence[int] | None = None, part: Part = (0, 1)
    ) -> Iterator[ActivationBatch]:
        chosen = self.layers if layers is None else layers
        for first in range(start, self.n_sequences, batch_size):
            batch = slice(first, first + batch_size)
            rows, mask = own_rows(self.mask[batch], part)
            inputs, outputs = (
                {layer: side[layer][batch][rows] for layer in chosen} for side in (self.inputs, self.outputs)
            )
            yield ActivationBatch(self.tokens[batch][rows], mask, inputs, outputs, self.mask[batch])

    def identity(self) -> dict[str, Any]:
        return {"model": "toy", "text_sha256": hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()}


def sequences_of(tokens: Tensor, mask: Tensor, bos_policy: str = "prepend") -> Sequences:
    """`Sequences` of given tokens, hashed as a text would be."""
    digest = hashlib.sha256(tokens.numpy().tobytes() + mask.numpy().tobytes() + bos_policy.encode()).hexdigest()
    return Sequences(tokens.to(torch.int32), mask, ["toy"] * len(tokens), bos_policy, digest)


def random_sequences(n: int, context: int, seed: int = 0, bos_policy: str = "prepend") -> Sequences:
    """Random byte tokens; BOS (256) in front, padding (258) on the right of every third sequence."""
    tokens = torch.randint(0, 256, (n, context), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(n, context, dtype=torch.bool)
    if bos_policy == "prepend":
        tokens[:, 0], mask[:, 0] = 256, False
    tokens[::3, context - 3 :], mask[::3, context - 3 :] = 258, False
    return sequences_of(tokens, mask, bos_policy)
