"""How Lorsa heads relate to the MHSA heads of the same layer (paper items P12, P13 and P15).

P12. How much of what a Lorsa head writes comes from each MHSA head? With write direction w_o (norm 1), activation z_t
and the output o_tm of MHSA head m minus its mean over text (which Lorsa holds in its bias),

    c_m = sum_t z_t o_tm . w_o        share_m = max(c_m, 0) / sum_m' max(c_m', 0)

MHSA heads that write against the Lorsa head (c_m < 0) get the share 0.

P13. How alike are two patterns? overlap(A, B) = mean over queries of sum_j min(A_ij, B_ij), from 0 (no common source)
to 1 (equal). Most patterns rest on the first token, so it can be left out. The baseline is another layer's MHSA heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lorsa_utils import ops
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.prompts import PromptSet
from lorsa_utils.heads.units import MHSAHeads, by_pair
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite, LanguageModel
from lorsa_utils.text import Sequences


class Shares(NamedTuple):
    """Where Lorsa heads come from (c_m as in the module docstring), each [n_lorsa_heads]."""

    shares: Tensor
    """[n_lorsa_heads, n_mhsa_heads], rows sum to 1 or are NaN (no MHSA head writes along)."""
    against: Tensor
    """Sum of max(-c_m, 0) / sum of abs(c_m)."""
    captured: Tensor
    """Sum of c_m / sum of z_t^2: 1 when MHSA heads together write what it does."""
    n_active: Tensor
    """Tokens where it is active."""


@torch.no_grad()
def mhsa_shares(
    model: LanguageModel,
    layer: int,
    lorsa: Lorsa,
    mean_values: Tensor,
    sequences: Sequences,
    exchanged: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Shares:
    """Split the output of every Lorsa head over the MHSA heads, on counted tokens.

    `mean_values` [n_heads, d_head] are those of `units.mean_head_values`. `exchanged` is the seed of the null: it
    permutes write directions among the Lorsa heads.
    """
    heads = MHSAHeads(model.site(layer), mean_values)
    directions, norms = normalize(lorsa.W_O.detach(), dim=1), lorsa.W_O.norm(dim=1)
    if exchanged is not None:
        order = torch.randperm(len(directions), generator=torch.Generator().manual_seed(exchanged))
        directions = directions[order.to(directions.device)]
    parts = torch.zeros(lorsa.n_units, heads.n, dtype=torch.float64)
    squares, active = torch.zeros(lorsa.n_units, dtype=torch.float64), torch.zeros(lorsa.n_units, dtype=torch.long)
    n_batches = -(-len(sequences.tokens) // batch_size)
    batches = sequences.batches(batch_size, model.device)
    for tokens, masks in tqdm(batches, total=n_batches, desc="shares", disable=not progress):
        x = model.capture(tokens, [layer])[layer][0].float()
        indices, values = lorsa.encode(x)
        outputs = heads.outputs(x)
        for place, mask in enumerate(masks):
            # One sequence at a time, because its write directions are [n_tokens, k, d_model].
            chosen, z = indices[place, mask], values[place, mask] * norms[indices[place, mask]]
            along = torch.einsum("tmd,tkd->tkm", outputs[place, mask], directions[chosen]) * z[..., None]
            parts.index_add_(0, chosen.flatten().cpu(), along.flatten(0, 1).double().cpu())
            squares.index_add_(0, chosen.flatten().cpu(), z.flatten().double().square().cpu())
            active += torch.bincount(chosen[z > 0].cpu(), minlength=lorsa.n_units)
    positive = parts.clamp_min(0)
    against = (positive.sum(dim=1) - parts.sum(dim=1)) / parts.abs().sum(dim=1)
    return Shares(positive / positive.sum(dim=1, keepdim=True), against, parts.sum(dim=1) / squares, active)


def heads_needed(shares: Tensor, threshold: float) -> Tensor:
    """Smallest number of MHSA heads whose shares [n, n_mhsa_heads] (no NaN) sum to `threshold`, [n]."""
    if not 0 < threshold <= 1:
        raise UserError(f"The threshold is a share between 0 and 1, not {threshold}.")
    reached = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
    return (reached < threshold - 1e-9).sum(dim=1).clamp_max(shares.shape[1] - 1) + 1


# ---- one unit, causally checked


def on_labelled(prompts: PromptSet) -> Sequences:
    """Prompts as sequences in which labelled positions and the token after each (for its loss) count."""
    mask = torch.zeros(prompts.tokens.shape, dtype=torch.bool)
    rows, positions = prompts.row[prompts.positive], prompts.position[prompts.positive]
    mask[rows, positions] = True
    mask[rows, (positions + 1).clamp_max(mask.shape[1] - 1)] = True
    labelled = mask.any(dim=1)
    sources = [prompts.family] * int(labelled.sum())
    return Sequences(prompts.tokens[labelled].int(), mask[labelled], sources, "prompts", "")


@torch.no_grad()
def unit_effects(
    model: LanguageModel,
    layer: int,
    lorsa: Lorsa,
    head: int,
    mhsa_heads: Sequence[int],
    mean_values: Tensor,
    sequences: Sequences,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Is a Lorsa head what some MHSA heads compute together? Remove, where it is active, their parts along its w_o.

    One row per removal: each of `mhsa_heads` (those with the largest shares) alone, all of them, all MHSA heads of the
    layer, and the Lorsa head. `mean_values` as in `mhsa_shares`.

    Columns: `removed`, `written` (mean removed along w_o, over active tokens), `effect` (mean change of the next
    token's loss there, in nats), `error` (its standard error over sequences) and `n` (active tokens).

    Raises:
        UserError: the head is not active in this text.
    """
    heads = MHSAHeads(model.site(layer), mean_values)
    direction, norm = normalize(lorsa.W_O[head], dim=0), lorsa.W_O[head].norm()
    removals = {f"MHSA {index}": [index] for index in mhsa_heads}
    removals["MHSA " + " + ".join(map(str, mhsa_heads))] = list(mhsa_heads)
    removals |= {"all MHSA heads": list(range(heads.n)), "the Lorsa head": []}
    changes: dict[str, list[Tensor]] = {name: [] for name in removals}
    written: dict[str, list[Tensor]] = {name: [] for name in removals}
    numbers: list[Tensor] = []
    for first, (tokens, mask) in enumerate(sequences.batches(batch_size, model.device)):
        residual = model.residual(tokens, layer)  # blocks before the layer do the same in every pass
        with model.resume(layer, residual):
            x = model.capture(tokens, [layer])[layer][0].float()
        with model.resume(layer, residual):
            untouched, counted = model.loss(tokens, mask)
        indices, values = lorsa.encode(x)
        z = (values * (indices == head)).sum(dim=-1) * norm * mask
        outputs, here = heads.outputs(x), (z > 0)[:, :-1] & counted
        numbers.append(first * batch_size + here.nonzero()[:, 0].cpu())
        for name, chosen in removals.items():
            part = (outputs[:, :, chosen].sum(dim=2) @ direction) * (z > 0) if chosen else z
            removed = part[..., None] * direction

            def remove(x: Tensor, y: Tensor, removed: Tensor = removed) -> Tensor:
                return y - removed.to(y.dtype)

            with model.splice({layer: remove}), model.resume(layer, residual):
                losses, _ = model.loss(tokens, mask)
            changes[name].append((losses - untouched)[here].double().cpu())
            written[name].append(part[:, :-1][here].cpu())
    sequence = torch.cat(numbers) if numbers else torch.zeros(0)
    if not len(sequence):
        raise UserError(f"Lorsa head {head} is not active in this text; give sequences from its top contexts.")
    rows = [_effect(name, torch.cat(changes[name]), torch.cat(written[name]), sequence) for name in removals]
    return pd.DataFrame(rows)


