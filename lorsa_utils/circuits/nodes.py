"""A model whose attention layers are decomposed into nodes, and what it says when some nodes are removed.

At each chosen layer the attention output is an exact sum of nodes:

    output = bias + sum of what its units write + error          (Lorsa heads, SAE features)
    output = bias + sum of what its MHSA heads write             (MHSA heads; the error is 0)

The error is a node like the others. Other layers and the MLPs stay as they are. Nodes are numbered consecutively: units
of the first layer, its error, units of the second layer, and so on.

Removed nodes write what they write elsewhere (`baseline`). Removing nothing gives the model's own logits bit for bit.
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
    MHSAHeads,
    SparseActivity,
    SparseUnits,
    Units,
    ablate,
    units_of,
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
        return f"{self.layer}.{'error' if self.unit is None else self.unit}"


class SparseModel:
    """A language model with some attention layers decomposed into nodes."""

    def __init__(self, model: LanguageModel, layers: Mapping[int, Units]) -> None:
        """UserError if no layer is named, or a module is for a model of another width."""
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
        """Of the first layer's units."""
        return next(iter(self.layers.values())).kind

    @property
    def error_nodes(self) -> list[int]:
        """One per layer."""
        return [columns.stop - 1 for columns in self.columns.values()]

    def node(self, number: int) -> Node:
        """Layer and unit of a node number."""
        layer = next(layer for layer, columns in self.columns.items() if number < columns.stop)
        unit = number - self.columns[layer].start
        return Node(layer, unit if unit < self.layers[layer].n else None)

    def mask(self, nodes: Sequence[int] | Tensor) -> Tensor:
        """A set of nodes as a mask [n_nodes] bool."""
        mask = torch.zeros(self.n_nodes, dtype=torch.bool, device=self.model.device)
        mask[torch.as_tensor(nodes, dtype=torch.long, device=mask.device)] = True
        return mask

    def parameters(self, nodes: Sequence[int]) -> int:
        """Weights that a set of nodes is computed with; errors have none."""
        return sum(
            self.layers[layer].parameters([node - own.start for node in nodes if own.start <= node < own.stop - 1])
            for layer, own in self.columns.items()
        )

    @torch.no_grad()
    def read(self, tokens: Tensor) -> dict[int, SparseActivity | HeadActivity]:
        """What all nodes write on tokens [batch, length], in one pass."""
        captured = self.model.capture(tokens, list(self.layers))
        return {layer: units.activity(*map(Tensor.float, captured[layer])) for layer, units in self.layers.items()}

    def by_layer(self, nodes: Tensor) -> dict[int, Tensor]:
        """A mask [..., n_nodes] split by layer."""
        return {layer: nodes[..., columns] for layer, columns in self.columns.items()}

    def removed(self, nodes: Tensor, instead: Elsewhere) -> contextlib.AbstractContextManager[None]:
        """Inside the context the nodes of a mask write what they write elsewhere.

        The mask is [n_nodes], [batch or 1, n_nodes] or, by position, [batch or 1, length, n_nodes].
        """
        return ablate(self.model, self.layers, self.by_layer(nodes), instead)


def decompose(model: LanguageModel, modules: Mapping[int, Lorsa | SAE] | Sequence[int]) -> SparseModel:
    """With Lorsa heads or SAE features (modules for raw activations) or MHSA heads (layers alone) as nodes.

    Raises:
        UserError: a module is a transcoder, or as `SparseModel`.
    """

    def units(layer: int) -> Units:
        if not isinstance(modules, Mapping):
            return MHSAHeads(model.site(layer))
        return units_of(model, layer, modules[layer])

    return SparseModel(model, {layer: units(layer) for layer in modules})


