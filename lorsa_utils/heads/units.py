"""Units of an attention layer (Lorsa heads, SAE features, MHSA heads) behind one interface, and one way to remove them.

At every token a unit has an activation, masses on source tokens, and a vector that it writes:

| kind | activation | mass on source j of query i | writes |
|---|---|---|---|
| Lorsa head | kept z, times the norm of w_o | abs(A_ij v_j): the z pattern | z w_o |
| MHSA head | norm of its output minus its mean output | A_ij norm(v_j W_O): norm-weighted attention | its output |
| SAE feature | kept activation f, times the norm of w_d | abs(sum_h A^h_ij v^h_j W_O^h w_e): attribution | f w_d |

The attribution is exact: given the patterns, the output is linear in the values. Masses are absolute, so that shares of
them lie between 0 and 1. Where a Lorsa head or SAE feature was not selected, its activation and masses are 0.

The layer's output is the exact sum of a bias, what every unit writes, and an error (0 for MHSA heads), which is a node
after the units. `ablate` subtracts what nodes write; removing nothing gives the model's own logits bit for bit. MHSA
heads with a mean are removed down to it, because Lorsa and the SAE hold that constant part in their bias.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import override

from lorsa_utils import ops
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.prompts import PromptSet
from lorsa_utils.lorsa import SAE, Lorsa, SparseModule
from lorsa_utils.models import AttentionSite, LanguageModel, Replacement
from lorsa_utils.stats import sign_flip_p

_PATTERN_VALUES_AT_ONCE = 1 << 24

Prepared = dict[str, Tensor]
"""What the queries of one batch share, by name; batch first."""

Chosen = Sequence[int] | Mapping[int, float] | Tensor
"""Unit numbers; unit to its share; or a mask over nodes (shares or bool): [n + 1], [batch or 1, n + 1] or
[batch or 1, length or 1, n + 1]."""


class Rows(NamedTuple):
    """Units at some queries of one sequence, each field [n_queries, n_units]."""

    value: Tensor
    """Signed factor on what the unit writes (for MHSA heads as `activation`)."""
    activation: Tensor
    """Size of what the unit writes."""
    mass: Tensor
    """Mass weighted by each map of source positions, [n_maps, ...]."""
    total: Tensor
    """Mass on all sources."""


# ---- what nodes write


class Activity(abc.ABC):
    """What the nodes of one layer (units, then the error) write on a batch."""

    @abc.abstractmethod
    def written(self, mask: Tensor) -> Tensor:
        """What shares of nodes, [batch or 1, length or 1, n_nodes], write together, [batch, length, d_model]."""

    @abc.abstractmethod
    def along(self, direction: Tensor) -> Tensor:
        """What each node writes along directions [batch, length, d_model]: [batch, length, n_nodes]."""

    @abc.abstractmethod
    def rows(self, rows: Tensor | slice) -> Activity:
        """The same for some sequences of the batch."""


@dataclass
class ConstantActivity(Activity):
    """Every node writes the same vector everywhere, [n_nodes, d_model]."""

    vectors: Tensor

    @override
    def written(self, mask: Tensor) -> Tensor:
        return mask.to(self.vectors.dtype) @ self.vectors

    @override
    def along(self, direction: Tensor) -> Tensor:
        return direction @ self.vectors.T

    @override
    def rows(self, rows: Tensor | slice) -> ConstantActivity:
        return self


@dataclass
class SparseActivity(Activity):
    """Kept units, indices and values [batch, length, k], of a layer that writes y [batch, length, d_model]."""

    module: SparseModule
    indices: Tensor
    values: Tensor
    y: Tensor

    @property
    def W_O(self) -> Tensor:
        """Write directions, [n_units, d_model]."""
        return self.module.W_O.detach()

    @cached_property
    def error(self) -> Tensor:
        """y minus the module's output, [batch, length, d_model]."""
        return self.y.to(self.W_O.dtype) - self.module.decode(self.indices, self.values)

    @cached_property
    def dense(self) -> Tensor:
        """[batch, length, n_units], 0 where not kept."""
        zeros = self.values.new_zeros(*self.indices.shape[:2], self.module.n_units)
        return zeros.scatter_(2, self.indices, self.values)

    @override
    def written(self, mask: Tensor) -> Tensor:
        shares = mask.expand(*self.indices.shape[:2], -1).gather(2, self.indices)
        together = self.module.decode(self.indices, self.values * shares, bias=False)
        return together + self.error * mask[..., -1:] if bool(mask[..., -1].any()) else together

    @override
    def along(self, direction: Tensor) -> Tensor:
        units = self.dense * (direction @ self.W_O.T)
        return torch.cat([units, (self.error * direction).sum(dim=-1, keepdim=True)], dim=-1)

    @override
    def rows(self, rows: Tensor | slice) -> SparseActivity:
        return SparseActivity(self.module, self.indices[rows], self.values[rows], self.y[rows])

    def mean(self, mask: Tensor) -> ConstantActivity:
        """Mean over counted tokens, mask [batch, length]."""
        n, totals = mask.sum().clamp_min(1), self.values.new_zeros(self.module.n_units)
        totals.index_add_(0, self.indices[mask].flatten(), self.values[mask].flatten())
        error = self.error[mask].sum(dim=0, keepdim=True)
        return ConstantActivity(torch.cat([totals[:, None] / n * self.W_O, error / n]))