def _effect(removed: str, change: Tensor, written: Tensor, sequence: Tensor) -> dict[str, Any]:
    """A row of `unit_effects`, from values at each active token [n]."""
    means = by_pair(change[:, None], sequence)[:, 0]
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    sizes = {"written": float(written.mean()), "effect": float(change.mean()), "error": error}
    return {"removed": removed, **sizes, "n": len(change)}


# ---- patterns


def overlap(patterns: Tensor, others: Tensor, counted: Tensor, without_first: bool = False) -> Tensor:
    """Overlap of every pattern [n, length, length] with every one of `others`, mean over counted queries, [n, m].

    `without_first` leaves the first token out and renormalises.
    """
    patterns, others = patterns[:, counted], others[:, counted]
    if without_first:
        patterns, others = (
            side[:, :, 1:] / side[:, :, 1:].sum(dim=2, keepdim=True).clamp_min(1e-12) for side in (patterns, others)
        )
    return torch.stack([torch.minimum(patterns, pattern).sum(dim=2).mean(dim=1) for pattern in others], dim=1)


@torch.no_grad()
def pattern_overlaps(
    model: LanguageModel,
    layer: int,
    patterns_of: Lorsa | AttentionSite,
    against: int,
    sequences: Sequences,
    without_first: bool = False,
) -> Tensor:
    """Mean overlap of each QK group (or MHSA head) at `layer` with each MHSA head of layer `against`, [n, n_heads].

    Some dozens of sequences are enough.
    """
    site = model.site(against)
    total, weight = torch.zeros(()), 0
    for tokens, mask in sequences.batches(1, model.device):
        inputs = {number: sides[0].float() for number, sides in model.capture(tokens, sorted({layer, against})).items()}
        patterns, others = _patterns(patterns_of, inputs[layer]), site.pattern(inputs[against])[0]
        n = int(mask.sum())
        total, weight = total + n * overlap(patterns, others, mask[0], without_first).cpu(), weight + n
    return total / weight


