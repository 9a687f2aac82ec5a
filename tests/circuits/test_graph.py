"""Edges sum to what they explain, pairs sum to scores, pruning keeps what matters, and files come back as they went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_nodes import planted_sparse, random_units
from tiny_models import KINDS, random_tokens, save_tiny_model

from lorsa_utils.circuits import graph
from lorsa_utils.circuits.graph import Graph, GraphNode, Stream, Target, Trace
from lorsa_utils.circuits.nodes import SparseModel
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import LanguageModel, load_model

LAYERS = (0, 2)


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp(request.param), request.param), device="cpu")


def random_trace(model: LanguageModel, kind: str = "lorsa", length: int = 7) -> Trace:
    sparse = SparseModel(model, {layer: random_units(model, layer, kind) for layer in LAYERS})
    return Trace(sparse, random_tokens(1, length, seed=5)[0], [3], [9])


def place(trace: Trace, *source: Any) -> int:
    return [known[:4] for known in trace.sources].index(source)


def a_unit(trace: Trace, layer: int) -> Target:
    return next(
        Target(*source[1:4]) for source in reversed(trace.sources) if source.kind == "unit" and source.layer == layer
    )


def test_frozen_model_has_the_same_logits(tiny: LanguageModel) -> None:
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        untouched = tiny.logits(tokens)
        with graph.frozen(tiny):
            held = tiny.logits(tokens)
        assert torch.allclose(held, untouched, atol=1e-4)
        assert torch.equal(tiny.logits(tokens), untouched), "nothing is left behind"


@pytest.mark.parametrize("kind", ["lorsa", "sae"])
def test_edges_are_linear_and_their_values_are_the_models(tiny: LanguageModel, kind: str) -> None:
    trace = random_trace(tiny, kind)
    units = [a_unit(trace, layer) for layer in LAYERS]
    edges, values, constants = trace.edges([Target(-1, -1, 6), *units])
    with torch.no_grad():
        logits = tiny.logits(trace.tokens[None])[0, -1]
    assert float(values[0]) == pytest.approx(float(logits[3] - logits[9]), abs=1e-4)
    for target, value in zip(units, values[1:], strict=True):
        assert float(value) == pytest.approx(trace.sources[place(trace, "unit", *target)].value, abs=1e-4)
    if tiny.config.model_type == "qwen3":  # the one kind here without other biases
        assert torch.allclose(edges.sum(dim=1) + constants, values, atol=1e-4)
    later = [number for number, source in enumerate(trace.sources) if source.layer >= units[0].layer]
    assert not edges[1, later].any(), "a node gets nothing from its own layer or a later one"


def test_targets_together_or_apart_give_the_same_edges(tiny: LanguageModel) -> None:
    trace = random_trace(tiny)
    early = next(Target(*s[1:4]) for s in trace.sources if s.kind == "unit" and s.layer == 2 and s.position == 3)
    targets = [Target(-1, -1, 6), early, a_unit(trace, 0)]
    together = trace.edges(targets).weights
    apart = torch.cat([trace.edges([target]).weights for target in reversed(targets)]).flip(0)
    assert torch.equal(together, apart)
    later = [number for number, source in enumerate(trace.sources) if source.position > 3]
    assert not together[1, later].any(), "edges come from earlier positions"


def test_edge_is_the_slope_of_the_frozen_model(tiny: LanguageModel) -> None:
    """Remove half of one source from the frozen model by hand: the logit difference falls by half the edge."""
    trace = random_trace(tiny)
    edges = trace.edges([Target(-1, -1, 6)]).weights
    number = place(trace, "error", 2, -1, 5)
    shift = torch.zeros_like(trace.outputs[2])
    shift[0, 5] = -0.5 * trace.activity[2].error[0, 5]
    # After layer 2, the last attention of a tiny model, only norms and one MLP follow; hold them by their gradient at
    # the clean prompt.
    leaf = torch.zeros_like(shift).requires_grad_()
    with graph.frozen(tiny), tiny.splice({2: lambda x, y: y + leaf}):
        logits = tiny.logits(trace.tokens[None])[0, -1]
        slope = torch.autograd.grad(logits[3] - logits[9], leaf)[0]
    assert float((slope * shift).sum()) == pytest.approx(-0.5 * float(edges[0, number]), abs=1e-4)


def test_direct_parts_sum_to_the_logit_difference(tiny: LanguageModel) -> None:
    trace = random_trace(tiny)
    with torch.no_grad():
        logits = tiny.logits(trace.tokens[None])[0, -1]
    parts = Stream(trace).logit_parts()
    assert sum(value for _, value in parts) == pytest.approx(float(logits[3] - logits[9]), abs=1e-4)


def test_pairs_sum_to_the_score(tiny: LanguageModel) -> None:
    trace = random_trace(tiny)
    stream = Stream(trace)
    for layer, unit, query, key in ((0, 5, 6, 2), (2, 17, 4, 0), (2, 40, 3, 3)):
        pairs, queries, keys, score = stream.qk(layer, unit, query, key)
        assert pairs.shape == (len(queries), len(keys))
        assert float(pairs.sum()) == pytest.approx(score, abs=1e-4)
        module = trace.sparse.layers[layer].module  # type: ignore[attr-defined]
        pattern = module.attention_pattern(trace.inputs[layer], unit // module.config.group_size)[0, query]
        scores = torch.tensor([stream.qk(layer, unit, query, other)[3] for other in range(query + 1)])
        assert torch.allclose(scores.softmax(dim=0), pattern[: query + 1], atol=1e-4)


@pytest.fixture(scope="module")
def by_hand() -> LanguageModel:
    with torch.no_grad():
        return planted.planted_model()


class Letters:
    """Decodes the planted model's tokens."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("A") + token) for token in tokens)


