"""Three kinds of attention units behind one interface: Lorsa heads, SAE features, MHSA heads.

Whatever the kind, a unit has at every token an activation, an exact split of that activation over source tokens, and a
vector that it writes:

| kind | activation | mass on source j of query i | writes |
|---|---|---|---|
| Lorsa head | kept z, times the norm of w_o | abs(A_ij v_j): the z pattern | z w_o |
| MHSA head | norm of its output minus its mean output | A_ij norm(v_j W_O): norm-weighted attention | its output |
| SAE feature | kept activation f, times the norm of w_d | abs(sum_h A^h_ij v^h_j W_O^h w_e): attribution | f w_d |

The attribution of a feature is exact: given the patterns, the layer's output is linear in its values. For a rank-1 head
the first two masses are one formula. Masses are absolute values, so that a share of them lies between 0 and 1 also
where v changes sign. Where a Lorsa head or SAE feature was not selected, its activation and all its masses are 0.

Removing units means: the layer's output minus what they write (minus its mean, for MHSA heads, which have a constant
part that Lorsa and the SAE keep in their bias). Algebraically this is the module spliced in with its error term added,
without those units; computed in this order, removing nothing gives the model's own logits bit for bit.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorsa_utils import ops
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.prompts import PromptSet
from lorsa_utils.lorsa import SAE, Lorsa, SparseModule
from lorsa_utils.models import AttentionSite, LanguageModel, Replacement
from lorsa_utils.stats import sign_flip_p

_PATTERN_VALUES_AT_ONCE = 1 << 24


class Rows(NamedTuple):
    """What units do at some queries of one sequence."""

    value: Tensor
    """[n_queries, n_units], signed factor on what the unit writes (for MHSA heads the same as `activation`)."""
    activation: Tensor
    """[n_queries, n_units], size of what the unit writes, 0 where it is not active."""
    mass: Tensor
    """[n_maps, n_queries, n_units], mass on each map of source positions."""
    total: Tensor
    """[n_queries, n_units], mass on all source positions."""


Prepared = dict[str, Tensor]
"""What the queries of one batch share, by name; each tensor has the batch as its first dimension."""


class Units(abc.ABC):
    """Units of one kind at one attention layer."""

    label: str
    """Name for people, plural."""
    n: int
    """How many there are."""

    @abc.abstractmethod
    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """What `rows` and `along` need of a batch: x (what the layer reads) and y (what it writes), each [batch, length, d_model]."""

    @abc.abstractmethod
    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        """Read units at some queries of one sequence.

        Args:
            batch: of `prepare`.
            place: which sequence of it.
            positions: queries, [n_queries].
            maps: weights of source positions for each query, [n_maps, n_queries, length].
        """

    @abc.abstractmethod
    def along(self, batch: Prepared, place: int, positions: Tensor, value: Tensor, directions: Tensor) -> Tensor:
        """What each unit writes at a query along that query's direction.

        Args:
            batch: of `prepare`.
            place: which sequence of it.
            positions: queries, [n_queries].
            value: of `rows`, [n_queries, n_units].
            directions: [n_queries, d_model].

        Returns:
            [n_queries, n_units].
        """

    @abc.abstractmethod
    def written(self, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
        """What some units [n_chosen] write together, for x and y [batch, length, d_model]: [batch, length, d_model]."""

    def active(self, x: Tensor, y: Tensor) -> Tensor:
        """Where each unit writes anything, for x and y [batch, length, d_model]: [batch, length, n_units] bool."""
        return torch.ones(*x.shape[:-1], self.n, dtype=torch.bool, device=x.device)

    def check(self, chosen: Sequence[int]) -> Tensor:
        """Indices as a tensor.

        Raises:
            UserError: there is no such unit.
        """
        if wrong := [index for index in chosen if not 0 <= index < self.n]:
            raise UserError(
                f"There is no unit {wrong[0]} among {self.n} {self.label}; choose one from 0 to {self.n - 1}."
            )
        return torch.tensor(list(chosen), dtype=torch.long)


class _SparseUnits(Units):
    """What Lorsa heads and SAE features share: a selection, and fixed write directions."""

    def __init__(self, module: SparseModule) -> None:
        self.module, self.n = module, module.n_units
        self.norms = module.W_O.detach().norm(dim=1)

    def _selected(self, pre: Tensor) -> Tensor:
        """Activations after the selection, [n_queries, n_units] to the same, zero where not kept."""
        indices, values = self.module.select(pre[None])
        return torch.zeros_like(pre).scatter_(1, indices[0], values[0].to(pre.dtype))

    def along(self, batch: Prepared, place: int, positions: Tensor, value: Tensor, directions: Tensor) -> Tensor:
        """See `Units.along`."""
        return value * (directions.to(value.dtype) @ self.module.W_O.T)

    def _input(self, x: Tensor, y: Tensor) -> Tensor:
        return x

    def _values(self, x: Tensor, y: Tensor) -> Tensor:
        """Activations, zero where not kept, [batch, length, n_units]."""
        indices, values = self.module.encode(self._input(x, y).to(self.module.W_O.dtype))
        return torch.zeros(*indices.shape[:-1], self.n, dtype=values.dtype, device=values.device).scatter_(
            -1, indices, values
        )

    def written(self, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
        """See `Units.written`."""
        chosen = chosen.to(x.device)
        return (self._values(x, y)[..., chosen] @ self.module.W_O[chosen]).to(y.dtype)

    def active(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Units.active`."""
        return self._values(x, y) != 0