@dataclass
class HeadActivity(Activity):
    """Outputs of MHSA heads, [batch, length, n_heads, d_model]; the error is 0."""

    outputs: Tensor

    @override
    def written(self, mask: Tensor) -> Tensor:
        return (self.outputs * mask[..., :-1, None]).sum(dim=2)

    @override
    def along(self, direction: Tensor) -> Tensor:
        return nn.functional.pad(torch.einsum("blhd,bld->blh", self.outputs, direction), (0, 1))

    @override
    def rows(self, rows: Tensor | slice) -> HeadActivity:
        return HeadActivity(self.outputs[rows])

    def mean(self, mask: Tensor) -> ConstantActivity:
        """Mean over counted tokens, mask [batch, length]."""
        return ConstantActivity(nn.functional.pad(self.outputs[mask].mean(dim=0), (0, 0, 0, 1)))


# ---- units


class Units(abc.ABC):
    """Units of one kind at one layer that reads x and writes y, each [batch, length, d_model]."""

    kind: str
    """`lorsa`, `sae` or `mhsa`."""
    label: str
    """Plural."""
    n: int
    """Without the error node."""

    @abc.abstractmethod
    def activity(self, x: Tensor, y: Tensor) -> SparseActivity | HeadActivity:
        """What every node writes at every token."""

    @abc.abstractmethod
    def parameters(self, chosen: Sequence[int]) -> int:
        """Number of weights of some units; shared ones count once, biases not."""

    @abc.abstractmethod
    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        """What `rows` and `along` need of a batch."""

    @abc.abstractmethod
    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        """Units at positions [n_queries] of sequence `place`; maps [n_maps, n_queries, length] weight sources."""

    @abc.abstractmethod
    def along(self, batch: Prepared, place: int, positions: Tensor, value: Tensor, directions: Tensor) -> Tensor:
        """What each unit writes along the direction [n_queries, d_model] of each query, with the `value` of `rows`."""

    def active(self, x: Tensor, y: Tensor) -> Tensor:
        """Where each unit writes anything, [batch, length, n_units] bool."""
        return x.new_ones(*x.shape[:-1], self.n, dtype=torch.bool)

    def written(self, x: Tensor, y: Tensor, chosen: Chosen) -> Tensor:
        """What the chosen nodes write together, [batch, length, d_model]."""
        return self.activity(x, y).written(self.mask(chosen).to(x.device)).to(y.dtype)

    def mask(self, chosen: Chosen) -> Tensor:
        """The chosen share of every node, [batch or 1, length or 1, n + 1], bool or float; a `UserError` as `check`."""
        if isinstance(chosen, Tensor) and chosen.dtype != torch.long:
            return chosen.view(-1, 1, self.n + 1) if chosen.dim() < 3 else chosen
        shares = chosen if isinstance(chosen, Mapping) else dict.fromkeys((int(unit) for unit in chosen), 1.0)
        mask = torch.zeros(1, 1, self.n + 1)
        mask[..., self.check(list(shares))] = torch.tensor(list(shares.values()))
        return mask

    def check(self, chosen: Sequence[int]) -> Tensor:
        """Unit numbers as a tensor; a `UserError` where there is no such unit."""
        if wrong := [index for index in chosen if not 0 <= index < self.n]:
            raise UserError(
                f"There is no unit {wrong[0]} among {self.n} {self.label}; choose one from 0 to {self.n - 1}."
            )
        return torch.tensor(list(chosen), dtype=torch.long)