@torch.no_grad()
def baseline(sparse: SparseModel, task: Task, kind: str = "resample") -> Elsewhere:
    """What removed nodes write instead; UserError for an unknown kind.

    Nothing (`zero`), their mean over all tokens of the task's prompts (`mean`), or what they write at the same position
    of the paired corrupted prompt (`resample`).
    """
    device, width = sparse.model.device, sparse.model.d_model
    if kind == "zero":
        zeros = {layer: torch.zeros(units.n + 1, width, device=device) for layer, units in sparse.layers.items()}
        return {layer: ConstantActivity(vectors) for layer, vectors in zeros.items()}
    if kind == "mean":
        ends = (torch.arange(task.clean.shape[1]) <= task.position[:, None]).to(device)
        activity = sparse.read(torch.cat([task.clean, task.corrupted]))
        return {layer: of_layer.mean(torch.cat([ends, ends])) for layer, of_layer in activity.items()}
    if kind == "resample":
        return sparse.read(task.corrupted)
    raise UserError(f"Ablation {kind!r} is not one of zero, mean and resample.")


def last_logits(model: LanguageModel, task: Task) -> Tensor:
    """The model's logits, as it runs now, after every clean prompt in one batch: [n, vocabulary]."""
    hidden = model._hidden(model._checked(task.clean))
    rows = torch.arange(len(task))
    return model.model.get_output_embeddings()(hidden[rows, task.position.to(hidden.device)]).float()


@torch.no_grad()
def clean_logits(model: LanguageModel, task: Task, batch_size: int = 32) -> Tensor:
    """In batches, without gradients."""
    batches = torch.arange(len(task)).split(batch_size)
    return torch.cat([last_logits(model, task.rows(rows)) for rows in batches])


