"""A model whose attention layers are decomposed into nodes, and what it says when some nodes are removed.

At each chosen layer the attention output is an exact sum of nodes:

    output = bias + sum of what its units write + error          (Lorsa heads, SAE features)
    output = bias + sum of what its MHSA heads write             (MHSA heads; the error is 0)

The error is a node like the others. Other layers and the MLPs stay as they are. Nodes are numbered consecutively: units
of the first layer, its error, units of the second layer, and so on.

Removing nodes (`units.ablate`) replaces what they write by what they write elsewhere (`baseline`). Removing nothing
gives the model's own logits bit for bit.

The effect of a node is the metric's fall when it alone is removed. `attribute` estimates effects by gradients
(attribution patching, Nanda 2023; integrated gradients, Sundararajan et al. 2017), `effects` measures them,
`path_effect` measures those through chosen nodes alone (path patching, Goldowsky-Dill et al. 2023).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.tasks import Task, metric
from lorsa_utils.heads.units import (
    Activity,
    ConstantActivity,
    HeadActivity,
    LorsaHeads,
    MHSAHeads,
    SAEFeatures,
    SparseActivity,
    SparseUnits,
    Units,
    ablate,
)
from lorsa_utils.lorsa import SAE, Lorsa
from lorsa_utils.models import LanguageModel, Replacement

Elsewhere = Mapping[int, Activity]
"""What removed nodes write instead, by layer."""


class Node(NamedTuple):
    """One node, over all positions."""

    layer: int
    unit: int | None
    """None for the layer's error."""

    def __str__(self) -> str:
        return f"{self.layer}.error" if self.unit is None else f"{self.layer}.{self.unit}"


class SparseModel:
    """A language model with some attention layers decomposed into nodes."""

    def __init__(self, model: LanguageModel, layers: Mapping[int, Units]) -> None:
        """Raises a UserError if no layer is named, or a module is for a model of another width."""
        if not layers:
            raise UserError("No layer was named; give a trained module for at least one layer.")
        self.model, self.layers = model, dict(sorted(layers.items()))
        self.columns: dict[int, slice] = {}
        self.n_nodes = 0
        for layer, units in self.layers.items():
            if isinstance(units, SparseUnits) and (width := units.module.W_O.shape[1]) != model.d_model:
                raise UserError(
                    f"The module has width {width}, the model {model.d_model}; give one trained on this model."
                )
            self.columns[layer] = slice(self.n_nodes, self.n_nodes + units.n + 1)
            self.n_nodes += units.n + 1

    @property
    def kind(self) -> str:
        """Kind of the first layer's units."""
        return next(iter(self.layers.values())).kind

    @property
    def error_nodes(self) -> list[int]:
        """One per layer."""
        return [columns.stop - 1 for columns in self.columns.values()]

    def node(self, number: int) -> Node:
        """Layer and unit of a node number."""
        layer = [layer for layer, columns in self.columns.items() if columns.start <= number][-1]
        unit = number - self.columns[layer].start
        return Node(layer, unit if unit < self.layers[layer].n else None)

    def mask(self, nodes: Sequence[int] | Tensor) -> Tensor:
        """A set of nodes as a mask [n_nodes] bool."""
        mask = torch.zeros(self.n_nodes, dtype=torch.bool, device=self.model.device)
        mask[torch.as_tensor(nodes, dtype=torch.long, device=mask.device)] = True
        return mask

    def parameters(self, nodes: Sequence[int]) -> int:
        """Weights that a set of nodes is computed with; errors have none."""
        chosen: dict[int, list[int]] = {}
        for layer, unit in map(self.node, map(int, nodes)):
            if unit is not None:
                chosen.setdefault(layer, []).append(unit)
        return sum(self.layers[layer].parameters(units) for layer, units in chosen.items())

    @torch.no_grad()
    def read(self, tokens: Tensor) -> dict[int, SparseActivity | HeadActivity]:
        """What all nodes write on tokens [batch, length], in one pass."""
        captured = self.model.capture(tokens, list(self.layers))
        return {
            layer: units.activity(*(side.float() for side in captured[layer])) for layer, units in self.layers.items()
        }

    @torch.no_grad()
    def means(self, tokens: Tensor, mask: Tensor) -> dict[int, ConstantActivity]:
        """Mean activity over counted tokens; tokens and mask [n, length]."""
        return {layer: activity.mean(mask.to(self.model.device)) for layer, activity in self.read(tokens).items()}

    def zeros(self) -> dict[int, ConstantActivity]:
        """Activity of nodes that write nothing."""
        width, device = self.model.d_model, self.model.device
        return {
            layer: ConstantActivity(torch.zeros(units.n + 1, width, device=device))
            for layer, units in self.layers.items()
        }

    def by_layer(self, nodes: Tensor) -> dict[int, Tensor]:
        """A mask [..., n_nodes] split by layer."""
        return {layer: nodes[..., columns] for layer, columns in self.columns.items()}

    def removed(self, nodes: Tensor, instead: Elsewhere) -> contextlib.AbstractContextManager[None]:
        """Inside the context the nodes of a mask write what they write elsewhere.

        The mask is [n_nodes], [batch or 1, n_nodes] or, by position, [batch or 1, length, n_nodes].
        """
        return ablate(self.model, self.layers, self.by_layer(nodes), instead)