class SparseUnits(Units):
    """Units with a selection and fixed write directions."""

    def __init__(self, module: SparseModule) -> None:
        self.module, self.n, self.kind = module, module.n_units, module.config.kind
        self.norms = module.W_O.detach().norm(dim=1)

    @override
    def activity(self, x: Tensor, y: Tensor) -> SparseActivity:
        source = self.module.input_from(x, y).to(self.module.W_O.dtype)
        return SparseActivity(self.module, *self.module.encode(source), y)

    @override
    def active(self, x: Tensor, y: Tensor) -> Tensor:
        return self.activity(x, y).dense != 0

    def _selected(self, pre: Tensor) -> Tensor:
        """Activations [n_queries, n_units], 0 where not kept."""
        indices, values = self.module.select(pre[None])
        return torch.zeros_like(pre).scatter_(1, indices[0], values[0].to(pre.dtype))

    @override
    def along(self, batch: Prepared, place: int, positions: Tensor, value: Tensor, directions: Tensor) -> Tensor:
        return value * (directions.to(value.dtype) @ self.module.W_O.T)


class LorsaHeads(SparseUnits):
    """The heads of a Lorsa that reads raw activations."""

    label = "Lorsa heads"

    def __init__(self, module: Lorsa) -> None:
        super().__init__(module)
        self.lorsa = module

    @override
    def parameters(self, chosen: Sequence[int]) -> int:
        config = self.lorsa.config
        n_groups = len({unit // config.group_size for unit in chosen})
        return 2 * config.d_model * (len(chosen) + config.d_qk * n_groups)

    @override
    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        return dict(zip("qkv", self.lorsa.attention_inputs(x.to(self.module.W_O.dtype)), strict=True))

    @override
    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        step, parts = max(1, _PATTERN_VALUES_AT_ONCE // batch["q"].shape[2] ** 2), []
        for q, k, v in zip(*(batch[name][place].split(step) for name in "qkv"), strict=True):
            pattern = ops.attention_pattern(q, k, self.lorsa.attn_scale)[:, positions]
            sizes = v.abs()
            sums = [pattern @ v, pattern @ sizes, *((pattern * weights) @ sizes for weights in maps.to(v.dtype))]
            parts.append(torch.stack(sums).permute(0, 2, 1, 3).flatten(2))
        z, total, *mass = torch.cat(parts, dim=2)
        value = self._selected(z)
        active = (value != 0).to(z.dtype)
        masses = torch.stack(mass) * active if mass else z.new_zeros(0, *z.shape)
        return Rows(value, value.abs() * self.norms, masses, total * active)


class SAEFeatures(SparseUnits):
    """The features of an SAE on the attention layer's output; their sources are the layer's own."""

    label = "SAE features"

    def __init__(self, module: SAE, site: AttentionSite) -> None:
        """Raises a `UserError` for a transcoder, which has no attention to look through."""
        super().__init__(module)
        if self.kind != "sae":
            raise UserError(
                "A transcoder reads one token alone, so it has no source positions; give an SAE of the layer's output."
            )
        self.sae, self.site = module, site

    @override
    def parameters(self, chosen: Sequence[int]) -> int:
        # Features read the layer's output, so the layer's own weights count as well.
        own = sum(weight.numel() for weight in (self.site.W_Q, self.site.W_K, self.site.W_V, self.site.W_O))
        return 2 * self.site.d_model * len(chosen) + (own if chosen else 0)

    @override
    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        moved = self.site.values(x) @ self.site.W_O
        return {"y": y.to(self.sae.W_E.dtype), "pattern": self.site.pattern(x), "moved": moved}

    @override
    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        value = self._selected(self.sae.pre_activations(batch["y"][place, positions][None])[0])
        pattern, moved = batch["pattern"][place][:, positions], batch["moved"][place]
        maps = maps.to(moved.dtype)
        total = torch.zeros_like(value)
        mass = value.new_zeros(len(maps), *value.shape)
        # One query at a time: what every source sends to it, read by its active features.
        for number in range(len(positions)):
            active = value[number].nonzero()[:, 0]
            sent = torch.einsum("hj,hjd->jd", pattern[:, number], moved)
            parts = (sent @ self.sae.W_E[active].T).abs()
            total[number, active] = parts.sum(dim=0)
            mass[:, number, active] = maps[:, number] @ parts
        return Rows(value, value.abs() * self.norms, mass, total)


class MHSAHeads(Units):
    """The heads of the attention layer itself."""

    kind, label = "mhsa", "MHSA heads"

    def __init__(self, site: AttentionSite, mean_values: Tensor | None = None) -> None:
        """Heads write their outputs minus those of `mean_values` [n_heads, d_head] (`mean_head_values`; 0 if None)."""
        self.site, self.n = site, site.n_heads
        self.mean = torch.zeros_like(site.W_O[:, :, 0]) if mean_values is None else mean_values.to(site.W_O)

    @override
    def activity(self, x: Tensor, y: Tensor) -> HeadActivity:
        return HeadActivity(self.outputs(x))

    def outputs(self, x: Tensor) -> Tensor:
        """Outputs minus their means, [batch, length, n_heads, d_model]."""
        return torch.einsum("blhe,hed->blhd", self.site.head_values(x) - self.mean, self.site.W_O)

    @override
    def parameters(self, chosen: Sequence[int]) -> int:
        size, shared = self.site.d_model * self.site.d_head, self.site.n_heads // self.site.n_kv_heads
        return size * (2 * len(chosen) + 2 * len({unit // shared for unit in chosen}))

    @override
    def prepare(self, x: Tensor, y: Tensor) -> Prepared:
        sizes = (self.site.values(x) @ self.site.W_O).norm(dim=-1)
        return {"outputs": self.outputs(x), "weighted": self.site.pattern(x) * sizes[:, :, None]}

    @override
    def rows(self, batch: Prepared, place: int, positions: Tensor, maps: Tensor) -> Rows:
        activation = batch["outputs"][place, positions].norm(dim=-1)
        weighted = batch["weighted"][place][:, positions]
        mass = torch.einsum("hqj,mqj->mqh", weighted, maps.to(weighted.dtype))
        return Rows(activation, activation, mass, weighted.sum(dim=-1).T)

    @override
    def along(self, batch: Prepared, place: int, positions: Tensor, value: Tensor, directions: Tensor) -> Tensor:
        return torch.einsum("qhd,qd->qh", batch["outputs"][place, positions], directions.to(self.site.W_O.dtype))


def mean_head_values(site: AttentionSite, x: Tensor, mask: Tensor) -> Tensor:
    """Mean z of each MHSA head over counted tokens, x [n, length, d_model], mask [n, length]: [n_heads, d_head]."""
    if not bool(mask.any()):
        raise UserError("There is not one counted token in this text; give a longer text.")
    batches = zip(x.split(8), mask.split(8), strict=True)
    sums = [site.head_values(inputs)[counted].double().sum(dim=0) for inputs, counted in batches]
    return torch.stack(sums).sum(dim=0) / int(mask.sum())


# ---- removing units


def units_of(model: LanguageModel, layer: int, module: Lorsa | SAE) -> LorsaHeads | SAEFeatures:
    """Heads or features of a module for that layer."""
    return LorsaHeads(module) if isinstance(module, Lorsa) else SAEFeatures(module, model.site(layer))


@contextlib.contextmanager
def ablate(
    model: LanguageModel,
    units: Mapping[int, Units],
    chosen: Mapping[int, Chosen],
    instead: Mapping[int, Activity] | None = None,
) -> Iterator[None]:
    """Inside the context the model runs without the chosen nodes.

    Arguments are by layer: `with ablate(model, {17: LorsaHeads(lorsa)}, {17: [1956]}): ...`. A chosen share of 1
    removes a unit, -1 makes it write twice as much. The output becomes output - written by the chosen nodes + written
    `instead`, such as their mean or what they write on another prompt (nothing by default).

    Raises:
        UserError: there is no such unit, or no such layer.
    """
    masks = {layer: units[layer].mask(nodes).to(model.device) for layer, nodes in chosen.items()}

    def remover(layer: int) -> Replacement:
        def remove(x: Tensor, y: Tensor) -> Tensor:
            written = units[layer].activity(x.float(), y.float()).written(masks[layer])
            if instead is not None:
                written = written - instead[layer].written(masks[layer])
            return y - written.to(y.dtype)

        return remove

    with model.splice({layer: remover(layer) for layer, mask in masks.items() if bool(mask.any())}):
        yield


def replaced_loss(model: LanguageModel, layer: int, output: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """`model.loss` of each target with the layer's output replaced."""
    with model.splice({layer: lambda x, y: output}):
        return model.loss(tokens, mask)[0]


# ---- effect on logits


def final_norm(model: LanguageModel) -> nn.Module:
    """The last norm before the unembedding."""
    return model.model.get_submodule(model.architecture.final_norm)


def centred(norm: nn.Module, vectors: Tensor) -> Tensor:
    """Vectors minus their mean for a LayerNorm, unchanged for an RMSNorm."""
    return vectors - vectors.mean(dim=-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else vectors


def norm_scale(norm: nn.Module, x: Tensor) -> Tensor:
    """What the norm divides x [..., d_model] by, [..., 1]."""
    if isinstance(norm, nn.LayerNorm):
        return (x.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return (x.square().mean(dim=-1, keepdim=True) + float(getattr(norm, "variance_epsilon", 0.0))).sqrt()


class Unembedding:
    """From residual-stream directions to logits, through the last norm with its scale frozen."""

    def __init__(self, model: LanguageModel) -> None:
        self.norm: nn.Module = final_norm(model)
        weight = model.model.get_output_embeddings().weight.detach().float()
        # A direction that raises all logits equally does nothing.
        self.weight = weight - weight.mean(dim=0)
        self.gain = self.norm.weight.detach().float()  # type: ignore[operator]

    def directions(self, residual: Tensor, tokens: Tensor) -> Tensor:
        """Directions whose dot product with a written vector is its direct effect on a token's logit (above the mean).

        `residual` [n_queries, d_model] is what the last norm reads; tokens [n_queries] to [n_queries, d_model].
        """
        return centred(self.norm, self.weight[tokens] * self.gain) / norm_scale(self.norm, residual.float())

    def logits(self, directions: Tensor) -> Tensor:
        """Logits [n, n_tokens] of write directions [n, d_model], without the norm's scale."""
        return centred(self.norm, directions.float()) * self.gain @ self.weight.T

    def top_tokens(self, directions: Tensor, n: int, largest: bool = True) -> Tensor:
        """The tokens that write directions [n_units, d_model] raise (or lower) most, [n_units, n]."""
        return torch.cat([self.logits(rows).topk(n, dim=1, largest=largest).indices for rows in directions.split(256)])


# ---- causal effect


class Effect(NamedTuple):
    """Increase of the loss when some units are removed, in nats."""

    labelled: float
    """At labelled queries, mean over pairs."""
    labelled_error: float
    """Its standard error."""
    p: float
    """One-sided, from sign flips of whole pairs."""
    where_active: float
    """Mean at labelled queries where one of the units is active (NaN without any)."""
    active: float
    """Share of such labelled queries."""
    controls: float
    """Mean at controls (NaN without any)."""


def effect(changed: Tensor, untouched: Tensor, prompts: PromptSet, active: Tensor) -> Effect:
    """From two results of `Removals.losses` and where any of the units is active [n_queries]."""
    difference, labelled = (changed - untouched)[:, None], prompts.positive
    means, there = by_pair(difference[labelled], prompts.pair[labelled]), active[labelled]
    return Effect(
        labelled=float(means.mean()),
        labelled_error=standard_error(means),
        p=float(sign_flip_p(means)[0]),
        where_active=float(difference[labelled][there].mean()),
        active=float(there.double().mean()),
        controls=float(difference[~labelled].mean()),
    )


class Removals:
    """Losses on prompts while units of one layer are removed; blocks before it run only once, on creation.

    Methods raise a `UserError` where there is no such unit.
    """

    def __init__(self, model: LanguageModel, layer: int, prompts: PromptSet, batch_size: int = 16) -> None:
        self.model, self.layer, self.prompts, self.batch_size = model, layer, prompts, batch_size
        self._residual = torch.cat([model.residual(tokens, layer).cpu() for tokens in prompts.tokens.split(batch_size)])

    @cached_property
    def untouched(self) -> Tensor:
        """`losses` with nothing removed."""
        return self._losses()

    def losses(self, units: Units, chosen: Sequence[int], queries: Tensor | None = None) -> Tensor:
        """Loss of the token after every query with some units removed together, in nats: [n_queries].

        With `queries` [n_queries] bool only their prompts run, and the other queries get NaN.
        """
        with ablate(self.model, {self.layer: units}, {self.layer: chosen}):
            return self._losses(queries)

    @torch.no_grad()
    def _losses(self, queries: Tensor | None = None) -> Tensor:
        tokens, row = self.prompts.tokens, self.prompts.row
        queries = torch.ones(len(row), dtype=torch.bool) if queries is None else queries
        target = self.prompts.position.clamp(max=tokens.shape[1] - 2) + 1  # a query at the end has no next token
        counted = torch.zeros(tokens.shape, dtype=torch.bool)
        counted[row[queries], target[queries]] = True
        losses = torch.full(tokens.shape, torch.nan)
        touched = counted.any(dim=1).nonzero()[:, 0]
        for first in range(0, len(touched), self.batch_size):
            batch = touched[first : first + self.batch_size]
            with self.model.resume(self.layer, self._residual[batch]):
                losses[batch, 1:] = self.model.loss(tokens[batch], counted[batch])[0].cpu()
        return losses[row, target].masked_fill(~queries, torch.nan)

    @torch.no_grad()
    def active(self, units: Units, sets_of_units: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Where any unit of each set is active, [n_prompts, length] bool."""
        indices = {name: units.check(chosen).to(self.model.device) for name, chosen in sets_of_units.items()}
        places: dict[str, list[Tensor]] = {name: [] for name in indices}
        for batch in torch.arange(len(self.prompts.tokens)).split(self.batch_size):
            with self.model.resume(self.layer, self._residual[batch]):
                sides = self.model.capture(self.prompts.tokens[batch], [self.layer])[self.layer]
            active = units.active(*(side.float() for side in sides))
            for name, chosen in indices.items():
                places[name].append(active[..., chosen].any(dim=-1).cpu())
        return {name: torch.cat(batches) for name, batches in places.items()}

    def effects(self, units: Units, sets_of_units: Mapping[str, Sequence[int]], progress: bool = False) -> pd.DataFrame:
        """Effects of removing sets of units, one row per set: `removed` (its name), `n`, and the fields of `Effect`.

        Only prompts in which one of the units is active run.
        """
        rows, where = [], self.active(units, sets_of_units)
        for name, chosen in tqdm(sets_of_units.items(), desc="removals", disable=not progress):
            changed = self.losses(units, chosen, where[name].any(dim=1)[self.prompts.row])
            active = where[name][self.prompts.row, self.prompts.position]
            result = effect(changed.where(~changed.isnan(), self.untouched), self.untouched, self.prompts, active)
            rows.append({"removed": name, "n": len(chosen), **result._asdict()})
        return pd.DataFrame(rows, columns=["removed", "n", *Effect._fields])


def by_pair(values: Tensor, pairs: Tensor) -> Tensor:
    """Means of values [n_queries, n] within each pair, [n_pairs, n]."""
    names, place = torch.unique(pairs, return_inverse=True)
    sums = torch.zeros(len(names), values.shape[1], dtype=torch.float64).index_add_(0, place, values.double())
    return sums / torch.bincount(place)[:, None]


def standard_error(means: Tensor) -> float:
    """Of the mean of independent values; NaN of a single one."""
    return float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
