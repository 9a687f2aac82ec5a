"""How Lorsa heads relate to the MHSA heads of the same layer (paper items P12, P13 and P15).

P12. How much of what a Lorsa head writes comes from each MHSA head? With write direction w_o (norm 1), activation z_t
and the output o_tm of MHSA head m minus its mean over text (which Lorsa holds in its bias),

    c_m = sum_t z_t o_tm . w_o        share_m = max(c_m, 0) / sum_m' max(c_m', 0)

MHSA heads that write against the Lorsa head (c_m < 0) get the share 0.

P13. How alike are two patterns? overlap(A, B) = mean over queries of sum_j min(A_ij, B_ij), from 0 (no common source)
to 1 (equal). Most patterns rest on the first token, so it is left out. The baseline is another layer's MHSA heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lorsa_utils import ops
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import MHSAHeads, by_pair, replaced_loss, standard_error
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
    parts, squares = torch.zeros(lorsa.n_units, heads.n).double(), torch.zeros(lorsa.n_units).double()
    active = torch.zeros(lorsa.n_units, dtype=torch.long)
    n_batches = -(-len(sequences.tokens) // batch_size)
    batches = sequences.batches(batch_size, model.device)
    for tokens, masks in tqdm(batches, total=n_batches, desc="shares", disable=not progress):
        x = model.capture(tokens, [layer])[layer][0].float()
        # One sequence at a time, because its write directions are [n_tokens, k, d_model].
        for indices, values, outputs, mask in zip(*lorsa.encode(x), heads.outputs(x), masks, strict=True):
            chosen, z = indices[mask], values[mask] * norms[indices[mask]]
            along = torch.einsum("tmd,tkd->tkm", outputs[mask], directions[chosen]) * z[..., None]
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
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in removals}
    numbers = [torch.zeros(0, dtype=torch.long)]
    for first, (tokens, mask) in enumerate(sequences.batches(batch_size, model.device)):
        with model.resume(layer, model.residual(tokens, layer)):  # blocks before it do the same in every pass
            x, y = model.capture(tokens, [layer])[layer]
            untouched, counted = model.loss(tokens, mask)
            indices, values = lorsa.encode(x.float())
            z = (values * (indices == head)).sum(dim=-1) * norm * mask
            outputs, here = heads.outputs(x.float()), (z > 0)[:, :-1] & counted
            numbers.append(first * batch_size + here.nonzero()[:, 0].cpu())
            for name, chosen in removals.items():
                part = (outputs[:, :, chosen].sum(dim=2) @ direction) * (z > 0) if chosen else z
                losses = replaced_loss(model, layer, y - (part[..., None] * direction).to(y.dtype), tokens, mask)
                sides[name].append(((losses - untouched)[here].double().cpu(), part[:, :-1][here].cpu()))
    sequence = torch.cat(numbers)
    if not len(sequence):
        raise UserError(f"Lorsa head {head} is not active in this text; give sequences from its top contexts.")
    rows = []
    for name, parts in sides.items():
        change, written = map(torch.cat, zip(*parts, strict=True))
        error = standard_error(by_pair(change[:, None], sequence))
        rows.append((name, float(written.mean()), float(change.mean()), error, len(change)))
    return pd.DataFrame(rows, columns=["removed", "written", "effect", "error", "n"])


# ---- patterns


def overlap(patterns: Tensor, others: Tensor, counted: Tensor) -> Tensor:
    """Overlap of every pattern [n, length, length] with every one of `others`, mean over counted queries, [n, m]."""
    sides = (side[:, counted, 1:] for side in (patterns, others))
    patterns, others = (side / side.sum(dim=2, keepdim=True).clamp_min(1e-12) for side in sides)
    return torch.stack([torch.minimum(patterns, pattern).sum(dim=2).mean(dim=1) for pattern in others], dim=1)


def patterns(circuits: Lorsa | AttentionSite, x: Tensor) -> Tensor:
    """Attention of every QK group (or MHSA head) on one sequence x [1, length, d_model]: [n, length, length]."""
    if isinstance(circuits, Lorsa):
        q, k = circuits.queries_keys(x)
        return ops.attention_pattern(q[0], k[0], circuits.attn_scale)
    return circuits.pattern(x)[0]


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