def planted_trace(model: LanguageModel, kind: str = "lorsa") -> Trace:
    task = planted.planted_task(n=1)
    return Trace(planted_sparse(model, kind), task.clean[0], task.answers[0].tolist(), task.wrong[0].tolist())


def test_planted_circuit_is_read_off_graph_and_scores(by_hand: LanguageModel) -> None:
    task, trace = planted.planted_task(n=1), planted_trace(by_hand)
    found = graph.trace_graph(trace, "planted", Letters(), n_traced=8)
    before, after = int(task.clean[0, 2]), int(task.answers[0, 0])
    units = [node for node in found.nodes if node.kind == "unit"]
    strongest = max(units, key=lambda node: node.influence or 0)
    assert (strongest.layer, strongest.unit, strongest.position) == (1, after, 8)
    (source,) = {
        link[0]
        for link in found.links
        if link[1] == strongest.node_id and abs(link[2]) > 0.5 * (strongest.activation or 0)
    }
    assert source == f"E_{after}_3", "what it writes comes from the token after the one like the last"
    pairs, queries, keys, score = Stream(trace).qk(1, after, 8, 3)
    best = divmod(int(pairs.argmax()), len(keys))
    assert (queries[best[0]], keys[best[1]]) == ("embedding", f"0.{before}"), (
        "it looks there because of the token before"
    )
    assert float(pairs.max()) > 0.8 * score


def test_graph_facts(by_hand: LanguageModel) -> None:
    trace = planted_trace(by_hand)
    found = graph.trace_graph(trace, "planted", Letters(), n_traced=8)
    facts = found.facts
    assert facts["edge_sum"] == pytest.approx(facts["logit_difference"], abs=1e-3)
    assert sum(facts[f"{kind}_share"] for kind in ("error", "embedding", "untraced", "bias")) == pytest.approx(1)
    assert {link[1] for link in found.links} <= {node.node_id for node in found.nodes}
    smaller = graph.trace_graph(trace, "planted", Letters(), n_traced=8, node_share=0.3)
    assert len(smaller.nodes) < len(found.nodes)


def test_influence_follows_paths_by_hand() -> None:
    # 0 and 1 feed 2; 0 (with weight 1) and 2 (with weight 3) feed the last.
    inputs = {3: torch.tensor([1.0, 0.0, 3.0]), 2: torch.tensor([2.0, -2.0, 0.0])}
    expected = torch.tensor([0.25 + 0.75 * 0.5, 0.75 * 0.5, 0.75, 1.0])
    for order in ((3, 2), (2, 3)):
        assert torch.allclose(graph.influence([-1, -1, 0, 1], {number: inputs[number] for number in order}), expected)


