"""How Lorsa heads relate to the MHSA heads of the same layer (paper items P12 and P13).

P12. At the tokens where a Lorsa head is active, how much of what it writes comes from each MHSA head? With write
direction w_o (norm 1), activation z_t and the output o_tm of MHSA head m minus its mean over text,

    c_m = sum_t z_t o_tm . w_o        share_m = max(c_m, 0) / sum_m' max(c_m', 0)

Outputs are taken minus their means because Lorsa holds the layer's mean output in its bias. MHSA heads that write
against the Lorsa head (c_m < 0) get the share 0; how large they are is told beside it, as `against` = sum of negative
parts / sum of absolute parts. The number of MHSA heads that a Lorsa head needs for a share t is the smallest number
whose largest shares sum to at least t.

P13. How alike are two attention patterns? overlap(A, B) = mean over queries of sum_j min(A_ij, B_ij): 1 for equal
patterns, 0 for patterns that share no source. Most patterns rest on the first token, so the overlap is also given
without it (the other columns renormalised). The baseline is the same number against MHSA heads of another layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lorsa_utils import ops
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.prompts import PromptSet
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite, LanguageModel
from lorsa_utils.text import Sequences

PAPER = {
    "first version": {"one": 0.5, "two": 0.25, "three or more": 0.25},
    "later version": {"several": 0.25},
}
"""Shares of Lorsa heads by the number of MHSA heads they come from, as the paper's two versions state them; it defines neither."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Shares(NamedTuple):
    """Where Lorsa heads come from. Made by `mhsa_shares`."""

    shares: Tensor
    """[n_lorsa_heads, n_mhsa_heads], rows sum to 1; NaN for a head that is never active (or that all MHSA heads write against)."""
    against: Tensor
    """[n_lorsa_heads], size of the negative parts over that of all parts."""
    captured: Tensor
    """[n_lorsa_heads], sum of all parts over the sum of z^2: 1 when the MHSA heads together write exactly what the Lorsa head does."""
    n_active: Tensor
    """[n_lorsa_heads], tokens where it is active."""


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

    Args:
        model: the language model.
        layer: of the Lorsa.
        lorsa: takes raw activations.
        mean_values: mean of every MHSA head's z (`units.mean_head_values`), [n_heads, d_head].
        sequences: text.
        exchanged: a seed to deal the write directions out anew among the heads: the null, in which a direction has
            nothing to do with the tokens it is looked at on.
        batch_size: sequences at a time.
        progress: show a bar.
    """
    site = model.site(layer)
    directions = normalize(lorsa.W_O.detach(), dim=1)
    if exchanged is not None:
        directions = directions[
            torch.randperm(len(directions), generator=torch.Generator().manual_seed(exchanged)).to(directions.device)
        ]
    norms = lorsa.W_O.norm(dim=1)
    parts = torch.zeros(lorsa.n_units, site.n_heads, dtype=torch.float64)
    squares, active = torch.zeros(lorsa.n_units, dtype=torch.float64), torch.zeros(lorsa.n_units, dtype=torch.long)
    for first in tqdm(range(0, len(sequences.tokens), batch_size), desc="shares", disable=not progress):
        tokens = sequences.tokens[first : first + batch_size].to(model.device, torch.long)
        x, _ = (side.float() for side in model.capture(tokens, [layer])[layer])
        indices, values = lorsa.encode(x)
        outputs = torch.einsum("blhe,hed->blhd", site.head_values(x) - mean_values.to(x), site.W_O)
        for place, mask in enumerate(sequences.mask[first : first + batch_size].to(x.device)):
            # One sequence at a time: the chosen write directions of its tokens are [n_tokens, k, d_model].
            chosen, z = indices[place, mask], values[place, mask] * norms[indices[place, mask]]
            along = torch.einsum("tmd,tkd->tkm", outputs[place, mask], directions[chosen]) * z[..., None]
            parts.index_add_(0, chosen.flatten().cpu(), along.flatten(0, 1).double().cpu())
            squares.index_add_(0, chosen.flatten().cpu(), z.flatten().double().square().cpu())
            active += torch.bincount(chosen[z > 0].cpu(), minlength=lorsa.n_units)
    positive = parts.clamp_min(0)
    against = (positive.sum(dim=1) - parts.sum(dim=1)) / parts.abs().sum(dim=1)
    return Shares(positive / positive.sum(dim=1, keepdim=True), against, parts.sum(dim=1) / squares, active)


def heads_needed(shares: Tensor, threshold: float) -> Tensor:
    """Smallest number of MHSA heads whose shares sum to `threshold`, for shares [n, n_mhsa_heads] without NaN: [n]."""
    if not 0 < threshold <= 1:
        raise UserError(f"The threshold is a share between 0 and 1, not {threshold}.")
    reached = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
    return (reached < threshold - 1e-9).sum(dim=1).clamp_max(shares.shape[1] - 1) + 1


def needed_table(
    found: Mapping[str, Shares], thresholds: Sequence[float] = THRESHOLDS, min_active: int = 10
) -> pd.DataFrame:
    """How many MHSA heads Lorsa heads need, for several sets of shares (the real ones, the null) and thresholds.

    Args:
        found: name to shares.
        thresholds: shares to reach.
        min_active: heads active on fewer tokens are left out.

    Returns:
        columns `shares`, `threshold`, `one`, `two`, `three or more` (shares of Lorsa heads), `mean` and `n`.
    """
    rows = []
    for name, each in found.items():
        kept = each.shares[(each.n_active >= min_active) & ~each.shares.isnan().any(dim=1)]
        if not len(kept):
            raise UserError(f"No Lorsa head is active on {min_active} tokens; give a longer text.")
        for threshold in thresholds:
            needed = heads_needed(kept, threshold)
            counts = {"one": needed == 1, "two": needed == 2, "three or more": needed >= 3}
            row = {label: float(mask.double().mean()) for label, mask in counts.items()}
            rows.append(
                {"shares": name, "threshold": threshold, **row, "mean": float(needed.double().mean()), "n": len(kept)}
            )
    return pd.DataFrame(rows)


# ---- one unit, causally checked


def on_labelled(made: PromptSet) -> Sequences:
    """Prompts as token sequences in which the labelled positions count, and the token after each (whose loss they are judged by)."""
    mask = torch.zeros(made.tokens.shape, dtype=torch.bool)
    rows, positions = made.row[made.positive], made.position[made.positive]
    mask[rows, positions] = True
    mask[rows, (positions + 1).clamp_max(mask.shape[1] - 1)] = True
    kept = mask.any(dim=1)
    return Sequences(made.tokens[kept].int(), mask[kept], [made.family] * int(kept.sum()), "prompts", "")


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
    """Is a Lorsa head what some MHSA heads compute together? Remove their parts along its w_o where it is active, and watch the loss.

    Removed are, in turn: each MHSA head's part alone, the parts of all `mhsa_heads`, of all MHSA heads of the layer,
    and the Lorsa head.

    Args:
        model: the language model.
        layer: of the Lorsa.
        lorsa: takes raw activations.
        head: the Lorsa head.
        mhsa_heads: those with the largest shares.
        mean_values: see `mhsa_shares`.
        sequences: text in which the head is active, such as its top contexts.
        batch_size: sequences at a time.

    Returns:
        columns `removed`, `written` (mean size of what was removed along w_o, over active tokens), `effect` (mean
        change of the next token's loss there, in nats), `error` (its standard error over sequences) and `n` (active
        tokens).

    Raises:
        UserError: the head is not active in this text.
    """
    site = model.site(layer)
    direction = normalize(lorsa.W_O[head], dim=0)
    removals: dict[str, list[int] | None] = {f"MHSA {index}": [index] for index in mhsa_heads}
    removals["MHSA " + " + ".join(str(index) for index in mhsa_heads)] = list(mhsa_heads)
    removals |= {"all MHSA heads": list(range(site.n_heads)), "the Lorsa head": None}
    state: dict[str, Tensor] = {}

    def remove(x: Tensor, y: Tensor) -> Tensor:
        indices, values = lorsa.encode(x.float())
        z = (values * (indices == head)).sum(dim=-1) * lorsa.W_O[head].norm() * state["mask"]
        state["active"] = z > 0
        chosen = state["chosen"]
        if len(chosen) == 0:
            part = z
        else:
            outputs = torch.einsum(
                "blhe,hed->blhd", site.head_values(x.float()) - mean_values.to(x.device, torch.float32), site.W_O
            )
            part = (outputs[:, :, chosen].sum(dim=2) @ direction) * state["active"]
        state["part"] = part * state["on"]
        return y - (state["part"][..., None] * direction).to(y.dtype)

    # Blocks before the layer do the same in every pass, so they run once.
    batches = [
        (tokens, mask, model.residual(tokens, layer)) for tokens, mask in sequences.batches(batch_size, model.device)
    ]

    def run(chosen: list[int] | None, on: bool) -> tuple[Tensor, Tensor, Tensor]:
        found: list[list[Tensor]] = [[], [], []]
        state["chosen"], state["on"] = torch.tensor(chosen or [], dtype=torch.long), torch.tensor(float(on))
        for number, (tokens, state["mask"], residual) in enumerate(batches):
            with model.splice({layer: remove}), model.resume(layer, residual):
                losses, counted = model.loss(tokens, state["mask"])
            sequence = number * batch_size + torch.arange(len(tokens)).to(losses)[:, None].expand_as(losses)
            kept = state["active"][:, :-1] & counted
            for side, values in zip(found, (losses, state["part"][:, :-1], sequence), strict=True):
                side.append(values[kept].cpu())
        losses, parts, rows = (torch.cat([torch.zeros(0), *side]) for side in found)
        return losses, parts, rows

    untouched, _, rows = run(None, on=False)
    if not len(untouched):
        raise UserError(f"Lorsa head {head} is not active in this text; give sequences from its top contexts.")
    table = []
    for name, chosen in removals.items():
        losses, parts, _ = run(chosen, on=True)
        change = (losses - untouched).double()
        _, place = torch.unique(rows, return_inverse=True)
        by_sequence = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(
            0, place, change
        ) / torch.bincount(place)
        error = float(by_sequence.std() / len(by_sequence) ** 0.5) if len(by_sequence) > 1 else float("nan")
        table.append(
            {
                "removed": name,
                "written": float(parts.mean()),
                "effect": float(change.mean()),
                "error": error,
                "n": len(change),
            }
        )
    return pd.DataFrame(table)


# ---- superposition


def family_shares(families: Sequence[str], shares: Tensor) -> pd.DataFrame:
    """Which MHSA heads carry which families: mean shares of the Lorsa heads of each family.

    Args:
        families: name of each Lorsa head, "" without one, [n_lorsa_heads].
        shares: of `mhsa_shares`, [n_lorsa_heads, n_mhsa_heads].

    Returns:
        one row a family: a column for each MHSA head (its number), `lorsa_heads` (how many), and `mhsa_heads`, the
        effective number of MHSA heads that the family is spread over (1 / sum of squared mean shares).
    """
    data = pd.DataFrame(shares.numpy()).assign(family=list(families))
    named = data[(data["family"] != "") & ~data[0].isna()]
    means = named.groupby("family").mean()
    spread = 1 / means.pow(2).sum(axis=1)
    return means.assign(lorsa_heads=named.groupby("family").size(), mhsa_heads=spread).reset_index()


def families_of_mhsa_heads(table: pd.DataFrame, least: float = 0.2) -> pd.DataFrame:
    """Turned around: for each MHSA head the families in which it has a mean share of at least `least`, most first.

    Args:
        table: of `family_shares`.
        least: share.

    Returns:
        columns `mhsa_head`, `n_families`, `families`.
    """
    rows = []
    for head in [column for column in table.columns if isinstance(column, int)]:
        mine = table[table[head] >= least].sort_values(head, ascending=False)["family"].tolist()
        rows.append({"mhsa_head": head, "n_families": len(mine), "families": "; ".join(mine)})
    return pd.DataFrame(rows)


# ---- patterns


def overlap(one: Tensor, other: Tensor, counted: Tensor, without_first: bool = False) -> Tensor:
    """Overlap of every pattern of `one` with every pattern of `other`, averaged over counted queries.

    Args:
        one: [n, length, length], rows are queries and sum to 1.
        other: [m, length, length].
        counted: [length] bool.
        without_first: leave the first token out of every row and renormalise.

    Returns:
        [n, m].
    """
    one, other = one[:, counted], other[:, counted]
    if without_first:
        one, other = (
            side[:, :, 1:] / side[:, :, 1:].sum(dim=2, keepdim=True).clamp_min(1e-12) for side in (one, other)
        )
    return torch.stack([torch.minimum(one, pattern).sum(dim=2).mean(dim=1) for pattern in other], dim=1)


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

    The cost is one model pass and n * n_heads patterns a sequence: some dozens of sequences are enough.
    """
    site = model.site(against)
    total, weight = torch.zeros(()), 0
    for tokens, mask in zip(sequences.tokens, sequences.mask, strict=True):
        captured = model.capture(tokens[None].to(model.device, torch.long), sorted({layer, against}))
        one = _patterns(patterns_of, captured[layer][0].float())
        found = overlap(one, site.pattern(captured[against][0].float())[0], mask.to(one.device), without_first)
        n = int(mask.sum())
        total, weight = total + n * found.cpu(), weight + n
    return total / weight


