"""Attribution graphs of one prompt: exact edges through the frozen model, QK attribution, pruning, a file for viewers.

**Frozen model.** On one prompt, hold fixed the scale of every norm, the attention patterns of layers that are not
decomposed, and the factor by which an MLP's activation function scales its input (if gated: the gate). What is left is
linear and has the same values. A Lorsa head given its pattern, z_i = sum_j A_ij (w_v . x_j + b_V), and an SAE feature
given its layer's patterns are linear too. So the logit difference, or any node's activation, is exactly the sum of its
edges: source (token embedding, what an earlier node writes, error, bias) times coefficient. A path ends at the first
node that it meets, so nothing counts twice.

**QK attribution.** A Lorsa head's score is bilinear in what query and key read, so it is exactly a sum over pairs of
parts of the two residual streams.

**Influence.** Each target's incoming edges are divided by the sum of their sizes; a source's influence on the logit is
the sum over all paths of the products of these shares (as in circuit-tracer, Ameisen et al. 2025).

**File.** The JSON of circuit-tracer (github.com/decoderesearch/circuit-tracer, MIT), which Neuronpedia's graph viewer
reads, with keys `kind` and `page` that other readers ignore.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

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
    for block in map(model.block, range(model.n_layers)):
        hooks += [(block.get_submodule(name), norm_hook) for name in architecture.norms]
        hooks += [(block.get_submodule(architecture.activation), gate_hook)]
        hooks += [(block.get_submodule(name), fixed_hook(fix)) for name, fix in architecture.fixed.items()]
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


# ---- tracing


class Source(NamedTuple):
    """A node: the start of edges or, if a unit or the logit difference, their end."""

    kind: str
    """`embedding`, `unit`, `error`, `bias` or `logit`."""
    layer: int
    """-1 for embeddings, the number of layers for the logit difference."""
    unit: int
    """-1 where there is none; the first answer's token id for the logit difference."""
    position: int
    """-1 for biases, which are summed over positions."""
    value: float
    """For a unit its activation times the norm of its write direction, else the norm of the vector."""


class Edges(NamedTuple):
    """A row of weights and the target's constant sum to its value, less the model's other biases (none in a Llama)."""

    weights: Tensor
    """[n_targets, n_sources]."""
    values: Tensor
    """[n_targets], the logit difference, or a unit's value as in `Source`."""
    constants: Tensor
    """[n_targets], the part that depends on no source: b_V times the pattern's mass, b_E."""