@given(scores=st.lists(st.floats(0, 10), min_size=1, max_size=20), share=st.floats(0.05, 1.0))
def test_kept_scores_are_the_fewest_that_hold_the_share(scores: list[float], share: float) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    kept = graph.keep_cumulative(values, share)
    assert float(values[kept].sum()) >= share * float(values.sum()) - 1e-9
    if int(kept.sum()) > 1:
        fewer = values[kept].sort(descending=True).values[:-1]
        assert float(fewer.sum()) < share * float(values.sum())


def random_graph(n: int, seed: int) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    nodes = [GraphNode(f"E_{t}_{t}", "embedding", -1, t, t, f"token {t}", 0.1) for t in range(3)]
    nodes += [GraphNode(f"{i}_{7 * i}_2", "unit", i, 7 * i, 2, 'a "label"\n', 0.5, float(i)) for i in range(1, n)]
    nodes += [
        GraphNode("1_-1_0", "error", 1, -1, 0, "error", None),
        GraphNode("31_5_2", "logit", 30, 5, 2, "logit", 1.0),
    ]
    ends = [node.node_id for node in nodes]
    weights = torch.randn(n, generator=generator).tolist()
    links = tuple((ends[i % (len(ends) - 1)], ends[-1], weight) for i, weight in enumerate(weights))
    return Graph("g", "a b c", ("a", " b", " ü"), 30, tuple(nodes), links, {"traced": n, "node_share": 0.8})


@given(n=st.integers(1, 9), seed=st.integers(0, 9))
def test_files_come_back_as_they_went(tmp_path_factory: pytest.TempPathFactory, n: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("graph") / "g.json"
    wanted = random_graph(n, seed)
    graph.write_graph(wanted, path)
    assert graph.read_graph(path) == wanted


def test_file_has_what_viewers_ask_for(tmp_path: Path) -> None:
    path = graph.write_graph(random_graph(4, 0), tmp_path / "g.json", probability=0.4, page="heads/{layer}_{unit}.html")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version"} <= set(
        content["metadata"]
    )
    assert set(content["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    needed = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "is_target_logit", "run_idx"}
    needed |= {"reverse_ctx_idx", "jsNodeId", "clerp", "influence", "activation"}
    for node in content["nodes"]:
        assert needed <= set(node)
        assert isinstance(node["layer"], str)
        assert isinstance(node["feature"], int)
        assert node["feature_type"] in {"embedding", "cross layer transcoder", "mlp reconstruction error", "logit"}
        layer, feature, position = node["node_id"].split("_")
        assert (layer, int(position)) == (node["layer"], node["ctx_idx"])
        if node["feature_type"] == "cross layer transcoder":
            assert node["page"] == f"heads/{layer}_{feature}.html"
            total = int(layer) + int(feature)
            assert node["feature"] == total * (total + 1) // 2 + int(feature)
    (logit,) = [node for node in content["nodes"] if node["is_target_logit"]]
    assert logit["token_prob"] == 0.4
    assert len({node["node_id"] for node in content["nodes"]}) == len(content["nodes"])


def test_bad_input_is_refused_in_one_sentence(by_hand: LanguageModel, tmp_path: Path) -> None:
    trace = planted_trace(by_hand)
    with pytest.raises(UserError, match="MHSA head has no single activation"):
        planted_trace(by_hand, "mhsa")
    with pytest.raises(UserError, match="at most 5,000"):
        graph.trace_graph(trace, "g", Letters(), n_traced=6_000)
    with pytest.raises(UserError, match=r"200 tokens, about .* GB .* cut it to 128"):
        Trace(trace.sparse, torch.zeros(200, dtype=torch.long), [1], [2])
    with pytest.raises(UserError, match="Layer 7 has no Lorsa"):
        Stream(trace).qk(7, 0, 1, 0)
    with pytest.raises(UserError, match="cannot look at 5"):
        Stream(trace).qk(1, 0, 2, 5)
    broken = tmp_path / "broken.json"
    broken.write_text('{"nodes": []}', encoding="utf-8")
    with pytest.raises(UserError, match="not a graph in circuit-tracer's schema"):
        graph.read_graph(broken)
    path = graph.write_graph(random_graph(3, 0), tmp_path / "g.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["links"].append({"source": "9_9_9", "target": "31_5_2", "weight": 1.0})
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="link to 9_9_9"):
        graph.read_graph(path)
