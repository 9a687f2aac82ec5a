"""Attribution graphs of one prompt: exact edges through the frozen model, QK attribution, pruning, and the file that viewers read.

**Frozen model.** On one prompt, hold fixed what makes a Transformer non-linear: the scale of every norm, the attention
patterns of the layers that are not taken apart, the factor by which an MLP's activation function scales its input (for
a gated MLP: the gate). What is left is linear, and has the same values. The activation of a Lorsa head is linear too,
given its pattern: z_i = sum_j A_ij (w_v . x_j + b_V); and that of an SAE feature, given the patterns of its layer. So
the logit difference, or any node's activation, is exactly the sum over sources (token embeddings, what earlier nodes
write, errors, biases) of source times coefficient. These products are the edges. A path ends at the first node that it
meets, so that nothing counts twice.

**QK attribution.** A Lorsa head's score for query i and key j is bilinear in what the two sides read, and each side is
a sum of parts of the residual stream (embedding, single nodes, errors, whole MLPs, whole other attention layers,
biases). The score is exactly the sum over pairs of parts.

**File.** The JSON of circuit-tracer (github.com/decoderesearch/circuit-tracer, MIT), which Neuronpedia's graph viewer
reads: `metadata`, `qParams`, `nodes`, `links`. Nodes of all kinds have the `feature_type` names of that schema; what
the kit adds (`kind`, `page`) stands under keys of its own, which those readers pass over.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorsa_utils import ops, store
from lorsa_utils.circuits.nodes import SparseActivity, SparseModel, SparseNodes
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import final_norm
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import AttentionSite, LanguageModel

MAX_LENGTH = 128
MAX_NODES = 5_000
RANKED_EVERY = 16
"""Nodes traced before the order of the others is computed anew."""


# ---- frozen model


def _frozen_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A LayerNorm or RMSNorm with its scale held fixed."""
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (x.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
        return centred * scale.detach() * norm.weight + (0.0 if norm.bias is None else norm.bias)
    scale = (x.square().mean(dim=-1, keepdim=True) + float(norm.variance_epsilon)).rsqrt()  # type: ignore[arg-type]
    return x * scale.detach() * norm.weight


@contextlib.contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """Inside the context the model's outputs stay the same and its gradients are those of the frozen model (see above)."""
    architecture = model.architecture

    def norm_hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _frozen_norm(module, arguments[0])

    def gate_hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if architecture.gated:
            return output.detach()
        x = arguments[0]
        return x * torch.where(x.abs() > 1e-6, output / torch.where(x.abs() > 1e-6, x, 1.0), 0.5).detach()

    def fixed_hook(fix: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda module, arguments, output: fix(model.config, output)

    hooks: list[tuple[nn.Module, Any]] = [(final_norm(model), norm_hook)]
    for layer in range(model.n_layers):
        hooks += [(model.block(layer).get_submodule(name), norm_hook) for name in architecture.norms]
        hooks += [(model.block(layer).get_submodule(architecture.activation), gate_hook)]
        hooks += [(model.block(layer).get_submodule(name), fixed_hook(fix)) for name, fix in architecture.fixed.items()]
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


# ---- tracing


class Source(NamedTuple):
    """Where an edge can come from."""

    kind: str
    """`embedding`, `unit`, `error` or `bias`."""
    layer: int
    """-1 for embeddings."""
    unit: int
    """-1 unless it is a unit."""
    position: int
    """-1 for biases, which are summed over positions."""
    value: float
    """Activation times the norm of what is written for a unit, else the norm of the vector."""


class Target(NamedTuple):
    """What edges can lead to: a unit at a position, or (layer -1) the logit difference at the last position."""

    layer: int
    unit: int
    position: int


class Trace:
    """One prompt, its sources, and edges on demand."""

    def __init__(self, sparse: SparseModel, tokens: Tensor, answers: Sequence[int], wrong: Sequence[int]) -> None:
        """Read a prompt.

        Args:
            sparse: with Lorsa heads or SAE features.
            tokens: [length].
            answers: the logit difference is the mean logit of these tokens
            wrong: minus the mean logit of these (none: minus the mean of all logits).

        Raises:
            UserError: the layers hold MHSA heads, or the prompt is longer than `MAX_LENGTH`.
        """
        if any(not isinstance(nodes, SparseNodes) for nodes in sparse.layers.values()):
            raise UserError(
                "An MHSA head has no single activation that edges could lead to; trace Lorsa heads or SAE features."
            )
        if len(tokens) > MAX_LENGTH:
            gigabytes = _bytes_of_the_pass(sparse.model, len(tokens)) / 1e9
            raise UserError(
                f"The prompt has {len(tokens)} tokens, about {gigabytes:.1f} GB for the pass that edges are read from; "
                f"cut it to {MAX_LENGTH} tokens."
            )
        self.sparse, self.model, self.tokens = sparse, sparse.model, tokens.to(sparse.model.device)
        self.answers, self.wrong = list(answers), list(wrong)
        self.activity: dict[int, SparseActivity] = sparse.read(tokens[None])  # type: ignore[assignment]
        captured = self.model.capture(tokens[None], list(sparse.layers))
        self.outputs = {layer: y.float() for layer, (_, y) in captured.items()}
        self.inputs = {layer: x.float() for layer, (x, _) in captured.items()}
        self.embedding = _embedding(self.model, self.tokens)
        self.sources = self._list_sources()
        self.place = {
            (source.kind, source.layer, source.unit, source.position): number
            for number, source in enumerate(self.sources)
        }
        """(kind, layer, unit, position) -> number of the source."""
        self._cut_model()

    def _list_sources(self) -> list[Source]:
        found = [Source("embedding", -1, -1, i, float(row.norm())) for i, row in enumerate(self.embedding)]
        self._units: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, activity in self.activity.items():
            position, slot = (activity.values[0] != 0).nonzero(as_tuple=True)
            unit, value = activity.indices[0, position, slot], activity.values[0, position, slot]
            self._units[layer] = position, value[:, None] * activity.W_O[unit]
            sizes = self._units[layer][1].norm(dim=1) * value.sign()
            found += [
                Source("unit", layer, int(u), int(p), float(s))
                for u, p, s in zip(unit.tolist(), position.tolist(), sizes, strict=True)
            ]
            found += [Source("error", layer, -1, i, float(row.norm())) for i, row in enumerate(activity.error[0])]
            found.append(Source("bias", layer, -1, -1, float(self._module(layer).b_O.norm())))
        return found

    def _module(self, layer: int) -> Any:
        return self.sparse.layers[layer].module  # type: ignore[attr-defined]

    def edges(self, targets: Sequence[Target], progress: bool = False) -> tuple[Tensor, Tensor]:
        """Edges from all sources to some targets.

        Args:
            targets: units at positions, or the logit difference.
            progress: show a bar.

        Returns:
            edges [n_targets, n_sources] and the targets' values [n_targets]. A row sums to its target's value less the
            model's other biases (none in a Llama, but for b_V times the pattern's mass: `constants` has that part of
            each target).
        """
        rows, values, constants = [], [], []
        for target in tqdm(targets, desc="edges", disable=not progress):
            with torch.enable_grad():
                value, constant = self._value(target)
                gradients = torch.autograd.grad(value, self._cuts, allow_unused=True, retain_graph=True)
            rows.append(
                self._products(
                    [
                        torch.zeros_like(cut) if part is None else part
                        for cut, part in zip(self._cuts, gradients, strict=True)
                    ]
                )
            )
            values.append(value.detach().cpu())
            constants.append(constant.detach().cpu())
        self.constants = torch.stack(constants)
        return torch.stack(rows), torch.stack(values)

    def _cut_model(self) -> None:
        """Run the frozen model once, cut where sources write; every target's gradient is then a walk back through that one pass."""
        cuts: dict[int, Tensor] = {}
        self._reads: dict[int, Tensor] = {}

        def cutter(layer: int) -> Any:
            def cut(x: Tensor, y: Tensor) -> Tensor:
                self._reads[layer] = x[0]
                cuts[layer] = self.outputs[layer].clone().requires_grad_()
                return cuts[layer]

            return cut

        def begin(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            cuts[-1] = self.embedding[None].clone().requires_grad_()
            return (cuts[-1], *arguments[1:])

        hook = self.model.block(0).register_forward_pre_hook(begin)
        try:
            with (
                torch.enable_grad(),
                frozen(self.model),
                self.model.splice({layer: cutter(layer) for layer in self.sparse.layers}),
            ):
                self._hidden = self.model._hidden(self.tokens[None])[0, -1]
        finally:
            hook.remove()
        self._cuts = [cuts[layer] for layer in (-1, *self.sparse.layers)]

    def _value(self, target: Target) -> tuple[Tensor, Tensor]:
        """A target's value, and the part of it that does not depend on any source."""
        if target.layer < 0:
            return self._hidden @ self._logit_direction(), self._hidden.new_zeros(())
        nodes = self.sparse.layers[target.layer]
        x = self._reads[target.layer]
        fixed = self.inputs[target.layer]
        module = self._module(target.layer)
        if isinstance(module, Lorsa):
            pattern = module.attention_pattern(fixed, target.unit // module.config.group_size)[
                0, target.position
            ].detach()
            constant = pattern.sum() * module.b_V[target.unit]
            z = pattern @ (x @ module.W_V[target.unit]) + constant
            return z * module.W_O[target.unit].norm(), constant * module.W_O[target.unit].norm()
        site: AttentionSite = nodes.site  # type: ignore[attr-defined]
        pattern = site.pattern(fixed)[0, :, target.position].detach()
        read = module.W_E[target.unit]
        sent = torch.einsum("hj,hje,hed,d->", pattern, site.values(x[None])[0], site.W_O, read)
        biases = torch.einsum("h,he,hed,d->", pattern.sum(dim=1), site.expand_kv(site.b_V), site.W_O, read)
        constant = module.b_E[target.unit] + site.b_O @ read
        norm = module.W_O[target.unit].norm()
        return (sent + constant) * norm, (biases + constant) * norm

    def _logit_direction(self) -> Tensor:
        weight = self.model.model.get_output_embeddings().weight.detach().float()
        minus = weight[self.wrong].mean(dim=0) if self.wrong else weight.mean(dim=0)
        return weight[self.answers].mean(dim=0) - minus

    def _products(self, gradients: Sequence[Tensor]) -> Tensor:
        """Every source's vector times the gradient where it is written, [n_sources]."""
        parts = [(gradients[0][0] * self.embedding).sum(dim=1)]
        for layer, (gradient,) in zip(self.sparse.layers, gradients[1:], strict=True):
            position, vectors = self._units[layer]
            parts.append((gradient[position] * vectors).sum(dim=1))
            parts.append((gradient * self.activity[layer].error[0]).sum(dim=1))
            parts.append((gradient.sum(dim=0) @ self._module(layer).b_O)[None])
        return torch.cat(parts).cpu()


@torch.no_grad()
def _embedding(model: LanguageModel, tokens: Tensor) -> Tensor:
    """What the first block reads, [length, d_model]."""
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found["x"] = arguments[0][0].float()

    hook = model.block(0).register_forward_pre_hook(keep)
    try:
        model.capture(tokens[None], [0])
    finally:
        hook.remove()
    return found["x"]


def _bytes_of_the_pass(model: LanguageModel, length: int) -> int:
    """Memory of the pass that is kept for gradients: what every block keeps of its parts, in fp32."""
    inner = getattr(model.config, "intermediate_size", None) or 4 * model.d_model
    return 4 * length * model.n_layers * (12 * model.d_model + 6 * int(inner))


# ---- residual parts, QK


class Part(NamedTuple):
    """One summand of the residual stream at one position."""

    name: str
    layer: int
    vector: Tensor
    """[d_model]."""


class Stream:
    """The residual stream of a prompt as a sum of named parts: embedding, nodes, errors, biases, MLPs, other attention layers."""

    @torch.no_grad()
    def __init__(self, trace: Trace) -> None:
        self.trace, self.model = trace, trace.model
        self.mlps: dict[int, Tensor] = {}
        tokens = trace.tokens[None]
        with contextlib.ExitStack() as stack:
            for layer in range(self.model.n_layers):
                mlp = self.model.block(layer).get_submodule(self.model.architecture.mlp)
                stack.callback(mlp.register_forward_hook(self._keeper(layer)).remove)
            captured: dict[int, Tensor] = {}

            def observer(layer: int) -> Any:
                def observe(x: Tensor, y: Tensor) -> Tensor:
                    captured[layer] = y[0].float()
                    return y

                return observe

            with self.model.splice({layer: observer(layer) for layer in range(self.model.n_layers)}):
                self.model._hidden(tokens)
        self.attention = captured

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self.mlps[layer] = (output[0] if isinstance(output, tuple) else output)[0].float()

        return keep

    def parts(self, position: int, before: int | None = None) -> list[Part]:
        """What the residual stream is made of at a position before some layer's attention (after the last layer without it)."""
        trace = self.trace
        found = [Part("embedding", -1, trace.embedding[position])]
        for layer in range(self.model.n_layers if before is None else before):
            if layer in trace.activity:
                activity = trace.activity[layer]
                for unit, value in zip(
                    activity.indices[0, position].tolist(), activity.values[0, position], strict=True
                ):
                    if value:
                        found.append(Part(f"{layer}.{unit}", layer, value * activity.W_O[unit]))
                found.append(Part(f"{layer}.error", layer, activity.error[0, position]))
                found.append(Part(f"{layer}.bias", layer, trace._module(layer).b_O.detach()))
            else:
                found.append(Part(f"attention {layer}", layer, self.attention[layer][position]))
            found.append(Part(f"MLP {layer}", layer, self.mlps[layer][position]))
        return found

    def logit_parts(self) -> list[tuple[str, float]]:
        """Direct effect of each part of the last position on the logit difference, through the last norm; they sum to it."""
        parts = self.parts(len(self.trace.tokens) - 1)
        read = self._through(final_norm(self.model), torch.stack([part.vector for part in parts]))
        along = read @ self.trace._logit_direction()
        names = [*(part.name for part in parts), "norm bias"]
        return [(name, float(value)) for name, value in zip(names, along, strict=True)]

    @staticmethod
    def _through(norm: nn.Module, vectors: Tensor) -> Tensor:
        """Parts [n, d_model] of a stream through a norm whose scale is that of their sum; the norm's bias comes last: [n + 1, d_model]."""
        total = vectors.sum(dim=0)
        weight: Tensor = norm.weight.detach().float()  # type: ignore[operator]
        if isinstance(norm, nn.LayerNorm):
            scale = (total.var(unbiased=False) + norm.eps).rsqrt()
            bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach().float()
            return torch.cat([(vectors - vectors.mean(dim=1, keepdim=True)) * scale * weight, bias[None]])
        scale = (total.square().mean() + float(norm.variance_epsilon)).rsqrt()  # type: ignore[arg-type]
        return torch.cat([vectors * scale * weight, torch.zeros_like(weight)[None]])

    @torch.no_grad()
    def qk(self, layer: int, unit: int, query: int, key: int) -> tuple[Tensor, list[str], list[str], float]:
        """Why a Lorsa head looks from one position at another.

        Args:
            layer: of the head.
            unit: the head; its QK group decides.
            query: position.
            key: position, not after the query.

        Returns:
            pairs [n_query_parts, n_key_parts], the names of both sides (the last of each are `norm bias` and `QK
            bias`), and the score that the pairs sum to.

        Raises:
            UserError: the layer holds no Lorsa, or the key lies after the query.
        """
        module = self.trace._module(layer) if layer in self.trace.activity else None
        if not isinstance(module, Lorsa):
            raise UserError(
                f"Layer {layer} has no Lorsa here, whose queries and keys could be looked into; train one for it."
            )
        if not 0 <= key <= query < len(self.trace.tokens):
            raise UserError(
                f"A query at {query} cannot look at {key}; positions run from 0 and a key is not after its query."
            )
        group = module.config.group_size and unit // module.config.group_size
        norm = self.model.block(layer).get_submodule(self.model.architecture.norms[0])
        sides, names = [], []
        for position, weight, bias, gain in (
            (query, module.W_Q[group], module.b_Q[group], "q_norm"),
            (key, module.W_K[group], module.b_K[group], "k_norm"),
        ):
            parts = self.parts(position, layer)
            read = self._through(norm, torch.stack([part.vector for part in parts]))
            turned = torch.cat([read @ weight, bias[None]])
            if module.config.qk_norm:
                scale = (turned.sum(dim=0).square().mean() + module.config.qk_norm_eps).rsqrt()
                turned = turned * scale * getattr(module, gain)[group]
            cos, sin = ops.rotary_tables(module.config.rotary, position + 1, turned.device, turned.dtype)
            spread = turned[:, None].expand(-1, position + 1, -1).contiguous()
            sides.append(ops.apply_rotary(spread, cos, sin, module.config.rotary.adjacent_pairs)[:, position])
            names.append([*(part.name for part in parts), "norm bias", "QK bias"])
        q, k = module.queries_keys(self.trace.inputs[layer], slice(group, group + 1))
        score = float(q[0, 0, query] @ k[0, 0, key]) * module.attn_scale
        return sides[0] @ sides[1].T * module.attn_scale, names[0], names[1], score


# ---- graph


@dataclass(frozen=True)
class GraphNode:
    """One node of a graph. `influence` and `activation` are None where they do not apply."""

    node_id: str
    kind: str
    """`embedding`, `unit`, `error` or `logit`."""
    layer: int
    """-1 for embeddings; the number of layers for the logit."""
    unit: int
    """Index of the unit, token id of an embedding or logit, -1 for errors."""
    position: int
    label: str = ""
    influence: float | None = None
    activation: float | None = None


@dataclass(frozen=True)
class Graph:
    """A pruned attribution graph."""

    name: str
    prompt: str
    tokens: tuple[str, ...]
    n_layers: int
    nodes: tuple[GraphNode, ...]
    links: tuple[tuple[str, str, float], ...]
    """(source, target, weight)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers about the graph: see `trace_graph`."""


def influences(weights: Tensor) -> Tensor:
    """Influence of every node on the last one: weights [n, n] (row: target, column: source) of an acyclic graph to [n].

    Each target's incoming weights are divided by the sum of their sizes; a node's influence is the sum over all paths
    to the last node of the products of these shares (as in circuit-tracer, Ameisen et al. 2025). The last node's own
    influence is 1.
    """
    shares = weights.abs() / weights.abs().sum(dim=1, keepdim=True).clamp_min(1e-12)
    total = torch.zeros(len(weights), dtype=weights.dtype)
    total[-1] = 1
    front = total.clone()
    for _ in range(len(weights)):
        front = front @ shares
        if not bool(front.any()):
            return total
        total += front
    raise UserError("The graph has a cycle, so influence is not defined; give edges from earlier to later nodes alone.")


def keep_cumulative(scores: Tensor, share: float) -> Tensor:
    """The smallest set of the largest scores [n] that holds `share` of their sum, as a mask."""
    ordered = scores.sort(descending=True)
    reached = ordered.values.cumsum(dim=0) - ordered.values
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[ordered.indices[reached < share * scores.sum()]] = True
    return kept


def trace_graph(
    trace: Trace,
    name: str,
    tokenizer: Any,
    n_traced: int = 64,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    progress: bool = False,
) -> Graph:
    """The graph of a prompt's logit difference.

    From the logit backwards: the node with the largest influence so far is traced next, until `n_traced` units are.
    Then nodes are pruned to the smallest set with `node_share` of the influence (embeddings and the logit stay), and
    edges to the smallest set with `edge_share` of the influence that flows over them.

    Args:
        trace: of the prompt.
        name: of the graph, for its file.
        tokenizer: for token texts.
        n_traced: units whose inputs are traced, at most `MAX_NODES`.
        node_share: of influence to keep.
        edge_share: of influence to keep.
        progress: show a bar, and an estimate first where it takes more than a minute.

    Returns:
        the graph; its facts: `logit_difference`, `edge_sum` (all edges to the logit and the constants; equal to it),
        `active_nodes`, `traced`, `error_share` (of the influence that reaches the logit from sources without traced
        inputs, the part that errors have), `embedding_share`, `untraced_share`, `bias_share`.

    Raises:
        UserError: too many nodes, with an estimate of their memory.
    """
    if n_traced > MAX_NODES:
        gigabytes = 4 * n_traced * len(trace.sources) / 1e9
        raise UserError(
            f"Tracing {n_traced:,} nodes needs {gigabytes:.1f} GB for their edges; ask for at most {MAX_NODES:,}."
        )
    targets = [Target(-1, -1, len(trace.tokens) - 1)]
    edges, values = trace.edges(targets)
    rows = [edges[0]]
    constants = float(trace.constants[0])
    units = [number for number, source in enumerate(trace.sources) if source.kind == "unit"]
    n_traced = min(n_traced, len(units))
    bar = tqdm(total=n_traced, desc="tracing", unit="node", disable=not progress)
    began, done = time.perf_counter(), 0
    while done < n_traced:
        reach = _reach(trace, targets, rows)
        traced = {trace.place["unit", *target] for target in targets[1:]}
        open_units = sorted(
            (number for number in units if number not in traced), key=lambda number: -float(reach[number])
        )
        some = open_units[: min(RANKED_EVERY, n_traced - done)]
        fresh = [Target(*trace.sources[number][1:4]) for number in some]
        found, _ = trace.edges(fresh)
        targets += fresh
        rows += list(found)
        done += len(some)
        bar.update(len(some))
        if progress and done == len(some) and (seconds := (time.perf_counter() - began) * n_traced / done) > 60:
            tqdm.write(f"Tracing {n_traced:,} nodes of this prompt: about {seconds / 60:.0f} minutes.", file=sys.stderr)
    bar.close()
    facts = {
        "logit_difference": float(values[0]),
        "edge_sum": float(rows[0].sum()) + constants,
        "active_nodes": len(units),
        "traced": n_traced,
        **_shares_of_ends(trace, targets, rows),
    }
    return _pruned(trace, name, tokenizer, targets, rows, node_share, edge_share, facts)


def _matrix(trace: Trace, targets: Sequence[Target], rows: Sequence[Tensor]) -> Tensor:
    """All edges as a square matrix over sources and, last, the logit."""
    n, place = len(trace.sources), trace.place
    weights = torch.zeros(n + 1, n + 1)
    weights[n, :n] = rows[0]
    for target, row in zip(targets[1:], rows[1:], strict=True):
        weights[place["unit", target.layer, target.unit, target.position], :n] = row
    return weights


def _reach(trace: Trace, targets: Sequence[Target], rows: Sequence[Tensor]) -> Tensor:
    """Influence of every source, without making the square matrix: targets in order of depth."""
    place = trace.place
    reach = torch.zeros(len(trace.sources))
    reach += rows[0].abs() / rows[0].abs().sum().clamp_min(1e-12)
    for target, row in sorted(zip(targets[1:], rows[1:], strict=True), key=lambda pair: -pair[0].layer):
        mine = reach[place["unit", target.layer, target.unit, target.position]]
        reach += mine * row.abs() / row.abs().sum().clamp_min(1e-12)
    return reach


def _shares_of_ends(trace: Trace, targets: Sequence[Target], rows: Sequence[Tensor]) -> dict[str, float]:
    reach = _reach(trace, targets, rows)
    traced = set(targets[1:])
    sums = dict.fromkeys(("error", "embedding", "untraced", "bias"), 0.0)
    for source, value in zip(trace.sources, reach.tolist(), strict=True):
        if source.kind != "unit":
            sums[source.kind] += value
        elif Target(*source[1:4]) not in traced:
            sums["untraced"] += value
    total = sum(sums.values()) or 1.0
    return {f"{kind}_share": value / total for kind, value in sums.items()}


def _pruned(
    trace: Trace,
    name: str,
    tokenizer: Any,
    targets: Sequence[Target],
    rows: Sequence[Tensor],
    node_share: float,
    edge_share: float,
    facts: Any,
) -> Graph:
    reach = torch.cat([_reach(trace, targets, rows), torch.ones(1)])
    kept = keep_cumulative(reach, node_share) | torch.tensor(
        [source.kind == "embedding" for source in trace.sources] + [True]
    )
    kept &= torch.tensor([source.kind != "bias" for source in trace.sources] + [True])
    place = trace.place
    ids = [_node_id(trace, source) for source in trace.sources] + [_logit_id(trace)]
    found = []
    for target, row in zip(targets, rows, strict=True):
        number = len(trace.sources) if target.layer < 0 else place["unit", target.layer, target.unit, target.position]
        if kept[number]:
            flow = reach[number] * row.abs() / row.abs().sum().clamp_min(1e-12)
            found += [
                (ids[s], ids[number], float(row[s]), float(flow[s]))
                for s in kept[:-1].nonzero()[:, 0].tolist()
                if row[s]
            ]
    strong = keep_cumulative(torch.tensor([link[3] for link in found]), edge_share)
    links = tuple(link[:3] for link, keep in zip(found, strong, strict=True) if keep)
    used = {end for link in links for end in link[:2]}
    nodes = tuple(
        node
        for node in _nodes(trace, tokenizer, kept, reach, ids)
        if node.node_id in used or node.kind in ("embedding", "logit")
    )
    texts = tuple(tokenizer.decode([int(token)]) for token in trace.tokens)
    return Graph(
        name,
        "".join(texts),
        texts,
        trace.model.n_layers,
        nodes,
        links,
        {**facts, "node_share": node_share, "edge_share": edge_share},
    )


def _nodes(trace: Trace, tokenizer: Any, kept: Tensor, reach: Tensor, ids: Sequence[str]) -> list[GraphNode]:
    found = []
    kind = trace.sparse.kind
    words = {"lorsa": "Lorsa head", "sae": "SAE feature"}[kind]
    for number in kept[:-1].nonzero()[:, 0].tolist():
        source = trace.sources[number]
        token = int(trace.tokens[source.position])
        text = tokenizer.decode([token])
        label = {
            "embedding": f"token {text!r}",
            "unit": f"{words} {source.layer}.{source.unit} at {text!r}",
            "error": f"error of layer {source.layer} at {text!r}",
        }[source.kind]
        unit = token if source.kind == "embedding" else source.unit
        value = source.value if source.kind == "unit" else None
        found.append(
            GraphNode(ids[number], source.kind, source.layer, unit, source.position, label, float(reach[number]), value)
        )
    right, wrong = (" ".join(repr(tokenizer.decode([i])) for i in side[:3]) for side in (trace.answers, trace.wrong))
    label = f"logit of {right} minus {wrong or 'the mean logit'}"
    found.append(GraphNode(ids[-1], "logit", trace.model.n_layers, trace.answers[0], len(trace.tokens) - 1, label, 1.0))
    return found


def _node_id(trace: Trace, source: Source) -> str:
    if source.kind == "embedding":
        return f"E_{int(trace.tokens[source.position])}_{source.position}"
    return f"{source.layer}_{source.unit}_{source.position}"


def _logit_id(trace: Trace) -> str:
    return f"{trace.model.n_layers + 1}_{trace.answers[0]}_{len(trace.tokens) - 1}"


# ---- file

_TYPES = {
    "embedding": "embedding",
    "unit": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "logit": "logit",
}


def write_graph(graph: Graph, path: str | Path, probability: float = 0.0, page: str = "") -> Path:
    """Write a graph in the schema of circuit-tracer.

    Args:
        graph: pruned.
        path: of the JSON file.
        probability: the model's probability of the answer.
        page: where the page of a unit is, with `{layer}` and `{unit}`, as `heads/{layer}_{unit}.html`; nothing without
            it.
    """
    nodes = []
    for node in graph.nodes:
        is_logit, is_unit = node.kind == "logit", node.kind == "unit"
        layer = {"embedding": "E", "logit": str(graph.n_layers + 1)}.get(node.kind, str(node.layer))
        feature = {"unit": _pairing(node.layer, node.unit), "error": -1, "embedding": node.position}.get(
            node.kind, node.unit
        )
        short = {
            "embedding": f"E_{node.unit}-{node.position}",
            "logit": f"L_{node.unit}-{node.position}",
            "error": f"{layer}_-1-{node.position}",
        }
        entry: dict[str, Any] = {
            "node_id": node.node_id,
            "feature": feature,
            "layer": layer,
            "ctx_idx": node.position,
            "feature_type": _TYPES[node.kind],
            "token_prob": probability if is_logit else 0.0,
            "is_target_logit": is_logit,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": short.get(node.kind, f"{layer}_{node.unit}-0"),
            "clerp": node.label,
            "influence": node.influence,
            "activation": node.activation,
            "kind": node.kind,
        }
        if page and is_unit:
            entry["page"] = page.format(layer=node.layer, unit=node.unit)
        nodes.append(entry)
    metadata = {
        "slug": graph.name,
        "scan": "lorsa",
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": graph.facts.get("node_share"),
        "schema_version": 1,
        "n_layers": graph.n_layers,
        "facts": graph.facts,
    }
    links = [{"source": source, "target": target, "weight": weight} for source, target, weight in graph.links]
    params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    store.write_json(path, {"metadata": metadata, "qParams": params, "nodes": nodes, "links": links})
    return Path(path)


def _pairing(layer: int, unit: int) -> int:
    """Cantor's pairing of two numbers, by which that schema numbers features over layers."""
    return (layer + unit) * (layer + unit + 1) // 2 + unit


def read_graph(path: str | Path) -> Graph:
    """Read a graph that `write_graph` wrote, or one of circuit-tracer's.

    Raises:
        UserError: it is not such a file, or a link names a node that is not there.
    """
    content = store.read_json(path)
    kinds = {name: kind for kind, name in _TYPES.items()}
    try:
        metadata = content["metadata"]
        highest = max((int(node["layer"]) for node in content["nodes"] if node["layer"] != "E"), default=0)
        n_layers = int(metadata.get("n_layers", highest - 1))
        nodes = tuple(_read_node(node, kinds, n_layers) for node in content["nodes"])
        links = tuple((link["source"], link["target"], float(link["weight"])) for link in content["links"])
        graph = Graph(
            metadata["slug"],
            metadata["prompt"],
            tuple(metadata["prompt_tokens"]),
            n_layers,
            nodes,
            links,
            dict(metadata.get("facts", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a graph in circuit-tracer's schema ({error!r}); export it again.") from error
    known = {node.node_id for node in nodes}
    if lost := [end for link in links for end in link[:2] if end not in known]:
        raise UserError(f"{path} has a link to {lost[0]}, which is no node of it; export it again.")
    return graph


def _read_node(node: Mapping[str, Any], kinds: Mapping[str, str], n_layers: int) -> GraphNode:
    kind = kinds[node["feature_type"]]
    unit = int(node["node_id"].split("_")[1])
    layer = {"embedding": -1, "logit": n_layers}.get(kind)
    return GraphNode(
        node["node_id"],
        kind,
        int(node["layer"]) if layer is None else layer,
        unit,
        int(node["ctx_idx"]),
        node.get("clerp", ""),
        node.get("influence"),
        node.get("activation"),
    )
