"""Attention layers taken apart into nodes, and what the model says when some of the nodes are taken away.

At each chosen layer the attention output is an exact sum of nodes:

    output = bias + sum of what its units write + error          (Lorsa heads, SAE features)
    output = bias + sum of what its MHSA heads write             (MHSA heads; the error is 0)

The error node is whatever the units leave over. It is a node like the others, is removed or kept by choice, and is
counted in every table. All other layers and the MLPs stay as they are. Nodes are numbered in one row: the units of the
first layer, its error, the units of the second layer, its error, and so on.

Removing a set of nodes means that what they write is replaced by what they write elsewhere: nothing (`zero`), their
mean over text (`mean`), or what they write at the same position of a paired corrupted prompt (`resample`). Everything
is computed live, in this order: output - written by the removed nodes + written by them elsewhere. So removing nothing
gives the model's own logits bit for bit, and removing all nodes of a layer by resampling gives that layer's output on
the corrupted prompt, whatever the kind of units.

The effect of a node is the fall of the metric when that node alone is removed. `attribute` estimates all effects at
once by gradients (attribution patching, Nanda 2023; integrated gradients, Sundararajan et al. 2017), `effects` measures
them, `path_effect` measures what one set of nodes does through another alone (path patching, Goldowsky-Dill et al.
2023).
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.tasks import Task, metric
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import AttentionSite, LanguageModel

KINDS = ("lorsa", "sae", "mhsa")


# ---- activity


class Activity(abc.ABC):
    """What the nodes of one layer write on a batch."""

    @abc.abstractmethod
    def written(self, mask: Tensor) -> Tensor:
        """What some nodes write together: mask [batch or 1, length or 1, n_nodes] bool to [batch, length, d_model] (or broadcastable)."""

    @abc.abstractmethod
    def along(self, direction: Tensor) -> Tensor:
        """What each node writes along directions [batch, length, d_model]: [batch, length, n_nodes]."""

    @abc.abstractmethod
    def rows(self, rows: Tensor | slice) -> Activity:
        """The same for some sequences of the batch."""


class SparseActivity(Activity):
    """Kept units with fixed write directions, and the error."""

    def __init__(self, indices: Tensor, values: Tensor, W_O: Tensor, error: Tensor) -> None:
        self.indices, self.values, self.W_O, self.error = indices, values, W_O, error

    def written(self, mask: Tensor) -> Tensor:
        """See `Activity.written`."""
        shape = self.indices.shape
        kept = mask.expand(*shape[:2], -1).gather(2, self.indices)
        weights = torch.where(kept, self.values, 0.0)
        together = torch.nn.functional.embedding_bag(
            self.indices.flatten(0, 1), self.W_O, per_sample_weights=weights.flatten(0, 1), mode="sum"
        ).view_as(self.error)
        return together + torch.where(mask[..., -1:], self.error, 0.0)

    def along(self, direction: Tensor) -> Tensor:
        """See `Activity.along`."""
        dense = torch.zeros(*self.indices.shape[:2], len(self.W_O), dtype=self.values.dtype, device=self.values.device)
        dense.scatter_(2, self.indices, self.values)
        units = dense * (direction @ self.W_O.T)
        return torch.cat([units, (self.error * direction).sum(dim=-1, keepdim=True)], dim=-1)

    def rows(self, rows: Tensor | slice) -> SparseActivity:
        """See `Activity.rows`."""
        return SparseActivity(self.indices[rows], self.values[rows], self.W_O, self.error[rows])


class HeadActivity(Activity):
    """Outputs of MHSA heads, [batch, length, n_heads, d_model]; the last node, the error, is 0."""

    def __init__(self, outputs: Tensor) -> None:
        self.outputs = outputs

    def written(self, mask: Tensor) -> Tensor:
        """See `Activity.written`."""
        return torch.where(mask[..., :-1, None], self.outputs, 0.0).sum(dim=2)

    def along(self, direction: Tensor) -> Tensor:
        """See `Activity.along`."""
        units = torch.einsum("blhd,bld->blh", self.outputs, direction)
        return torch.cat([units, torch.zeros_like(units[..., :1])], dim=-1)

    def rows(self, rows: Tensor | slice) -> HeadActivity:
        """See `Activity.rows`."""
        return HeadActivity(self.outputs[rows])


class ConstantActivity(Activity):
    """Every node writes the same vector everywhere: vectors [n_nodes, d_model]."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def written(self, mask: Tensor) -> Tensor:
        """See `Activity.written`."""
        return mask.to(self.vectors.dtype) @ self.vectors

    def along(self, direction: Tensor) -> Tensor:
        """See `Activity.along`."""
        return direction @ self.vectors.T

    def rows(self, rows: Tensor | slice) -> ConstantActivity:
        """See `Activity.rows`."""
        return self