class LorsaHeads(_SparseUnits):
    """The heads of a Lorsa module that reads raw activations."""

    label = "Lorsa heads"

    def __init__(self, module: Lorsa) -> None:
        super().__init__(module)
        self.lorsa = module

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See `Units.prepare`."""
        x = x.to(self.module.W_O.dtype)
        q, k = self.lorsa.queries_keys(x)
        v = self.lorsa.values(x).unflatten(2, (self.lorsa.config.n_qk_heads, -1)).transpose(1, 2)
        return {"q": q, "k": k, "v": v}

    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        """See `Units.rows`."""
        q, k, v = (batch[name][place] for name in "qkv")
        maps = maps.to(v.dtype)
        step = max(1, _PATTERN_VALUES_AT_ONCE // q.shape[1] ** 2)
        parts = []
        for first in range(0, len(q), step):
            groups = slice(first, first + step)
            pattern = ops.attention_pattern(q[groups], k[groups], self.lorsa.attn_scale)[:, positions]
            sizes = v[groups].abs()
            sums = [pattern @ v[groups], pattern @ sizes, *((pattern * one) @ sizes for one in maps)]
            parts.append(torch.stack(sums).permute(0, 2, 1, 3).flatten(2))
        z, total, *mass = torch.cat(parts, dim=2)
        value = self._selected(z)
        active = (value != 0).to(z.dtype)
        masses = torch.stack(mass) * active if mass else z.new_zeros(0, *z.shape)
        return Rows(value, value.abs() * self.norms, masses, total * active)


class SAEFeatures(_SparseUnits):
    """The features of an SAE on the attention layer's output; their sources are those of the layer itself."""

    label = "SAE features"

    def __init__(self, module: SAE, site: AttentionSite) -> None:
        """Wrap an SAE.

        Raises:
            UserError: it is a transcoder, which has no attention to look through.
        """
        super().__init__(module)
        if module.config.kind != "sae":
            raise UserError(
                "A transcoder reads one token alone, so it has no source positions; give an SAE of the layer's output."
            )
        self.sae, self.site = module, site

    def _input(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See `Units.prepare`."""
        return {
            "y": y.to(self.sae.W_E.dtype),
            "pattern": self.site.pattern(x),
            "moved": self.site.values(x) @ self.site.W_O,
        }

    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        """See `Units.rows`."""
        value = self._selected(self.sae.pre_activations(batch["y"][place, positions][None])[0])
        pattern, moved = batch["pattern"][place][:, positions], batch["moved"][place]
        maps = maps.to(moved.dtype)
        total = torch.zeros_like(value)
        mass = value.new_zeros(len(maps), *value.shape)
        # One query at a time: what every source position sends to it, read by the features that are active there.
        for number in range(len(positions)):
            active = value[number].nonzero()[:, 0]
            sent = torch.einsum("hj,hjd->jd", pattern[:, number], moved)
            parts = (sent @ self.sae.W_E[active].T).abs()
            total[number, active] = parts.sum(dim=0)
            mass[:, number, active] = maps[:, number] @ parts
        return Rows(value, value.abs() * self.norms, mass, total)


class MHSAHeads(Units):
    """The heads of the attention layer itself."""

    label = "MHSA heads"

    def __init__(self, site: AttentionSite, mean_values: Tensor | None = None) -> None:
        """Wrap an attention layer.

        Args:
            site: the layer.
            mean_values: mean of `site.head_values` over text, [n_heads, d_head] (`mean_head_values`); zeros without it.
        """
        self.site, self.n = site, site.n_heads
        self.mean = torch.zeros_like(site.W_O[:, :, 0]) if mean_values is None else mean_values.to(site.W_O)

    def _outputs(self, x: Tensor) -> Tensor:
        """Outputs minus their means, [batch, length, d_model] to [batch, length, n_heads, d_model]."""
        return torch.einsum("blhe,hed->blhd", self.site.head_values(x) - self.mean, self.site.W_O)

    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """See `Units.prepare`."""
        sizes = (self.site.values(x) @ self.site.W_O).norm(dim=-1)
        return {"outputs": self._outputs(x), "weighted": self.site.pattern(x) * sizes[:, :, None]}

    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        """See `Units.rows`."""
        activation = batch["outputs"][place, positions].norm(dim=-1)
        weighted = batch["weighted"][place][:, positions]
        mass = torch.einsum("hqj,mqj->mqh", weighted, maps.to(weighted.dtype))
        return Rows(activation, activation, mass, weighted.sum(dim=-1).T)

    def along(self, batch: Prepared, place: int, positions: Tensor, value: Tensor, directions: Tensor) -> Tensor:
        """See `Units.along`."""
        return torch.einsum("qhd,qd->qh", batch["outputs"][place, positions], directions.to(self.site.W_O.dtype))

    def written(self, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
        """See `Units.written`."""
        return self._outputs(x)[:, :, chosen.to(x.device)].sum(dim=2).to(y.dtype)


def mean_head_values(site: AttentionSite, x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each MHSA head's z over counted tokens: x [n, length, d_model], mask [n, length] to [n_heads, d_head]."""
    if not bool(mask.any()):
        raise UserError("There is not one counted token in this text; give a longer text.")
    rows = [
        site.head_values(some)[kept].double().sum(dim=0) for some, kept in zip(x.split(8), mask.split(8), strict=True)
    ]
    return torch.stack(rows).sum(dim=0) / int(mask.sum())


# ---- effect on logits


def final_norm(model: LanguageModel) -> nn.Module:
    """The last norm before the unembedding."""
    return model.model.get_submodule(model.architecture.final_norm)


class Unembedding:
    """From directions in the residual stream to logits, through the model's last norm with its scale frozen."""

    def __init__(self, model: LanguageModel) -> None:
        self.norm: nn.Module = final_norm(model)
        weight = model.model.get_output_embeddings().weight.detach().float()
        # Logits count up to a constant only: a direction that raises all of them equally does nothing.
        self.weight = weight - weight.mean(dim=0)
        self.gain = self.norm.weight.detach().float()  # type: ignore[operator]

    def directions(self, residual: Tensor, tokens: Tensor) -> Tensor:
        """Directions whose dot product with a written vector is its direct effect on a token's logit (above the mean logit).

        Args:
            residual: what the last norm reads at each query, [n_queries, d_model]; its scale is taken as given.
            tokens: the token for each query, [n_queries].

        Returns:
            [n_queries, d_model].
        """
        return self._through_norm(self.weight[tokens] * self.gain) / self._scale(residual.float())[:, None]

    def logits(self, directions: Tensor) -> Tensor:
        """Logit of every token for write directions [n, d_model], without the norm's scale: [n, n_tokens]."""
        return self._through_norm(directions.float()) * self.gain @ self.weight.T

    def _through_norm(self, vectors: Tensor) -> Tensor:
        """A LayerNorm takes the mean out of whatever it reads."""
        return vectors - vectors.mean(dim=-1, keepdim=True) if isinstance(self.norm, nn.LayerNorm) else vectors

    def _scale(self, residual: Tensor) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            return (residual.var(dim=-1, unbiased=False) + self.norm.eps).sqrt()
        return (residual.square().mean(dim=-1) + float(getattr(self.norm, "variance_epsilon", 0.0))).sqrt()

    def top_tokens(self, directions: Tensor, n: int, largest: bool = True) -> Tensor:
        """The `n` tokens that each write direction [n_units, d_model] raises (or lowers) most, [n_units, n]."""
        found = [self.logits(some).topk(n, dim=1, largest=largest).indices for some in directions.split(256)]
        return torch.cat(found)


# ---- causal effect


class Effect(NamedTuple):
    """What removing some units does to the loss, in nats; positive when it grows."""

    labelled: float
    """Mean over labelled queries: how much the units help the model to say the predicted token."""
    labelled_error: float
    """Standard error over pairs of prompts."""
    p: float
    """One-sided: how often flipping the signs of whole pairs gives a mean at least as large."""
    where_active: float
    """Mean over those labelled queries where one of the units is active (NaN without any)."""
    active: float
    """Their share among the labelled queries."""
    controls: float
    """Mean at controls (NaN without any)."""


def effect(changed: Tensor, untouched: Tensor, prompts: PromptSet, active: Tensor, seed: int = 0) -> Effect:
    """The effect from two results of `Removals.losses`, and where any of the units is active [n_queries]."""
    difference = (changed - untouched)[:, None]
    means = by_pair(difference[prompts.positive], prompts.pair[prompts.positive])
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    controls = float(difference[~prompts.positive].mean()) if prompts.has_controls else float("nan")
    there = active[prompts.positive]
    where = float(difference[prompts.positive][there].mean()) if bool(there.any()) else float("nan")
    return Effect(
        float(means.mean()), error, float(sign_flip_p(means, seed)[0]), where, float(there.double().mean()), controls
    )


class Removals:
    """Losses on some prompts while units of one layer are removed (see the module's docstring), for units of any kind.

    Blocks before the layer do not notice a removal, so they run once, here; each removal costs the blocks from the
    layer on, over the prompts that matter. Choose units by score first all the same.
    """

    def __init__(self, model: LanguageModel, layer: int, prompts: PromptSet, batch_size: int = 16) -> None:
        """Run the blocks before the layer over all prompts, `batch_size` at a time."""
        self.model, self.layer, self.prompts, self.batch_size = model, layer, prompts, batch_size
        self._residual = torch.cat([model.residual(tokens, layer).cpu() for tokens in prompts.tokens.split(batch_size)])

    @cached_property
    def untouched(self) -> Tensor:
        """Loss of the token after every query with nothing removed, in nats: [n_queries]."""
        return self._losses({}, torch.ones(len(self.prompts.row), dtype=torch.bool))

    def losses(self, units: Units, chosen: Sequence[int], queries: Tensor | None = None) -> Tensor:
        """Loss of the token after every query with some units removed, in nats: [n_queries].

        With nothing chosen these are the `untouched` ones, bit for bit.

        Args:
            units: of the layer.
            chosen: which of them to remove together.
            queries: those that matter, [n_queries] bool; only their prompts run, and the others get NaN. All without
                it.

        Raises:
            UserError: there is no such unit.
        """
        indices = units.check(chosen)

        def remove(attn_input: Tensor, attn_output: Tensor) -> Tensor:
            return attn_output - units.written(attn_input.float(), attn_output.float(), indices).to(attn_output.dtype)

        return self._losses(
            {self.layer: remove}, torch.ones(len(self.prompts.row), dtype=torch.bool) if queries is None else queries
        )

    @torch.no_grad()
    def _losses(self, replacements: Mapping[int, Replacement], queries: Tensor) -> Tensor:
        tokens, row = self.prompts.tokens, self.prompts.row
        target = self.prompts.position.clamp(max=tokens.shape[1] - 2) + 1  # a query at the end has no next token
        counted = torch.zeros(tokens.shape, dtype=torch.bool)
        counted[row[queries], target[queries]] = True
        losses = torch.full(tokens.shape, torch.nan)
        touched = counted.any(dim=1).nonzero()[:, 0]
        with self.model.splice(replacements):
            for first in range(0, len(touched), self.batch_size):
                some = touched[first : first + self.batch_size]
                with self.model.resume(self.layer, self._residual[some]):
                    losses[some, 1:] = self.model.loss(tokens[some], counted[some])[0].cpu()
        return losses[row, target].masked_fill(~queries, torch.nan)

    @torch.no_grad()
    def active(self, units: Units, sets_of_units: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """For each set the places where one of its units is active, [n_prompts, length] bool.

        Raises:
            UserError: there is no such unit.
        """
        indices = {name: units.check(chosen).to(self.model.device) for name, chosen in sets_of_units.items()}
        parts: dict[str, list[Tensor]] = {name: [] for name in indices}
        for some in torch.arange(len(self.prompts.tokens)).split(self.batch_size):
            with self.model.resume(self.layer, self._residual[some]):
                sides = self.model.capture(self.prompts.tokens[some], [self.layer])[self.layer]
            active = units.active(*(side.float() for side in sides))
            for name, chosen in indices.items():
                parts[name].append(active[..., chosen].any(dim=-1).cpu())
        return {name: torch.cat(some) for name, some in parts.items()}

    def effects(self, units: Units, sets_of_units: Mapping[str, Sequence[int]], progress: bool = False) -> pd.DataFrame:
        """Effects of removing several sets of units, one row a set: `removed` (its name), `n`, and the fields of `Effect`.

        Each set runs over the prompts in which one of its units is active; in all others nothing changes.

        Raises:
            UserError: there is no such unit.
        """
        rows, where = [], self.active(units, sets_of_units)
        for name, chosen in tqdm(sets_of_units.items(), desc="removals", disable=not progress):
            changed = self.losses(units, chosen, where[name].any(dim=1)[self.prompts.row])
            active = where[name][self.prompts.row, self.prompts.position]
            result = effect(changed.where(~changed.isnan(), self.untouched), self.untouched, self.prompts, active)
            rows.append({"removed": name, "n": len(chosen), **result._asdict()})
        return pd.DataFrame(rows, columns=["removed", "n", *Effect._fields])


def by_pair(values: Tensor, pairs: Tensor) -> Tensor:
    """Means of values [n_queries, n] over the queries of each pair [n_queries]: [n_pairs, n]."""
    names, place = torch.unique(pairs, return_inverse=True)
    sums = torch.zeros(len(names), values.shape[1], dtype=torch.float64).index_add_(0, place, values.double())
    return sums / torch.bincount(place)[:, None]
