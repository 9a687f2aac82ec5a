"""How well a module rebuilds an attention layer.

    FVU            = sum_t ||y_t - yhat_t||^2 / sum_t ||y_t - mean(y)||^2     (the paper's "normalised MSE" family)
    FVU token mean = mean_t ( ||y_t - yhat_t||^2 / ||y_t - mean(y)||^2 )
    L0             = mean number of active heads per token
    dead fraction  = share of heads never active in the evaluated tokens (their number is always given beside it)
    CE recovered   = (CE mean-ablated - CE with module) / (CE mean-ablated - CE original), cross-entropy in nats per
                   token

Sums run in float64 over the tokens of the mask (no BOS, no padding), so results do not depend on batch size or padding.
mean(y) is over the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorsa_utils.activations import ActivationSource
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SparseModule, SparseOutput
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences


class Mean:
    """Running mean over counted tokens, in float64: of a layer's output [d_model] or of a loss."""

    def __init__(self) -> None:
        self.sum, self.count = torch.zeros((), dtype=torch.float64), 0

    def update(self, values: Tensor, mask: Tensor) -> None:
        """Add values [batch, length, ...] where mask [batch, length]."""
        self.sum = self.sum + values[mask].double().sum(dim=0).cpu()
        self.count += int(mask.sum())

    def value(self) -> Tensor:
        """The mean; UserError if no token was counted."""
        if self.count == 0:
            raise UserError("There is not one counted token in this text; give a longer text.")
        return self.sum / self.count


class Reconstruction:
    """Running sums of FVU, cosine, L0 and dead units against a fixed mean target."""

    def __init__(self, mean: Tensor, n_units: int) -> None:
        self.mean = mean
        self.sums = torch.zeros(5, dtype=torch.float64)  # error, deviation, their ratio, cosine, active units
        self.n_tokens = 0
        self.fired = torch.zeros(n_units, dtype=torch.long)

    def update(self, y: Tensor, output: SparseOutput, mask: Tensor) -> None:
        """Add targets y [batch, length, d_model] and the module's output where mask [batch, length]."""
        target, predicted = y[mask].double(), output.y[mask].double()
        error = (target - predicted).square().sum(dim=-1)
        deviation = (target - self.mean.to(target.device)).square().sum(dim=-1)
        ratio = error / deviation.clamp_min(torch.finfo(torch.float64).tiny)
        cosine = torch.nn.functional.cosine_similarity(target, predicted, dim=-1)
        indices, active = output.indices[mask], output.values[mask] != 0
        self.sums += torch.stack([side.sum().double() for side in (error, deviation, ratio, cosine, active)]).cpu()
        self.fired += torch.bincount(indices[active].cpu(), minlength=len(self.fired))
        self.n_tokens += int(mask.sum())

    def result(self) -> dict[str, float]:
        """`fvu`, `fvu_token_mean`, `cosine`, `l0`, `dead_fraction`, `n_tokens`.

        Raises:
            UserError: no token was counted, or all targets are equal.
        """
        error, deviation, ratio, cosine, active = self.sums.tolist()
        if self.n_tokens == 0 or deviation == 0:
            raise UserError(
                "FVU is undefined: the text has no two counted tokens with different targets; give a longer text."
            )
        return {
            "fvu": error / deviation,
            "fvu_token_mean": ratio / self.n_tokens,
            "cosine": cosine / self.n_tokens,
            "l0": active / self.n_tokens,
            "dead_fraction": float((self.fired == 0).double().mean()),
            "n_tokens": self.n_tokens,
        }


@torch.no_grad()
def evaluate_activations(
    modules: Mapping[str, tuple[int, SparseModule]], source: ActivationSource, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """`Reconstruction.result` by name on held-out activations; `modules` gives layer and module by name.

    The source is read twice, first for the mean target.
    """
    layers = sorted({layer for layer, _ in modules.values()})
    means = {layer: Mean() for layer in layers}
    for batch in source.batches(batch_size, layers=layers):
        for layer in layers:
            means[layer].update(batch.outputs[layer], batch.mask)
    sums = {name: Reconstruction(means[layer].value(), module.n_units) for name, (layer, module) in modules.items()}
    for batch in source.batches(batch_size, layers=layers):
        for name, (layer, module) in modules.items():
            x = module.input_from(batch.inputs[layer], batch.outputs[layer]).to(module.b_O)
            sums[name].update(batch.outputs[layer].to(x.device), module(x), batch.mask.to(x.device))
    return {name: running.result() for name, running in sums.items()}


KEYS = (
    *("fvu", "fvu_token_mean", "ce", "ce_spliced", "ce_mean_ablated", "ce_recovered"),
    *("l0", "dead_fraction", "n_tokens", "cosine"),
)


@torch.no_grad()
def evaluate(
    module: SparseModule,
    layer: int,
    model: LanguageModel,
    sequences: Sequences,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Any]:
    """What `lorsa eval` prints: reconstruction, and the model's loss with the layer's output replaced.

    Three passes: the model untouched, with the module, and with the mean target spliced in. Positions that are not
    counted (BOS, padding) keep their original output.

    Returns `KEYS`, losses in nats per token; None for a number that is not finite.

    Raises:
        UserError: no token is counted, or the layer makes no difference on this text.
    """
    batches = list(sequences.batches(batch_size, model.device))
    target, mask = Mean(), torch.empty(0)

    def loss(replacement: Any) -> float:
        nonlocal mask
        losses = Mean()
        with model.splice({layer: replacement}):
            for tokens, mask in batches:
                losses.update(*model.loss(tokens, mask))
                bar.update()
        return float(losses.value())

    def observe(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        target.update(attn_output, mask)
        return attn_output

    def replace(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        output = module(module.input_from(attn_input, attn_output).to(module.b_O.dtype))
        sums.update(attn_output, output, mask)
        return torch.where(mask[..., None], output.y.to(attn_output.dtype), attn_output)

    def ablate(attn_input: Tensor, attn_output: Tensor) -> Tensor:
        return torch.where(mask[..., None], mean.to(attn_output), attn_output)

    with tqdm(total=3 * len(batches), unit="batch", desc="eval", disable=not progress) as bar:
        original = loss(observe)
        mean = target.value()
        sums = Reconstruction(mean, module.n_units)
        spliced, ablated = loss(replace), loss(ablate)
    gap = ablated - original
    if gap == 0:
        raise UserError(
            f"Replacing layer {layer} by its mean does not change the loss on this text at all; give a longer text."
        )
    result = sums.result() | {"ce": original, "ce_spliced": spliced, "ce_mean_ablated": ablated}
    result["ce_recovered"] = (ablated - spliced) / gap
    return {key: result[key] if math.isfinite(result[key]) else None for key in KEYS}