# ---- one layer


class LayerNodes(abc.ABC):
    """The nodes of one attention layer: `n` units and one error node after them."""

    kind: str
    """`lorsa`, `sae` or `mhsa`."""
    n: int
    """Units."""

    @abc.abstractmethod
    def read(self, x: Tensor, y: Tensor) -> Activity:
        """What the nodes write, from what the layer reads (x) and writes (y), each [batch, length, d_model]."""

    @abc.abstractmethod
    def mean(self, x: Tensor, y: Tensor, mask: Tensor) -> ConstantActivity:
        """Means over counted tokens, mask [batch, length]."""

    @abc.abstractmethod
    def parameters(self, units: Sequence[int]) -> int:
        """Weights that some units are computed with, shared ones counted once (biases left out)."""

    def none(self, like: Tensor) -> ConstantActivity:
        """Nodes that write nothing."""
        return ConstantActivity(like.new_zeros(self.n + 1, like.shape[-1]))


class SparseNodes(LayerNodes):
    """Heads of a Lorsa or features of an SAE, for raw activations."""

    def __init__(self, module: Lorsa | SAE, site: AttentionSite) -> None:
        """Wrap a module.

        Raises:
            UserError: it is a transcoder, or was made for a model of another width.
        """
        self.module, self.n, self.site = module, module.n_units, site
        self.kind = module.config.kind
        if self.kind not in KINDS:
            raise UserError("A transcoder does not rebuild the attention output; give a Lorsa or an SAE.")
        if module.W_O.shape[1] != site.d_model:
            raise UserError(
                f"The module has width {module.W_O.shape[1]}, the model {site.d_model}; give one trained on this model."
            )

    def read(self, x: Tensor, y: Tensor) -> SparseActivity:
        """See `LayerNodes.read`."""
        weight = self.module.W_O.detach()
        source = x if self.kind == "lorsa" else y
        indices, values = self.module.encode(source.to(weight.dtype))
        return SparseActivity(indices, values, weight, y.to(weight.dtype) - self.module.decode(indices, values))

    def mean(self, x: Tensor, y: Tensor, mask: Tensor) -> ConstantActivity:
        """See `LayerNodes.mean`."""
        activity = self.read(x, y)
        totals = activity.values.new_zeros(self.n).index_add_(
            0, activity.indices[mask].flatten(), activity.values[mask].flatten()
        )
        n = mask.sum().clamp_min(1)
        return ConstantActivity(
            torch.cat([totals[:, None] / n * activity.W_O, activity.error[mask].sum(dim=0, keepdim=True) / n])
        )

    def parameters(self, units: Sequence[int]) -> int:
        """See `LayerNodes.parameters`.

        SAE features read the layer's output, so the layer's own weights count as well.
        """
        own = 2 * self.module.W_O.shape[1] * len(units)
        if not units:
            return 0
        if isinstance(self.module, Lorsa):
            config = self.module.config
            return own + 2 * config.d_model * config.d_qk * len({unit // config.group_size for unit in units})
        return own + sum(weight.numel() for weight in (self.site.W_Q, self.site.W_K, self.site.W_V, self.site.W_O))


class MHSANodes(LayerNodes):
    """The heads of the attention layer itself."""

    kind = "mhsa"

    def __init__(self, site: AttentionSite) -> None:
        self.site, self.n = site, site.n_heads

    def read(self, x: Tensor, y: Tensor) -> HeadActivity:
        """See `LayerNodes.read`."""
        return HeadActivity(self.site.head_outputs(x.float()))

    def mean(self, x: Tensor, y: Tensor, mask: Tensor) -> ConstantActivity:
        """See `LayerNodes.mean`."""
        means = self.site.head_outputs(x.float())[mask].mean(dim=0)
        return ConstantActivity(torch.cat([means, torch.zeros_like(means[:1])]))

    def parameters(self, units: Sequence[int]) -> int:
        """See `LayerNodes.parameters`."""
        size = self.site.d_model * self.site.d_head
        shared = self.site.n_heads // self.site.n_kv_heads
        return size * (2 * len(units) + 2 * len({unit // shared for unit in units}))


# ---- whole model


class Node(NamedTuple):
    """One node, over all positions."""

    layer: int
    unit: int | None
    """None for the layer's error."""

    def __str__(self) -> str:
        return f"{self.layer}.error" if self.unit is None else f"{self.layer}.{self.unit}"


class SparseModel:
    """A language model with some attention layers taken apart into nodes."""

    def __init__(self, model: LanguageModel, layers: Mapping[int, LayerNodes]) -> None:
        """Take layers apart.

        Raises:
            UserError: no layer is named.
        """
        if not layers:
            raise UserError("No layer was named; give a trained module for at least one layer.")
        self.model, self.layers = model, dict(sorted(layers.items()))
        self.columns: dict[int, slice] = {}
        first = 0
        for layer, nodes in self.layers.items():
            self.columns[layer] = slice(first, first + nodes.n + 1)
            first += nodes.n + 1
        self.n_nodes = first

    @property
    def kind(self) -> str:
        """Kind of the first layer's units."""
        return next(iter(self.layers.values())).kind

    @property
    def error_nodes(self) -> list[int]:
        """Numbers of the error nodes, one a layer."""
        return [columns.stop - 1 for columns in self.columns.values()]

    def node(self, number: int) -> Node:
        """Layer and unit of a node number."""
        for layer, columns in self.columns.items():
            if columns.start <= number < columns.stop:
                return Node(layer, None if number == columns.stop - 1 else number - columns.start)
        raise UserError(f"There is no node {number} among {self.n_nodes}; choose one from 0 to {self.n_nodes - 1}.")

    def number(self, node: Node) -> int:
        """The number of a node.

        Raises:
            UserError: its layer is not taken apart, or has no such unit.
        """
        if node.layer not in self.columns:
            known = ", ".join(str(layer) for layer in self.layers)
            raise UserError(
                f"Layer {node.layer} has no {self.kind} here (layers {known} have); train one with `lorsa train --layer`."
            )
        columns, n = self.columns[node.layer], self.layers[node.layer].n
        if node.unit is not None and not 0 <= node.unit < n:
            raise UserError(f"Layer {node.layer} has no unit {node.unit}; choose one from 0 to {n - 1}.")
        return columns.start + (n if node.unit is None else node.unit)

    def mask(self, nodes: Sequence[int] | Tensor) -> Tensor:
        """A set of nodes as a mask [n_nodes] bool."""
        found = torch.zeros(self.n_nodes, dtype=torch.bool, device=self.model.device)
        found[torch.as_tensor(nodes, dtype=torch.long, device=found.device)] = True
        return found

    def parameters(self, nodes: Sequence[int]) -> int:
        """Weights that a set of nodes is computed with; error nodes have none of their own."""
        units: dict[int, list[int]] = {}
        for number in nodes:
            layer, unit = self.node(int(number))
            if unit is not None:
                units.setdefault(layer, []).append(unit)
        return sum(self.layers[layer].parameters(some) for layer, some in units.items())

    @torch.no_grad()
    def read(self, tokens: Tensor) -> dict[int, Activity]:
        """What all nodes write on some tokens [batch, length], in one pass."""
        captured = self.model.capture(tokens, list(self.layers))
        return {
            layer: nodes.read(captured[layer][0].float(), captured[layer][1].float())
            for layer, nodes in self.layers.items()
        }

    @torch.no_grad()
    def means(self, tokens: Tensor, mask: Tensor) -> dict[int, Activity]:
        """Mean activity over counted tokens; tokens and mask [n, length]."""
        captured = self.model.capture(tokens, list(self.layers))
        return {
            layer: nodes.mean(captured[layer][0].float(), captured[layer][1].float(), mask.to(self.model.device))
            for layer, nodes in self.layers.items()
        }

    def zeros(self) -> dict[int, Activity]:
        """Activity of nodes that write nothing."""
        like = torch.zeros(1, self.model.d_model, device=self.model.device)
        return {layer: nodes.none(like) for layer, nodes in self.layers.items()}

    @contextlib.contextmanager
    def removed(self, nodes: Tensor, instead: Mapping[int, Activity]) -> Iterator[None]:
        """Inside the context some nodes write what they write elsewhere.

        Args:
            nodes: mask [batch or 1, n_nodes] or, position by position, [batch or 1, length, n_nodes].
            instead: activity of the nodes elsewhere, for each layer.
        """
        masks = nodes[:, None] if nodes.dim() == 2 else nodes

        def replacer(layer: int) -> object:
            mask = masks[..., self.columns[layer]]

            def replace(x: Tensor, y: Tensor) -> Tensor:
                live = self.layers[layer].read(x.float(), y.float())
                return y - (live.written(mask) - instead[layer].written(mask)).to(y.dtype)

            return replace

        touched = [layer for layer, columns in self.columns.items() if bool(masks[..., columns].any())]
        with self.model.splice({layer: replacer(layer) for layer in touched}):  # type: ignore[misc]
            yield


def take_apart(model: LanguageModel, modules: Mapping[int, Lorsa | SAE] | Sequence[int]) -> SparseModel:
    """A model with Lorsa heads or SAE features (layer -> module for raw activations) or MHSA heads (layers) as nodes.

    Raises:
        UserError: see `SparseNodes` and `SparseModel`.
    """
    if isinstance(modules, Mapping):
        return SparseModel(model, {layer: SparseNodes(module, model.site(layer)) for layer, module in modules.items()})
    return SparseModel(model, {layer: MHSANodes(model.site(layer)) for layer in modules})


# ---- effects


class Baseline(NamedTuple):
    """What removed nodes write instead, for the prompts of one task."""

    kind: str
    """`zero`, `mean` or `resample`."""
    activity: dict[int, Activity]

    def rows(self, rows: slice) -> dict[int, Activity]:
        """For some prompts."""
        return {layer: each.rows(rows) for layer, each in self.activity.items()}


def baseline(sparse: SparseModel, task: Task, kind: str = "resample") -> Baseline:
    """What removed nodes write instead.

    Args:
        sparse: the model.
        task: its prompts.
        kind: `zero`; `mean` over all tokens of the task's clean and corrupted prompts; `resample`: at the same position
            of the paired corrupted prompt.

    Raises:
        UserError: unknown kind.
    """
    if kind == "zero":
        return Baseline(kind, sparse.zeros())
    if kind == "mean":
        ends = torch.arange(task.clean.shape[1]) <= task.position[:, None]
        return Baseline(kind, sparse.means(torch.cat([task.clean, task.corrupted]), torch.cat([ends, ends])))
    if kind == "resample":
        return Baseline(kind, sparse.read(task.corrupted))
    raise UserError(f"Ablation {kind!r} is not one of zero, mean and resample.")


def last_logits(model: LanguageModel, tokens: Tensor, position: Tensor) -> Tensor:
    """Logits at one position of each prompt: tokens [n, length], position [n] to [n, vocabulary]."""
    hidden = model._hidden(model._checked(tokens))
    return model.model.get_output_embeddings()(hidden[torch.arange(len(tokens)), position.to(hidden.device)]).float()


@torch.no_grad()
def clean_logits(model: LanguageModel, task: Task, batch_size: int = 32) -> Tensor:
    """The untouched model's logits after every clean prompt, [n, vocabulary]."""
    pieces = torch.arange(len(task.clean)).split(batch_size)
    return torch.cat([last_logits(model, task.clean[rows], task.position[rows]) for rows in pieces])


@torch.no_grad()
def measure(
    sparse: SparseModel,
    task: Task,
    removed: Tensor,
    instead: Baseline,
    name: str = "logit_difference",
    reference: Tensor | None = None,
    batch_size: int = 32,
) -> Tensor:
    """The metric of every prompt with each set of nodes removed.

    Args:
        sparse: the model.
        task: prompts.
        removed: sets of nodes, [n_sets, n_nodes] bool, or a set for each prompt, [n_sets, n_prompts, n_nodes].
        instead: of `baseline`, for the same prompts.
        name: of the metric, see `tasks.metric`.
        reference: the untouched model's logits, for `kl`.
        batch_size: prompts at a time.

    Returns:
        [n_sets, n_prompts].
    """
    found = torch.zeros(len(removed), len(task.clean))
    for number, nodes in enumerate(removed):
        for first in range(0, len(task.clean), batch_size):
            rows = slice(first, first + batch_size)
            mine = nodes[None] if nodes.dim() == 1 else nodes[rows]
            with sparse.removed(mine.to(sparse.model.device), instead.rows(rows)):
                logits = last_logits(sparse.model, task.clean[rows], task.position[rows])
            found[number, rows] = metric(
                name, logits, task.rows(rows), None if reference is None else reference[rows]
            ).cpu()
    return found


def effects(
    sparse: SparseModel,
    task: Task,
    nodes: Sequence[int],
    instead: Baseline,
    name: str = "logit_difference",
    batch_size: int = 32,
) -> Tensor:
    """Exact effect of each node on each prompt: the metric's fall when it alone is removed, [n_chosen, n_prompts].

    One pass of the model over all prompts for each node.
    """
    reference = clean_logits(sparse.model, task, batch_size) if name == "kl" else None
    sets = torch.stack([sparse.mask([]), *(sparse.mask([node]) for node in nodes)])
    found = measure(sparse, task, sets, instead, name, reference, batch_size)
    return found[0] - found[1:]


def attribute(
    sparse: SparseModel,
    task: Task,
    instead: Baseline,
    name: str = "logit_difference",
    steps: int = 1,
    batch_size: int = 16,
    reference: Tensor | None = None,
) -> Tensor:
    """Estimated effect of every node on each prompt, all at once: [n_prompts, n_nodes].

    With one step: gradient of the metric with respect to what a layer writes, at the clean prompt, times what the node
    writes minus what it writes elsewhere, summed over positions. With more steps the gradient is averaged along the
    straight line between the layer's output elsewhere and on the clean prompt (integrated gradients, midpoint rule, one
    layer at a time).

    Cost: one forward and backward pass for each batch, with more steps one for each layer and step.
    """
    found = torch.zeros(len(task.clean), sparse.n_nodes)
    for first in range(0, len(task.clean), batch_size):
        rows = slice(first, first + batch_size)
        part, other = task.rows(rows), instead.rows(rows)
        clean = sparse.read(part.clean)
        ref = None if reference is None else reference[rows]
        if steps == 1:
            slopes = gradients(sparse, part, name, {}, list(sparse.layers), ref)
        else:
            slopes = {
                layer: _mean_gradient(sparse, part, name, layer, clean[layer], other[layer], steps, ref)
                for layer in sparse.layers
            }
        for layer, columns in sparse.columns.items():
            change = clean[layer].along(slopes[layer]) - other[layer].along(slopes[layer])
            found[rows, columns] = change.sum(dim=1).cpu()
    return found


def gradients(
    sparse: SparseModel,
    task: Task,
    name: str,
    shifts: Mapping[int, Tensor],
    layers: Sequence[int],
    reference: Tensor | None,
) -> dict[int, Tensor]:
    """Gradient of the summed metric with respect to what layers write, where some outputs are shifted: [batch, length, d_model] each."""
    leaves: dict[int, Tensor] = {}

    def adder(layer: int) -> object:
        def add(x: Tensor, y: Tensor) -> Tensor:
            leaves[layer] = torch.zeros_like(y).requires_grad_()
            return y + shifts.get(layer, 0.0) + leaves[layer]

        return add

    with torch.enable_grad(), sparse.model.splice({layer: adder(layer) for layer in layers}):  # type: ignore[misc]
        logits = last_logits(sparse.model, task.clean, task.position)
        total = metric(name, logits, task, reference).sum()
        parts = torch.autograd.grad(total, [leaves[layer] for layer in layers])
    return {layer: part.float() for layer, part in zip(layers, parts, strict=True)}


def _mean_gradient(
    sparse: SparseModel,
    task: Task,
    name: str,
    layer: int,
    clean: Activity,
    other: Activity,
    steps: int,
    reference: Tensor | None,
) -> Tensor:
    every = torch.ones(1, 1, sparse.layers[layer].n + 1, dtype=torch.bool, device=sparse.model.device)
    change = other.written(every) - clean.written(every)
    shares = [(step + 0.5) / steps for step in range(steps)]
    parts = [gradients(sparse, task, name, {layer: share * change}, [layer], reference)[layer] for share in shares]
    return torch.stack(parts).mean(dim=0)


@torch.no_grad()
def path_effect(
    sparse: SparseModel,
    task: Task,
    senders: Sequence[int],
    receivers: Sequence[int],
    instead: Baseline,
    name: str = "logit_difference",
) -> Tensor:
    """The metric's fall when the change of the senders reaches the receivers alone, [n_prompts].

    Two passes. In the first the senders are removed while all other nodes write what they wrote on the clean prompt, so
    that the change travels through the residual stream, the MLPs and the layers that are not taken apart; what the
    receivers would write is recorded. In the second only the receivers write that. Without receivers the result is the
    first pass's: the effect on the logits that passes through no other node.
    """
    clean, other = sparse.read(task.clean), instead.activity
    outputs = {layer: y for layer, (_, y) in sparse.model.capture(task.clean, list(sparse.layers)).items()}
    sent, received = sparse.mask(senders)[None, None], sparse.mask(receivers)[None]
    found: dict[int, Activity] = {}

    def freezer(layer: int) -> object:
        mask = sent[..., sparse.columns[layer]]

        def freeze(x: Tensor, y: Tensor) -> Tensor:
            found[layer] = sparse.layers[layer].read(x.float(), y.float())
            return outputs[layer] - (clean[layer].written(mask) - other[layer].written(mask)).to(y.dtype)

        return freeze

    with sparse.model.splice({layer: freezer(layer) for layer in sparse.layers}):  # type: ignore[misc]
        logits = last_logits(sparse.model, task.clean, task.position)
    if receivers:
        with sparse.removed(received, found):
            logits = last_logits(sparse.model, task.clean, task.position)
    untouched = last_logits(sparse.model, task.clean, task.position)
    reference = untouched if name == "kl" else None
    return (metric(name, untouched, task, reference) - metric(name, logits, task, reference)).cpu()
