"""Attribution graphs of one prompt: exact edges through the frozen model, QK attribution, pruning, a file for viewers.

**Frozen model.** On one prompt, hold fixed the scale of every norm, the attention patterns of layers that are not
decomposed, and the factor by which an MLP's activation function scales its input (if gated: the gate). What is left is
linear and has the same values. A Lorsa head given its pattern, z_i = sum_j A_ij (w_v . x_j + b_V), and an SAE feature
given its layer's patterns are linear too. So the logit difference, or any node's activation, is exactly the sum of its
edges: source (token embedding, what an earlier node writes, error, bias) times coefficient. A path ends at the first
node that it meets, so nothing counts twice.

**QK attribution.** A Lorsa head's score for a query and a key is bilinear in what they read, so it is exactly a sum
over pairs of parts of the two residual streams.

**Influence.** Each target's incoming edges are divided by the sum of their sizes; a source's influence on the logit is
the sum over all paths of the products of these shares (as in circuit-tracer, Ameisen et al. 2025).

**File.** The JSON of circuit-tracer (github.com/decoderesearch/circuit-tracer, MIT), which Neuronpedia's graph viewer
reads, with keys `kind` and `page` that other readers ignore.
"""

from __future__ import annotations

import contextlib
import math
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
from lorsa_utils.circuits.nodes import SparseModel
from lorsa_utils.exceptions import UserError
from lorsa_utils.heads.units import (
    LorsaHeads,
    SAEFeatures,
    SparseActivity,
    SparseUnits,
    centred,
    final_norm,
    norm_scale,
)
from lorsa_utils.models import LanguageModel, Replacement

MAX_LENGTH = 128
MAX_NODES = 5_000
RANKED_EVERY = 16
"""Nodes traced before the others are ranked again."""


# ---- frozen model


def _norm_bias(norm: Any) -> Tensor:
    bias: Tensor | None = getattr(norm, "bias", None)
    return torch.zeros_like(norm.weight) if bias is None else bias