def decompose(model: LanguageModel, modules: Mapping[int, Lorsa | SAE] | Sequence[int]) -> SparseModel:
    """A model with Lorsa heads or SAE features (layer -> module for raw activations) or MHSA heads (layers) as nodes.

    Raises:
        UserError: no layer is named, a module is a transcoder, or it was made for a model of another width.
    """
    if not isinstance(modules, Mapping):
        return SparseModel(model, {layer: MHSAHeads(model.site(layer)) for layer in modules})
    return SparseModel(
        model,
        {
            layer: LorsaHeads(module) if isinstance(module, Lorsa) else SAEFeatures(module, model.site(layer))
            for layer, module in modules.items()
        },
    )


# ---- effects


def baseline(sparse: SparseModel, task: Task, kind: str = "resample") -> Elsewhere:
    """What removed nodes write instead.

    Nothing (`zero`), their mean over all tokens of the task's prompts (`mean`), or what they write at the same position
    of the paired corrupted prompt (`resample`).

    Raises:
        UserError: unknown kind.
    """
    if kind == "zero":
        return sparse.zeros()
    if kind == "mean":
        ends = torch.arange(task.clean.shape[1]) <= task.position[:, None]
        return sparse.means(torch.cat([task.clean, task.corrupted]), torch.cat([ends, ends]))
    if kind == "resample":
        return sparse.read(task.corrupted)
    raise UserError(f"Ablation {kind!r} is not one of zero, mean and resample.")


def _batches(task: Task, instead: Elsewhere, batch_size: int) -> Iterator[tuple[slice, Task, Elsewhere]]:
    for first in range(0, len(task.clean), batch_size):
        rows = slice(first, first + batch_size)
        yield rows, task.rows(rows), {layer: activity.rows(rows) for layer, activity in instead.items()}


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
    instead: Elsewhere,
    name: str = "logit_difference",
    batch_size: int = 32,
) -> Tensor:
    """The metric `name` (`tasks.metric`) of every prompt without each set of nodes, [n_sets, n_prompts].

    `removed` is [n_sets, n_nodes] bool, or with a set for each prompt [n_sets, n_prompts, n_nodes].
    """
    values = torch.zeros(len(removed), len(task.clean))
    for rows, batch, elsewhere in _batches(task, instead, batch_size):
        reference = clean_logits(sparse.model, batch, batch_size) if name == "kl" else None
        for number, nodes in enumerate(removed):
            with sparse.removed(nodes if nodes.dim() == 1 else nodes[rows], elsewhere):
                logits = last_logits(sparse.model, batch.clean, batch.position)
            values[number, rows] = metric(name, logits, batch, reference).cpu()
    return values


def effects(
    sparse: SparseModel,
    task: Task,
    nodes: Sequence[int],
    instead: Elsewhere,
    name: str = "logit_difference",
    batch_size: int = 32,
) -> Tensor:
    """Exact effect of each node on each prompt, [n_chosen, n_prompts]; one pass over all prompts per node."""
    sets = torch.stack([sparse.mask([]), *(sparse.mask([node]) for node in nodes)])
    values = measure(sparse, task, sets, instead, name, batch_size)
    return values[0] - values[1:]