class Experiment:
    """Nodes removed from a model on the clean prompts of a task.

    Removed nodes write `instead`, a kind of `baseline` or activities by layer. The effect of a node is the fall of
    `metric` (`tasks.metric`) when it alone is removed: `effects` measures it, `attribute` estimates it by gradients,
    `path_effect` measures the part that goes through chosen nodes alone.
    """

    def __init__(
        self,
        sparse: SparseModel,
        task: Task,
        instead: Elsewhere | str = "resample",
        metric: str = "logit_difference",
        batch_size: int = 32,
    ) -> None:
        self.sparse, self.task, self.metric, self.batch_size = sparse, task, metric, batch_size
        self.instead: Elsewhere = baseline(sparse, task, instead) if isinstance(instead, str) else instead

    def rows(self, rows: slice) -> Experiment:
        """On some of the prompts."""
        instead = {layer: activity.rows(rows) for layer, activity in self.instead.items()}
        return Experiment(self.sparse, self.task.rows(rows), instead, self.metric, self.batch_size)

    def _batches(self, size: int) -> Iterator[tuple[slice, Experiment]]:
        for first in range(0, len(self.task), size):
            rows = slice(first, first + size)
            yield rows, self.rows(rows)

    def _reference(self) -> Tensor | None:
        """What the metric `kl` compares with."""
        return clean_logits(self.sparse.model, self.task) if self.metric == "kl" else None

    @torch.no_grad()
    def measure(self, removed: Tensor) -> Tensor:
        """The metric of every prompt without each set of nodes, [n_sets, n_prompts].

        `removed` is [n_sets, n_nodes] bool, or with a set for each prompt [n_sets, n_prompts, n_nodes].
        """
        values = torch.zeros(len(removed), len(self.task))
        for rows, batch in self._batches(self.batch_size):
            reference = batch._reference()
            for number, nodes in enumerate(removed):
                with self.sparse.removed(nodes if nodes.dim() == 1 else nodes[rows], batch.instead):
                    logits = last_logits(self.sparse.model, batch.task)
                values[number, rows] = metric(self.metric, logits, batch.task, reference).cpu()
        return values

    def effects(self, nodes: Sequence[int]) -> Tensor:
        """Exact effect of each node on each prompt, [n_chosen, n_prompts]; one pass over all prompts per node."""
        sets = torch.stack([self.sparse.mask([]), *(self.sparse.mask([node]) for node in nodes)])
        values = self.measure(sets)
        return values[0] - values[1:]

    def attribute(self, steps: int = 1) -> Tensor:
        """Estimated effect of every node on each prompt, [n_prompts, n_nodes].

        With one step (attribution patching, Nanda 2023): gradient of the metric by a layer's output on the clean
        prompt, times what the node writes minus what it writes elsewhere, summed over positions. More steps average the
        gradient along the line between the layer's outputs elsewhere and on the clean prompt (integrated gradients,
        Sundararajan et al. 2017, midpoint rule), with a pass per layer and step.
        """
        scores = torch.zeros(len(self.task), self.sparse.n_nodes)
        for rows, batch in self._batches(max(1, self.batch_size // 2)):
            clean = self.sparse.read(batch.task.clean)
            slopes = batch.gradients() if steps == 1 else batch._mean_gradients(clean, steps)
            for layer, columns in self.sparse.columns.items():
                change = clean[layer].along(slopes[layer]) - batch.instead[layer].along(slopes[layer])
                scores[rows, columns] = change.sum(dim=1).cpu()
        return scores

    def gradients(self, shifts: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
        """Gradients of the summed metric by what the layers write, [n_prompts, length, d_model] each.

        With `shifts`, by what these layers alone write, plus the shift.
        """
        leaves: dict[int, Tensor] = {}
        reference = self._reference()

        def adder(layer: int) -> Replacement:
            def add(x: Tensor, y: Tensor) -> Tensor:
                leaves[layer] = torch.zeros_like(y).requires_grad_()
                return y + (shifts[layer] if shifts else 0.0) + leaves[layer]

            return add

        replacements = {layer: adder(layer) for layer in shifts or self.sparse.layers}
        with torch.enable_grad(), self.sparse.model.splice(replacements):
            total = metric(self.metric, last_logits(self.sparse.model, self.task), self.task, reference).sum()
            slopes = torch.autograd.grad(total, [leaves[layer] for layer in replacements])
        return {layer: slope.float() for layer, slope in zip(replacements, slopes, strict=True)}

    def _mean_gradients(self, clean: Elsewhere, steps: int) -> dict[int, Tensor]:
        slopes = {}
        for layer, units in self.sparse.layers.items():
            every = torch.ones(1, 1, units.n + 1, dtype=torch.bool, device=self.sparse.model.device)
            change = self.instead[layer].written(every) - clean[layer].written(every)
            along = [self.gradients({layer: (step + 0.5) / steps * change})[layer] for step in range(steps)]
            slopes[layer] = torch.stack(along).mean(dim=0)
        return slopes

    @torch.no_grad()
    def path_effect(self, senders: Sequence[int], receivers: Sequence[int]) -> Tensor:
        """The metric's fall when the change of the senders reaches the receivers alone, [n_prompts].

        Path patching (Goldowsky-Dill et al. 2023): in a first pass the senders are removed and all other nodes write
        what they wrote on the clean prompt, so the change travels through everything that is not decomposed. In a
        second, the receivers alone write what they would have written in the first. Without receivers the first counts:
        the effect on the logits through no other node.
        """
        sparse, tokens = self.sparse, self.task.clean
        clean, outputs = sparse.read(tokens), sparse.model.capture(tokens, list(sparse.layers))
        sent = sparse.by_layer(sparse.mask(senders)[None, None])
        live: dict[int, Activity] = {}

        def freezer(layer: int) -> Replacement:
            def freeze(x: Tensor, y: Tensor) -> Tensor:
                live[layer] = sparse.layers[layer].activity(x.float(), y.float())
                change = clean[layer].written(sent[layer]) - self.instead[layer].written(sent[layer])
                return outputs[layer][1] - change.to(y.dtype)

            return freeze

        with sparse.model.splice({layer: freezer(layer) for layer in sparse.layers}):
            logits = last_logits(sparse.model, self.task)
        if receivers:
            with sparse.removed(sparse.mask(receivers), live):
                logits = last_logits(sparse.model, self.task)
        untouched = last_logits(sparse.model, self.task)
        before, after = (metric(self.metric, of_pass, self.task, untouched) for of_pass in (untouched, logits))
        return (before - after).cpu()