@contextlib.contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """Inside the context outputs stay the same and gradients are those of the frozen model."""
    architecture = model.architecture

    def norm_hook(norm: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = arguments[0]
        return centred(norm, x) / norm_scale(norm, x).detach() * norm.weight + _norm_bias(norm)

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
    """The start of an edge."""

    kind: str
    """`embedding`, `unit`, `error` or `bias`."""
    layer: int
    """-1 for embeddings."""
    unit: int
    position: int
    """-1 for biases, which are summed over positions."""
    value: float
    """For a unit its activation times the norm of its write direction, else the norm of the vector."""


class Target(NamedTuple):
    """The end of an edge: a unit at a position, or (layer -1) the logit difference at the last position."""

    layer: int
    unit: int
    position: int


class Edges(NamedTuple):
    """Edges from all sources to some targets.

    A row of weights and the target's constant sum to its value, less the model's other biases (none in a Llama).
    """

    weights: Tensor
    """[n_targets, n_sources]."""
    values: Tensor
    """[n_targets], the logit difference, or a unit's value as in `Source`."""
    constants: Tensor
    """[n_targets], the part that depends on no source: b_V times the pattern's mass, b_E."""


class Trace:
    """One prompt, its sources, and edges on demand."""

    def __init__(self, sparse: SparseModel, tokens: Tensor, answers: Sequence[int], wrong: Sequence[int]) -> None:
        """Read a prompt, tokens [length].

        The logit difference is the mean logit of `answers` minus that of `wrong` (of all tokens if `wrong` is empty).

        Raises:
            UserError: the layers hold MHSA heads, or the prompt is longer than `MAX_LENGTH`.
        """
        if any(not isinstance(units, SparseUnits) for units in sparse.layers.values()):
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
        self.layers: dict[int, SparseUnits] = sparse.layers  # type: ignore[assignment]
        self.answers, self.wrong = list(answers), list(wrong)
        self.activity: dict[int, SparseActivity] = sparse.read(tokens[None])  # type: ignore[assignment]
        captured = self.model.capture(tokens[None], list(sparse.layers))
        self.outputs = {layer: y.float() for layer, (_, y) in captured.items()}
        self.inputs = {layer: x.float() for layer, (x, _) in captured.items()}
        self.embedding = self.model.residual(tokens[None], 0)[0].float()
        """[length, d_model], what the first block reads."""
        self.sources = self._list_sources()
        self._cut_model()

    def _list_sources(self) -> list[Source]:
        sources = [Source("embedding", -1, -1, i, float(row.norm())) for i, row in enumerate(self.embedding)]
        self._units: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, activity in self.activity.items():
            position, slot = (activity.values[0] != 0).nonzero(as_tuple=True)
            unit, value = activity.indices[0, position, slot], activity.values[0, position, slot]
            self._units[layer] = position, value[:, None] * activity.W_O[unit]
            sizes = self._units[layer][1].norm(dim=1) * value.sign()
            places = zip(unit.tolist(), position.tolist(), sizes.tolist(), strict=True)
            sources += [Source("unit", layer, *place) for place in places]
            sources += [Source("error", layer, -1, i, float(row.norm())) for i, row in enumerate(activity.error[0])]
            sources.append(Source("bias", layer, -1, -1, float(activity.module.b_O.norm())))
        return sources

    def edges(self, targets: Sequence[Target]) -> Edges:
        """Edges from all sources to some targets."""
        rows, values, constants = [], [], []
        for target in targets:
            with torch.enable_grad():
                value, constant = self._value(target)
                slopes = torch.autograd.grad(
                    value, self._cuts, allow_unused=True, materialize_grads=True, retain_graph=True
                )
            rows.append(self._products(slopes))
            values.append(value.detach().cpu())
            constants.append(constant.detach().cpu())
        return Edges(torch.stack(rows), torch.stack(values), torch.stack(constants))

    def _cut_model(self) -> None:
        cuts = {-1: self.embedding[None].clone().requires_grad_()}
        self._reads: dict[int, Tensor] = {}

        def cutter(layer: int) -> Replacement:
            def cut(x: Tensor, y: Tensor) -> Tensor:
                self._reads[layer] = x[0]
                cuts[layer] = self.outputs[layer].clone().requires_grad_()
                return cuts[layer]

            return cut

        with (
            torch.enable_grad(),
            frozen(self.model),
            self.model.resume(0, cuts[-1]),
            self.model.splice({layer: cutter(layer) for layer in self.layers}),
        ):
            self._hidden = self.model._hidden(self.tokens[None])[0, -1]
        self._cuts = [cuts[layer] for layer in (-1, *self.layers)]

    def _value(self, target: Target) -> tuple[Tensor, Tensor]:
        """A target's value, and the part of it that depends on no source."""
        if target.layer < 0:
            return self._hidden @ self.logit_direction(), self._hidden.new_zeros(())
        layer, unit, position = target
        x, fixed, units = self._reads[layer], self.inputs[layer], self.layers[layer]
        if isinstance(units, LorsaHeads):
            lorsa = units.lorsa
            pattern = lorsa.attention_pattern(fixed, unit // lorsa.config.group_size)[0, position].detach()
            constant = pattern.sum() * lorsa.b_V[unit]
            value = pattern @ (x @ lorsa.W_V[unit]) + constant
        else:
            assert isinstance(units, SAEFeatures)
            site, sae = units.site, units.sae
            pattern, read = site.pattern(fixed)[0, :, position].detach(), sae.W_E[unit]
            sent = torch.einsum("hj,hje,hed,d->", pattern, site.values(x[None])[0], site.W_O, read)
            biases = torch.einsum("h,he,hed,d->", pattern.sum(dim=1), site.expand_kv(site.b_V), site.W_O, read)
            own = sae.b_E[unit] + site.b_O @ read
            value, constant = sent + own, biases + own
        return value * units.norms[unit], constant * units.norms[unit]

    def logit_direction(self) -> Tensor:
        """What the logit difference reads of the final hidden state, [d_model]."""
        weight = self.model.model.get_output_embeddings().weight.detach().float()
        minus = weight[self.wrong].mean(dim=0) if self.wrong else weight.mean(dim=0)
        return weight[self.answers].mean(dim=0) - minus

    def _products(self, slopes: Sequence[Tensor]) -> Tensor:
        """Every source's vector times its gradient, [n_sources]."""
        products = [(slopes[0][0] * self.embedding).sum(dim=1)]
        for layer, (slope,) in zip(self.layers, slopes[1:], strict=True):
            position, vectors = self._units[layer]
            products.append((slope[position] * vectors).sum(dim=1))
            products.append((slope * self.activity[layer].error[0]).sum(dim=1))
            products.append((slope.sum(dim=0) @ self.activity[layer].module.b_O)[None])
        return torch.cat(products).cpu()


def _bytes_of_the_pass(model: LanguageModel, length: int) -> int:
    """What every block keeps for gradients, in fp32."""
    inner = getattr(model.config, "intermediate_size", None) or 4 * model.d_model
    return 4 * length * model.n_layers * (12 * model.d_model + 6 * int(inner))


# ---- residual parts, QK


class Stream:
    """The residual stream of a prompt as a sum of parts."""

    @torch.no_grad()
    def __init__(self, trace: Trace) -> None:
        self.trace, self.model = trace, trace.model
        layers, tokens = range(self.model.n_layers), trace.tokens[None]
        self.attention = {layer: y[0].float() for layer, (_, y) in self.model.capture(tokens, layers).items()}
        self.mlps: dict[int, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for layer in layers:
                mlp = self.model.block(layer).get_submodule(self.model.architecture.mlp)
                stack.callback(mlp.register_forward_hook(self._keeper(layer)).remove)
            self.model._hidden(tokens)

    def _keeper(self, layer: int) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self.mlps[layer] = (output[0] if isinstance(output, tuple) else output)[0].float()

        return keep

    def parts(self, position: int, before: int | None = None) -> dict[str, Tensor]:
        """Vectors [d_model] of all parts at a position, before a layer's attention (without one: at the end)."""
        trace = self.trace
        parts = {"embedding": trace.embedding[position]}
        for layer in range(self.model.n_layers if before is None else before):
            if activity := trace.activity.get(layer):
                active = zip(activity.indices[0, position].tolist(), activity.values[0, position], strict=True)
                parts |= {f"{layer}.{unit}": value * activity.W_O[unit] for unit, value in active if value}
                parts[f"{layer}.error"] = activity.error[0, position]
                parts[f"{layer}.bias"] = activity.module.b_O.detach()
            else:
                parts[f"attention {layer}"] = self.attention[layer][position]
            parts[f"MLP {layer}"] = self.mlps[layer][position]
        return parts

    def logit_parts(self) -> list[tuple[str, float]]:
        """Direct effects of the last position's parts through the last norm; their sum is the logit difference."""
        parts = self._normed(final_norm(self.model), self.parts(len(self.trace.tokens) - 1))
        direction = self.trace.logit_direction()
        return [(name, float(vector @ direction)) for name, vector in parts.items()]

    @staticmethod
    def _normed(norm: Any, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts through a norm with the scale of their sum; the norm's bias comes last."""
        scale = norm_scale(norm, torch.stack(list(parts.values())).sum(dim=0))
        normed = {name: centred(norm, vector) / scale * norm.weight.float() for name, vector in parts.items()}
        return normed | {"norm bias": _norm_bias(norm).float()}

    @torch.no_grad()
    def qk(self, layer: int, unit: int, query: int, key: int) -> tuple[Tensor, list[str], list[str], float]:
        """Why a Lorsa head's QK group attends from position `query` to position `key`.

        Returns pairs [n_query_parts, n_key_parts], the names of both sides (each ends with `norm bias` and `QK bias`),
        and the score that the pairs sum to.

        Raises:
            UserError: the layer holds no Lorsa, or the key lies after the query.
        """
        heads = self.trace.layers.get(layer)
        if not isinstance(heads, LorsaHeads):
            raise UserError(
                f"Layer {layer} has no Lorsa here, whose queries and keys could be looked into; train one for it."
            )
        if not 0 <= key <= query < len(self.trace.tokens):
            raise UserError(
                f"A query at {query} cannot look at {key}; positions run from 0 and a key is not after its query."
            )
        lorsa = heads.lorsa
        group = unit // lorsa.config.group_size
        norm = self.model.block(layer).get_submodule(self.model.architecture.norms[0])
        sides, names = [], []
        for position, weight, bias, gain in (
            (query, lorsa.W_Q[group], lorsa.b_Q[group], "q_norm"),
            (key, lorsa.W_K[group], lorsa.b_K[group], "k_norm"),
        ):
            parts = self._normed(norm, self.parts(position, layer))
            turned = torch.cat([torch.stack(list(parts.values())) @ weight, bias[None]])
            if lorsa.config.qk_norm:
                scale = (turned.sum(dim=0).square().mean() + lorsa.config.qk_norm_eps).rsqrt()
                turned = turned * scale * getattr(lorsa, gain)[group]
            cos, sin = ops.rotary_tables(lorsa.config.rotary, position + 1, turned.device, turned.dtype)
            spread = turned[:, None].expand(-1, position + 1, -1).contiguous()
            sides.append(ops.apply_rotary(spread, cos, sin, lorsa.config.rotary.adjacent_pairs)[:, position])
            names.append([*parts, "QK bias"])
        q, k = lorsa.queries_keys(self.trace.inputs[layer], slice(group, group + 1))
        score = float(q[0, 0, query] @ k[0, 0, key]) * lorsa.attn_scale
        return sides[0] @ sides[1].T * lorsa.attn_scale, names[0], names[1], score


# ---- graph


@dataclass(frozen=True)
class GraphNode:
    """One node of a graph."""

    node_id: str
    kind: str
    """`embedding`, `unit`, `error` or `logit`."""
    layer: int
    """-1 for embeddings; the number of layers for the logit."""
    unit: int
    """Index of a unit, token id of an embedding or logit, -1 for errors."""
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
    """Listed in `trace_graph`."""


def influence(layers: Sequence[float], inputs: Mapping[int, Tensor]) -> Tensor:
    """Influence of every node on the last one (whose own is 1), [n_nodes].

    The last one's layer is above all others. `inputs` maps nodes to their weights [n_nodes - 1] from all but the last.
    """
    reach = torch.zeros(len(layers))
    reach[-1] = 1
    for number in sorted(inputs, key=lambda number: -layers[number]):
        reach[:-1] += reach[number] * _shares(inputs[number])
    return reach


def _shares(row: Tensor) -> Tensor:
    return row.abs() / row.abs().sum().clamp_min(1e-12)


def keep_cumulative(scores: Tensor, share: float) -> Tensor:
    """The smallest set of the largest scores [n] that holds `share` of their sum, as a mask."""
    ordered = scores.sort(descending=True)
    reached = ordered.values.cumsum(dim=0) - ordered.values
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[ordered.indices[reached < share * scores.sum()]] = True
    return mask


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

    From the logit backwards, the node with the largest influence so far is traced next, until `n_traced` units are.
    Then nodes are pruned to the smallest set with `node_share` of the influence (embeddings and the logit stay), and
    edges to the smallest set with `edge_share` of the influence that flows over them.

    Its facts: `logit_difference`, `edge_sum` (edges to the logit and the constants; equal to it), `active_nodes`,
    `traced`, and `error_share`, `embedding_share`, `untraced_share` and `bias_share` of the influence that reaches the
    logit from sources without traced inputs.

    Raises:
        UserError: `n_traced` is over `MAX_NODES`.
    """
    if n_traced > MAX_NODES:
        gigabytes = 4 * n_traced * len(trace.sources) / 1e9
        raise UserError(
            f"Tracing {n_traced:,} nodes needs {gigabytes:.1f} GB for their edges; ask for at most {MAX_NODES:,}."
        )
    logit, layers = len(trace.sources), [*(float(source.layer) for source in trace.sources), math.inf]
    edges = trace.edges([Target(-1, -1, len(trace.tokens) - 1)])
    inputs = {logit: edges.weights[0]}
    units = [number for number, source in enumerate(trace.sources) if source.kind == "unit"]
    n_traced = min(n_traced, len(units))
    bar = tqdm(total=n_traced, desc="tracing", unit="node", disable=not progress)
    began = time.perf_counter()
    while (done := len(inputs) - 1) < n_traced:
        scores = influence(layers, inputs).tolist()
        untraced = sorted((number for number in units if number not in inputs), key=lambda number: -scores[number])
        batch = untraced[: min(RANKED_EVERY, n_traced - done)]
        inputs |= zip(
            batch, trace.edges([Target(*trace.sources[number][1:4]) for number in batch]).weights, strict=True
        )
        bar.update(len(batch))
        if not done and progress and (seconds := (time.perf_counter() - began) * n_traced / len(batch)) > 60:
            tqdm.write(f"Tracing {n_traced:,} nodes of this prompt: about {seconds / 60:.0f} minutes.", file=sys.stderr)
    bar.close()
    reach = influence(layers, inputs)
    facts = {
        "logit_difference": float(edges.values[0]),
        "edge_sum": float(inputs[logit].sum()) + float(edges.constants[0]),
        "active_nodes": len(units),
        "traced": n_traced,
        **_shares_of_ends(trace, inputs, reach),
        "node_share": node_share,
        "edge_share": edge_share,
    }
    nodes, links = _pruned(trace, tokenizer, inputs, reach, node_share, edge_share)
    texts = tuple(tokenizer.decode([int(token)]) for token in trace.tokens)
    return Graph(name, "".join(texts), texts, trace.model.n_layers, nodes, links, facts)


def _shares_of_ends(trace: Trace, inputs: Mapping[int, Tensor], reach: Tensor) -> dict[str, float]:
    sums = dict.fromkeys(("error", "embedding", "untraced", "bias"), 0.0)
    for number, (source, value) in enumerate(zip(trace.sources, reach[:-1].tolist(), strict=True)):
        if number not in inputs:
            sums["untraced" if source.kind == "unit" else source.kind] += value
    total = sum(sums.values()) or 1.0
    return {f"{kind}_share": value / total for kind, value in sums.items()}


def _pruned(
    trace: Trace,
    tokenizer: Any,
    inputs: Mapping[int, Tensor],
    reach: Tensor,
    node_share: float,
    edge_share: float,
) -> tuple[tuple[GraphNode, ...], tuple[tuple[str, str, float], ...]]:
    kinds = [*(source.kind for source in trace.sources), "logit"]
    ends = torch.tensor([kind in ("embedding", "logit") for kind in kinds])
    shown = (keep_cumulative(reach, node_share) | ends) & torch.tensor([kind != "bias" for kind in kinds])
    nodes = {number: _node(trace, tokenizer, number, float(reach[number])) for number in shown.nonzero()[:, 0].tolist()}
    links, flows = [], []
    for number, row in inputs.items():
        if number in nodes:
            flow = reach[number] * _shares(row)
            for source in nodes:
                if source < len(row) and row[source]:
                    links.append((nodes[source].node_id, nodes[number].node_id, float(row[source])))
                    flows.append(float(flow[source]))
    strong = keep_cumulative(torch.tensor(flows), edge_share)
    links = [link for link, keep in zip(links, strong, strict=True) if keep]
    used = {end for link in links for end in link[:2]}
    linked = (node for node in nodes.values() if node.node_id in used or node.kind in ("embedding", "logit"))
    return tuple(linked), tuple(links)


def _node(trace: Trace, tokenizer: Any, number: int, reach: float) -> GraphNode:
    last, n_layers = len(trace.tokens) - 1, trace.model.n_layers
    if number == len(trace.sources):
        sides = (" ".join(repr(tokenizer.decode([i])) for i in side[:3]) for side in (trace.answers, trace.wrong))
        label = "logit of {} minus {}".format(*(side or "the mean logit" for side in sides))
        node_id = f"{n_layers + 1}_{trace.answers[0]}_{last}"
        return GraphNode(node_id, "logit", n_layers, trace.answers[0], last, label, 1.0)
    kind, layer, unit, position, value = trace.sources[number]
    token = int(trace.tokens[position])
    text = repr(tokenizer.decode([token]))
    if kind == "embedding":
        return GraphNode(f"E_{token}_{position}", kind, layer, token, position, f"token {text}", reach)
    words = {"lorsa": "Lorsa head", "sae": "SAE feature"}[trace.sparse.kind]
    label = f"{words} {layer}.{unit} at {text}" if kind == "unit" else f"error of layer {layer} at {text}"
    activation = value if kind == "unit" else None
    return GraphNode(f"{layer}_{unit}_{position}", kind, layer, unit, position, label, reach, activation)


# ---- file

_TYPES = {
    "embedding": "embedding",
    "unit": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "logit": "logit",
}


def write_graph(graph: Graph, path: str | Path, probability: float = 0.0, page: str = "") -> Path:
    """Write a graph in circuit-tracer's schema, with the model's probability of the answer.

    `page` is the address of a unit's page, such as `heads/{layer}_{unit}.html`.
    """
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
    nodes = [_entry(node, graph.n_layers, probability, page) for node in graph.nodes]
    links = [{"source": source, "target": target, "weight": weight} for source, target, weight in graph.links]
    params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    store.write_json(path, {"metadata": metadata, "qParams": params, "nodes": nodes, "links": links})
    return Path(path)


def _entry(node: GraphNode, n_layers: int, probability: float, page: str) -> dict[str, Any]:
    unit, position, is_logit = node.unit, node.position, node.kind == "logit"
    layer, feature, short = {
        "embedding": ("E", position, f"E_{unit}-{position}"),
        # Cantor's pairing of two numbers, by which that schema numbers features over layers.
        "unit": (str(node.layer), (node.layer + unit) * (node.layer + unit + 1) // 2 + unit, f"{node.layer}_{unit}-0"),
        "error": (str(node.layer), -1, f"{node.layer}_-1-{position}"),
        "logit": (str(n_layers + 1), unit, f"L_{unit}-{position}"),
    }[node.kind]
    entry = {
        "node_id": node.node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": _TYPES[node.kind],
        "token_prob": probability if is_logit else 0.0,
        "is_target_logit": is_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": short,
        "clerp": node.label,
        "influence": node.influence,
        "activation": node.activation,
        "kind": node.kind,
    }
    return entry | ({"page": page.format(layer=node.layer, unit=unit)} if page and node.kind == "unit" else {})


def read_graph(path: str | Path) -> Graph:
    """Read a graph written by `write_graph` or circuit-tracer.

    Raises:
        UserError: it is not such a file, or a link names a node that is not there.
    """
    content = store.read_json(path)
    try:
        metadata = content["metadata"]
        highest = max((int(node["layer"]) for node in content["nodes"] if node["layer"] != "E"), default=0)
        n_layers = int(metadata.get("n_layers", highest - 1))
        nodes = tuple(_read_node(node, n_layers) for node in content["nodes"])
        links = tuple((link["source"], link["target"], float(link["weight"])) for link in content["links"])
        tokens, facts = tuple(metadata["prompt_tokens"]), dict(metadata.get("facts", {}))
        graph = Graph(metadata["slug"], metadata["prompt"], tokens, n_layers, nodes, links, facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a graph in circuit-tracer's schema ({error!r}); export it again.") from error
    known = {node.node_id for node in nodes}
    if lost := [end for link in links for end in link[:2] if end not in known]:
        raise UserError(f"{path} has a link to {lost[0]}, which is no node of it; export it again.")
    return graph


def _read_node(node: Mapping[str, Any], n_layers: int) -> GraphNode:
    kind = {name: kind for kind, name in _TYPES.items()}[node["feature_type"]]
    layer = {"embedding": -1, "logit": n_layers}.get(kind)
    return GraphNode(
        node["node_id"],
        kind,
        int(node["layer"]) if layer is None else layer,
        int(node["node_id"].split("_")[1]),
        int(node["ctx_idx"]),
        node.get("clerp", ""),
        node.get("influence"),
        node.get("activation"),
    )