class Trace:
    """One prompt, its sources, edges on demand, and the parts of its residual stream."""

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
        if (length := len(tokens)) > MAX_LENGTH:
            model = sparse.model
            inner = getattr(model.config, "intermediate_size", None) or 4 * model.d_model
            # What every block keeps for gradients, in fp32.
            size = 4 * length * model.n_layers * (12 * model.d_model + 6 * int(inner))
            raise UserError(
                f"The prompt has {length} tokens, about {size / 1e9:.1f} GB for the pass that edges are read from; "
                f"cut it to {MAX_LENGTH} tokens."
            )
        self.sparse, self.model, self.tokens = sparse, sparse.model, tokens.to(sparse.model.device)
        self.layers: dict[int, SparseUnits] = sparse.layers  # type: ignore[assignment]
        self.answers, self.wrong = list(answers), list(wrong)
        self.activity: dict[int, SparseActivity] = sparse.read(tokens[None])  # type: ignore[assignment]
        captured = self.model.capture(tokens[None], list(sparse.layers))
        self.inputs = {layer: x.float() for layer, (x, _) in captured.items()}
        self.embedding = self.model.residual(tokens[None], 0)[0].float()
        """[length, d_model], what the first block reads."""
        self.sources = self._list_sources()
        self._cut_model()
        self.logit = Source("logit", self.model.n_layers, self.answers[0], length - 1, float(self._difference.detach()))

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

    def _cut_model(self) -> None:
        cuts = {-1: self.embedding[None].clone().requires_grad_()}
        self._reads: dict[int, Tensor] = {}

        def cutter(layer: int) -> Replacement:
            def cut(x: Tensor, y: Tensor) -> Tensor:
                self._reads[layer] = x[0]
                cuts[layer] = self.activity[layer].y.clone().requires_grad_()
                return cuts[layer]

            return cut

        with (
            torch.enable_grad(),
            frozen(self.model),
            self.model.resume(0, cuts[-1]),
            self.model.splice({layer: cutter(layer) for layer in self.layers}),
        ):
            self._difference = self.model._hidden(self.tokens[None])[0, -1] @ self.logit_direction()
        self._cuts = [cuts[layer] for layer in (-1, *self.layers)]

    def edges(self, targets: Sequence[Source]) -> Edges:
        """From all sources to some of `sources` that are units, or `logit`."""
        rows = []
        for target in targets:
            with torch.enable_grad():
                value, constant = self._value(target)
                slopes = torch.autograd.grad(
                    value, self._cuts, allow_unused=True, materialize_grads=True, retain_graph=True
                )
            rows.append((self._products(slopes), value.detach().cpu(), constant.detach().cpu()))
        return Edges(*map(torch.stack, zip(*rows, strict=True)))

    def _value(self, target: Source) -> tuple[Tensor, Tensor]:
        """A target's value, and the part of it that depends on no source."""
        if target.kind == "logit":
            return self._difference, self._difference.new_zeros(())
        _, layer, unit, position, _ = target
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
            (position, vectors), activity = self._units[layer], self.activity[layer]
            products += [(slope[position] * vectors).sum(dim=1), (slope * activity.error[0]).sum(dim=1)]
            products.append((slope.sum(dim=0) @ activity.module.b_O)[None])
        return torch.cat(products).cpu()

    @functools.cached_property
    @torch.no_grad()
    def _written(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the attention and the MLP of every block write, [length, d_model] each."""
        mlps: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            mlps.append((output[0] if isinstance(output, tuple) else output)[0].float())

        layers, tokens = range(self.model.n_layers), self.tokens[None]
        captured = self.model.capture(tokens, layers)
        with contextlib.ExitStack() as stack:
            for block in map(self.model.block, layers):
                mlp = block.get_submodule(self.model.architecture.mlp)
                stack.callback(mlp.register_forward_hook(keep).remove)
            self.model._hidden(tokens)
        return [captured[layer][1][0].float() for layer in layers], mlps

    def parts(self, position: int, before: int | None = None) -> dict[str, Tensor]:
        """Vectors [d_model] of all parts at a position, before a layer's attention (without one: at the end)."""
        parts, (attention, mlps) = {"embedding": self.embedding[position]}, self._written
        for layer in range(self.model.n_layers if before is None else before):
            if activity := self.activity.get(layer):
                active = zip(activity.indices[0, position].tolist(), activity.values[0, position], strict=True)
                parts |= {f"{layer}.{unit}": value * activity.W_O[unit] for unit, value in active if value}
                parts[f"{layer}.error"] = activity.error[0, position]
                parts[f"{layer}.bias"] = activity.module.b_O.detach()
            else:
                parts[f"attention {layer}"] = attention[layer][position]
            parts[f"MLP {layer}"] = mlps[layer][position]
        return parts

    def logit_parts(self) -> list[tuple[str, float]]:
        """Direct effects of the last position's parts through the last norm; they sum to the logit difference."""
        parts = _normed(final_norm(self.model), self.parts(len(self.tokens) - 1))
        direction = self.logit_direction()
        return [(name, float(vector @ direction)) for name, vector in parts.items()]

    @torch.no_grad()
    def qk(self, layer: int, unit: int, query: int, key: int) -> tuple[Tensor, list[str], list[str], float]:
        """Why a Lorsa head's QK group attends from position `query` to position `key`.

        Pairs [n_query_parts, n_key_parts], the names of both sides (each ends with `norm bias` and `QK bias`), and the
        score that the pairs sum to.

        Raises:
            UserError: the layer holds no Lorsa, or the key lies after the query.
        """
        heads = self.layers.get(layer)
        if not isinstance(heads, LorsaHeads):
            raise UserError(
                f"Layer {layer} has no Lorsa here, whose queries and keys could be looked into; train one for it."
            )
        if not 0 <= key <= query < len(self.tokens):
            raise UserError(
                f"A query at {query} cannot look at {key}; positions run from 0 and a key is not after its query."
            )
        lorsa = heads.lorsa
        config, group = lorsa.config, unit // lorsa.config.group_size
        norm = self.model.block(layer).get_submodule(self.model.architecture.norms[0])
        sides, names = [], []
        for position, weight, bias, gain in (
            (query, lorsa.W_Q[group], lorsa.b_Q[group], "q_norm"),
            (key, lorsa.W_K[group], lorsa.b_K[group], "k_norm"),
        ):
            parts = _normed(norm, self.parts(position, layer))
            turned = torch.cat([torch.stack(list(parts.values())) @ weight, bias[None]])
            if config.qk_norm:
                scale = (turned.sum(dim=0).square().mean() + config.qk_norm_eps).rsqrt()
                turned = turned * scale * getattr(lorsa, gain)[group]
            cos, sin = ops.rotary_tables(config.rotary, position + 1, turned.device, turned.dtype)
            spread = turned[:, None].expand(-1, position + 1, -1).contiguous()
            sides.append(ops.apply_rotary(spread, cos, sin, config.rotary.adjacent_pairs)[:, position])
            names.append([*parts, "QK bias"])
        q, k = lorsa.queries_keys(self.inputs[layer], slice(group, group + 1))
        score = float(q[0, 0, query] @ k[0, 0, key]) * lorsa.attn_scale
        return sides[0] @ sides[1].T * lorsa.attn_scale, names[0], names[1], score


def _normed(norm: Any, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts through a norm with the scale of their sum; the norm's bias comes last."""
    scale = norm_scale(norm, torch.stack(list(parts.values())).sum(dim=0))
    normed = {name: centred(norm, vector) / scale * norm.weight.float() for name, vector in parts.items()}
    return normed | {"norm bias": _norm_bias(norm).float()}


# ---- graph


class Graph(TypedDict):
    """A pruned attribution graph, as its file holds it."""

    metadata: dict[str, Any]
    """With `prompt_tokens` and `facts` (listed in `trace_graph`)."""
    qParams: dict[str, Any]
    nodes: list[dict[str, Any]]
    """With `node_id`, `layer` (`E` for embeddings, one above the last for the logit), `ctx_idx` (position), `clerp`
    (what it is, in words), `influence`, `activation`, `kind` as in `Source`, and what viewers ask for."""
    links: list[dict[str, Any]]
    """`source`, `target` (node ids) and `weight`."""


def influence(layers: Sequence[float], inputs: Mapping[int, Tensor]) -> Tensor:
    """Influence of every node on the last one, whose layer is above all others (its own is 1): [n_nodes].

    `inputs` maps nodes to their weights [n_nodes - 1] from all but the last.
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
    n_traced: int = 64,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    probability: float = 0.0,
    page: str = "",
    progress: bool = False,
) -> Graph:
    """The graph of a prompt's logit difference.

    From the logit backwards, the node with the largest influence so far is traced next, until `n_traced` units are.
    Then nodes are pruned to the smallest set with `node_share` of the influence (embeddings and the logit stay), and
    edges to the smallest set with `edge_share` of the influence that flows over them. `probability` is the model's, of
    the answer; `page` the address of a unit's page, such as `heads/{layer}_{unit}.html`.

    Its facts: `logit_difference`, `edge_sum` (edges to the logit and the constants; equal to it), `active_nodes`,
    `traced`, and `error_share`, `embedding_share`, `untraced_share` and `bias_share` of the influence that reaches the
    logit from sources without traced inputs.

    Raises:
        UserError: `n_traced` is over `MAX_NODES`.
    """
    ends, (inputs, edge_sum) = [*trace.sources, trace.logit], _traced(trace, n_traced, progress)
    reach = influence([end.layer for end in ends], inputs)
    facts: dict[str, float] = {
        "logit_difference": trace.logit.value,
        "edge_sum": edge_sum,
        "active_nodes": sum(end.kind == "unit" for end in ends),
        "traced": len(inputs) - 1,
        **_shares_of_ends(trace, inputs, reach),
        "node_share": node_share,
        "edge_share": edge_share,
    }
    always, never = ([end.kind in kinds for end in ends] for kinds in (("embedding", "logit"), ("bias",)))
    shown = (keep_cumulative(reach, node_share) | torch.tensor(always)) & ~torch.tensor(never)
    nodes = {i: _node(trace, ends[i], float(reach[i]), probability, page) for i in shown.nonzero()[:, 0].tolist()}
    links = _links(nodes, inputs, reach, edge_share)
    used = {link[end] for link in links for end in ("source", "target")}
    texts = [trace.model.tokenizer.decode([token]) for token in trace.tokens.tolist()]
    metadata = {
        "slug": name,
        "scan": "lorsa",
        "transcoder_list": [],
        "prompt_tokens": texts,
        "prompt": "".join(texts),
        "node_threshold": node_share,
        "schema_version": 1,
        "n_layers": trace.model.n_layers,
        "facts": facts,
    }
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [node for i, node in nodes.items() if always[i] or node["node_id"] in used],
        "links": links,
    }


def _links(
    nodes: Mapping[int, Mapping[str, Any]], inputs: Mapping[int, Tensor], reach: Tensor, edge_share: float
) -> list[dict[str, Any]]:
    links, flows = [], []
    for target, row in inputs.items():
        flow = reach[target] * _shares(row)
        for source in [i for i in nodes if target in nodes and i < len(row) and row[i]]:
            pair = {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"]}
            links.append(pair | {"weight": float(row[source])})
            flows.append(float(flow[source]))
    return list(itertools.compress(links, keep_cumulative(torch.tensor(flows), edge_share)))


def _traced(trace: Trace, n_traced: int, progress: bool) -> tuple[dict[int, Tensor], float]:
    """Weights into the logit and the traced units, by number, and the sum of the logit's and its constant."""
    n = len(trace.sources)
    if n_traced > MAX_NODES:
        gigabytes = 4 * n_traced * n / 1e9
        raise UserError(
            f"Tracing {n_traced:,} nodes needs {gigabytes:.1f} GB for their edges; ask for at most {MAX_NODES:,}."
        )
    layers = [source.layer for source in (*trace.sources, trace.logit)]
    into = trace.edges([trace.logit])
    inputs, edge_sum = {n: into.weights[0]}, float(into.weights[0].sum()) + float(into.constants[0])
    units = [number for number, source in enumerate(trace.sources) if source.kind == "unit"]
    n_traced = min(n_traced, len(units))
    began = time.perf_counter()
    with tqdm(total=n_traced, desc="tracing", unit="node", disable=not progress) as bar:
        while (done := len(inputs) - 1) < n_traced:
            scores = influence(layers, inputs).tolist()
            untraced = sorted((number for number in units if number not in inputs), key=lambda number: -scores[number])
            batch = untraced[: min(RANKED_EVERY, n_traced - done)]
            inputs |= zip(batch, trace.edges([trace.sources[number] for number in batch]).weights, strict=True)
            bar.update(len(batch))
            seconds = (time.perf_counter() - began) * n_traced / len(batch)
            if progress and not done and seconds > 60:
                minutes = f"about {seconds / 60:.0f} minutes"
                tqdm.write(f"Tracing {n_traced:,} nodes of this prompt: {minutes}.", file=sys.stderr)
    return inputs, edge_sum


def _shares_of_ends(trace: Trace, inputs: Mapping[int, Tensor], reach: Tensor) -> dict[str, float]:
    sums = dict.fromkeys(("error", "embedding", "untraced", "bias"), 0.0)
    for number, (source, value) in enumerate(zip(trace.sources, reach[:-1].tolist(), strict=True)):
        if number not in inputs:
            sums["untraced" if source.kind == "unit" else source.kind] += value
    total = sum(sums.values()) or 1.0
    return {f"{kind}_share": value / total for kind, value in sums.items()}


# ---- file

_KINDS = {
    "embedding": "embedding",
    "cross layer transcoder": "unit",
    "mlp reconstruction error": "error",
    "logit": "logit",
}
"""Of circuit-tracer's feature types."""


def _node(trace: Trace, source: Source, influence: float, probability: float, page: str) -> dict[str, Any]:
    kind, layer, unit, position, value = source
    token, decode = int(trace.tokens[position]), trace.model.tokenizer.decode
    text = repr(decode([token]))
    level, number = {"embedding": ("E", token), "logit": (layer + 1, unit)}.get(kind, (layer, unit))
    # Cantor's pairing of two numbers, by which that schema numbers features over layers.
    pairing = (layer + unit) * (layer + unit + 1) // 2 + unit
    sides = (" ".join(repr(decode([i])) for i in side[:3]) for side in (trace.answers, trace.wrong))
    words = {"lorsa": "Lorsa head", "sae": "SAE feature"}[trace.sparse.kind]
    labels = {
        "embedding": f"token {text}",
        "unit": f"{words} {layer}.{unit} at {text}",
        "error": f"error of layer {layer} at {text}",
        "logit": "logit of {} minus {}".format(*(side or "the mean logit" for side in sides)),
    }
    node = {
        "node_id": f"{level}_{number}_{position}",
        "feature": {"embedding": position, "unit": pairing}.get(kind, unit),
        "layer": str(level),
        "ctx_idx": position,
        "feature_type": {kind: name for name, kind in _KINDS.items()}[kind],
        "token_prob": probability if kind == "logit" else 0.0,
        "is_target_logit": kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if kind == 'logit' else level}_{number}-{0 if kind == 'unit' else position}",
        "clerp": labels[kind],
        "influence": influence,
        "activation": value if kind == "unit" else None,
        "kind": kind,
    }
    if page and kind == "unit":
        node["page"] = page.format(layer=layer, unit=unit)
    return node


def read_graph(path: str | Path) -> Graph:
    """Read a graph file of ours or of circuit-tracer.

    Raises:
        UserError: it is not such a file, or a link names a node that is not there.
    """
    graph: Graph = store.read_json(path)
    try:
        known = {node["node_id"] for node in graph["nodes"]}
        for node in graph["nodes"]:
            node.setdefault("kind", _KINDS[node["feature_type"]])
        ends = [link[end] for link in graph["links"] for end in ("source", "target") if float(link["weight"]) != 0]
        list(graph["metadata"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a graph in circuit-tracer's schema ({error!r}); export it again.") from error
    if lost := [end for end in ends if end not in known]:
        raise UserError(f"{path} has a link to {lost[0]}, which is no node of it; export it again.")
    return graph