def _patterns(patterns_of: Lorsa | AttentionSite, x: Tensor) -> Tensor:
    """For one sequence x [1, length, d_model]: [n, length, length]."""
    if isinstance(patterns_of, Lorsa):
        q, k = patterns_of.queries_keys(x)
        return ops.attention_pattern(q[0], k[0], patterns_of.attn_scale)
    return patterns_of.pattern(x)[0]


@torch.no_grad()
def attention_on_sources(
    model: LanguageModel, layer: int, patterns_of: Lorsa | AttentionSite, prompts: PromptSet
) -> Tensor:
    """Mean attention of each QK group (or MHSA head) from labelled positions to the predicted sources, [n]."""
    per_query = []
    for number in prompts.row[prompts.positive].unique().tolist():
        x = model.capture(prompts.tokens[[number]].to(model.device), [layer])[layer][0].float()
        queries = prompts.positive & (prompts.row == number)
        pattern = _patterns(patterns_of, x).cpu()[:, prompts.position[queries]]
        per_query.append((pattern * prompts.sources[queries]).sum(dim=2).T)
    return torch.cat(per_query).mean(dim=0)


@torch.no_grad()
def qk_singular_values(circuits: Lorsa | AttentionSite) -> Tensor:
    """Singular values of W_Q W_K^T of every QK circuit, largest first, [n_circuits, d_qk] (paper item P15).

    Without RoPE, which changes the product between tokens at a distance. Gains of a QK norm are multiplied in.
    """
    W_Q, W_K = circuits.W_Q, circuits.W_K
    if isinstance(circuits, AttentionSite):
        if circuits.q_norm_weight is not None and circuits.k_norm_weight is not None:
            W_Q, W_K = W_Q * circuits.q_norm_weight, W_K * circuits.k_norm_weight
        W_K = circuits.expand_kv(W_K)
    elif circuits.config.qk_norm:
        W_Q, W_K = W_Q * circuits.q_norm[:, None], W_K * circuits.k_norm[:, None]
    # The product of two small triangles has the singular values of the [d_model, d_model] one.
    triangles = [torch.linalg.qr(side.double(), mode="r").R for side in (W_Q, W_K)]
    values: Tensor = torch.linalg.svdvals(triangles[0] @ triangles[1].transpose(1, 2))
    return values


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp(entropy) of the shares of squared singular values [..., n], between 1 and n."""
    shares = singular_values.double().square()
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1).exp()