def _patterns(patterns_of: Lorsa | AttentionSite, x: Tensor) -> Tensor:
    """Patterns of all QK groups or MHSA heads for one sequence x [1, length, d_model]: [n, length, length]."""
    if isinstance(patterns_of, Lorsa):
        q, k = patterns_of.queries_keys(x)
        return ops.attention_pattern(q[0], k[0], patterns_of.attn_scale)
    return patterns_of.pattern(x)[0]


@torch.no_grad()
def attention_on_sources(
    model: LanguageModel, layer: int, patterns_of: Lorsa | AttentionSite, prompts: PromptSet
) -> Tensor:
    """Attention of each QK group (or MHSA head) to the predicted sources, mean over labelled positions, [n]."""
    found = []
    for number, tokens in enumerate(prompts.tokens):
        mine = prompts.positive & (prompts.row == number)
        if bool(mine.any()):
            pattern = _patterns(patterns_of, model.capture(tokens[None].to(model.device), [layer])[layer][0].float())
            on_sources = (
                pattern[:, prompts.position[mine].to(pattern.device)] * prompts.sources[mine].to(pattern)
            ).sum(dim=2)
            found.append(on_sources.T.cpu())
    return torch.cat(found).mean(dim=0)


def pattern_table(overlaps: Tensor, baseline: Tensor, n_heads: int) -> pd.DataFrame:
    """Overlaps of QK groups with the MHSA heads of their layer beside a random-pair baseline.

    Args:
        overlaps: of `pattern_overlaps` within the layer, [n_groups, n_heads].
        baseline: the same against MHSA heads of another layer, [n_groups, n_other].
        n_heads: MHSA heads, to name the head that a copied start began from (group mod n_heads).

    Returns:
        one row a group: `group`, `best` (most similar MHSA head), `overlap` (with it), `others` (mean overlap with the
        rest), `start`, `start_overlap`, `baseline` (best overlap with a head of the other layer) and `baseline_mean`.
    """
    groups = np.arange(len(overlaps))
    best = overlaps.argmax(dim=1)
    highest = overlaps.max(dim=1).values
    rest = (overlaps.sum(dim=1) - highest) / max(1, overlaps.shape[1] - 1)
    start = torch.arange(len(overlaps)) % n_heads
    return pd.DataFrame(
        {
            "group": groups,
            "best": best.numpy(),
            "overlap": highest.numpy(),
            "others": rest.numpy(),
            "start": start.numpy(),
            "start_overlap": overlaps[torch.arange(len(overlaps)), start].numpy(),
            "baseline": baseline.max(dim=1).values.numpy(),
            "baseline_mean": baseline.mean(dim=1).numpy(),
        }
    )