def attribute(
    sparse: SparseModel,
    task: Task,
    instead: Elsewhere,
    name: str = "logit_difference",
    steps: int = 1,
    batch_size: int = 16,
) -> Tensor:
    """Estimated effect of every node on each prompt, [n_prompts, n_nodes].

    With one step: gradient of the metric by a layer's output on the clean prompt, times what the node writes minus what
    it writes elsewhere, summed over positions. More steps average the gradient along the straight line between the
    layer's outputs elsewhere and on the clean prompt (integrated gradients, midpoint rule), with a pass per layer and
    step.
    """
    scores = torch.zeros(len(task.clean), sparse.n_nodes)
    for rows, batch, other in _batches(task, instead, batch_size):
        clean = sparse.read(batch.clean)
        if steps == 1:
            slopes = gradients(sparse, batch, name, {}, list(sparse.layers))
        else:
            slopes = {
                layer: _mean_gradient(sparse, batch, name, layer, clean[layer], other[layer], steps)
                for layer in sparse.layers
            }
        for layer, columns in sparse.columns.items():
            change = clean[layer].along(slopes[layer]) - other[layer].along(slopes[layer])
            scores[rows, columns] = change.sum(dim=1).cpu()
    return scores


def gradients(
    sparse: SparseModel, task: Task, name: str, shifts: Mapping[int, Tensor], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Gradients of the summed metric by what layers write plus `shifts`, [batch, length, d_model] each."""
    leaves: dict[int, Tensor] = {}
    reference = clean_logits(sparse.model, task) if name == "kl" else None

    def adder(layer: int) -> Replacement:
        def add(x: Tensor, y: Tensor) -> Tensor:
            leaves[layer] = torch.zeros_like(y).requires_grad_()
            return y + shifts.get(layer, 0.0) + leaves[layer]

        return add

    with torch.enable_grad(), sparse.model.splice({layer: adder(layer) for layer in layers}):
        logits = last_logits(sparse.model, task.clean, task.position)
        total = metric(name, logits, task, reference).sum()
        slopes = torch.autograd.grad(total, [leaves[layer] for layer in layers])
    return {layer: slope.float() for layer, slope in zip(layers, slopes, strict=True)}


def _mean_gradient(
    sparse: SparseModel, task: Task, name: str, layer: int, clean: Activity, other: Activity, steps: int
) -> Tensor:
    every = torch.ones(1, 1, sparse.layers[layer].n + 1, dtype=torch.bool, device=sparse.model.device)
    change = other.written(every) - clean.written(every)
    shares = [(step + 0.5) / steps for step in range(steps)]
    slopes = [gradients(sparse, task, name, {layer: share * change}, [layer])[layer] for share in shares]
    return torch.stack(slopes).mean(dim=0)


@torch.no_grad()
def path_effect(
    sparse: SparseModel,
    task: Task,
    senders: Sequence[int],
    receivers: Sequence[int],
    instead: Elsewhere,
    name: str = "logit_difference",
) -> Tensor:
    """The metric's fall when the change of the senders reaches the receivers alone, [n_prompts].

    In a first pass the senders are removed and all other nodes write what they wrote on the clean prompt, so the change
    travels through everything that is not decomposed. In a second pass the receivers alone write what they would have
    written in the first. Without receivers the result is the first pass's: the effect on the logits through no other
    node.
    """
    clean = sparse.read(task.clean)
    outputs = {layer: y for layer, (_, y) in sparse.model.capture(task.clean, list(sparse.layers)).items()}
    sent = sparse.by_layer(sparse.mask(senders)[None, None])
    live: dict[int, Activity] = {}

    def freezer(layer: int) -> Replacement:
        def freeze(x: Tensor, y: Tensor) -> Tensor:
            live[layer] = sparse.layers[layer].activity(x.float(), y.float())
            change = clean[layer].written(sent[layer]) - instead[layer].written(sent[layer])
            return outputs[layer] - change.to(y.dtype)

        return freeze

    with sparse.model.splice({layer: freezer(layer) for layer in sparse.layers}):
        logits = last_logits(sparse.model, task.clean, task.position)
    if receivers:
        with sparse.removed(sparse.mask(receivers), live):
            logits = last_logits(sparse.model, task.clean, task.position)
    untouched = last_logits(sparse.model, task.clean, task.position)
    reference = untouched if name == "kl" else None
    return (metric(name, untouched, task, reference) - metric(name, logits, task, reference)).cpu()