@torch.no_grad()
def qk_singular_values(part: Lorsa | AttentionSite) -> Tensor:
    """Singular values of W_Q W_K^T of every QK circuit, largest first, [n_circuits, d_qk] (paper item P15).

    The product is the bilinear form that scores a token against itself; between tokens at a distance RoPE turns one
    side of it, which leaves the singular values of W_Q and of W_K as they are but not those of the product. Gains of a
    QK norm are multiplied in.
    """
    W_Q, W_K = part.W_Q, part.W_K
    if isinstance(part, AttentionSite):
        if part.q_norm_weight is not None and part.k_norm_weight is not None:
            W_Q, W_K = W_Q * part.q_norm_weight, W_K * part.k_norm_weight
        W_K = part.expand_kv(W_K)
    elif part.config.qk_norm:
        W_Q, W_K = W_Q * part.q_norm[:, None], W_K * part.k_norm[:, None]
    # Two small triangles have the singular values of the [d_model, d_model] product.
    triangles = [torch.linalg.qr(side.double(), mode="r").R for side in (W_Q, W_K)]
    values: Tensor = torch.linalg.svdvals(triangles[0] @ triangles[1].transpose(1, 2))
    return values


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp(entropy) of the shares of the squared singular values, [..., n] to [...]: n when all are equal, 1 when there is only one."""
    shares = singular_values.double().square()
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1).exp()
