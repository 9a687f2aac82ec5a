"""Edges sum to what they explain, pairs sum to scores, pruning keeps what matters, and files hold what viewers need."""

from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_nodes import planted_sparse, random_units
from tiny_models import KINDS, random_tokens, save_tiny_model

from lorsa_utils import store
from lorsa_utils.circuits import graph
from lorsa_utils.circuits.graph import Trace
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
    every = [source for source in trace.sources if source.kind == "unit"]
    units = [next(unit for unit in reversed(every) if unit.layer == layer) for layer in LAYERS]
    units.append(next(unit for unit in every if unit.layer == 2 and unit.position == 3))
    edges, values, constants = trace.edges([trace.logit, *units])
    with torch.no_grad():
        logits = tiny.logits(trace.tokens[None])[0, -1]
    difference = pytest.approx(float(logits[3] - logits[9]), abs=1e-4)
    assert float(values[0]) == trace.logit.value == difference
    assert sum(value for _, value in trace.logit_parts()) == difference, "its direct parts sum to it"
    assert values[1:].tolist() == pytest.approx([unit.value for unit in units], abs=1e-4)
    if tiny.config.model_type == "qwen3":  # the one kind here without other biases
        assert torch.allclose(edges.sum(dim=1) + constants, values, atol=1e-4)
    for target, row in zip(units, edges[1:], strict=True):
        later = [source.layer >= target.layer or source.position > target.position for source in trace.sources]
        assert not row[torch.tensor(later)].any(), "from earlier layers and no later position"


def test_edge_is_the_slope_of_the_frozen_model(tiny: LanguageModel) -> None:
    """Remove half of one source from the frozen model by hand: the logit difference falls by half the edge."""
    trace = random_trace(tiny)
    edges = trace.edges([trace.logit]).weights
    (number,) = [i for i, source in enumerate(trace.sources) if source[:4] == ("error", 2, -1, 5)]
    shift = torch.zeros_like(trace.activity[2].y)
    shift[0, 5] = -0.5 * trace.activity[2].error[0, 5]
    # After layer 2, the last attention of a tiny model, only norms and one MLP follow.
    leaf = torch.zeros_like(shift).requires_grad_()
    with graph.frozen(tiny), tiny.splice({2: lambda x, y: y + leaf}):
        logits = tiny.logits(trace.tokens[None])[0, -1]
        slope = torch.autograd.grad(logits[3] - logits[9], leaf)[0]
    assert float((slope * shift).sum()) == pytest.approx(-0.5 * float(edges[0, number]), abs=1e-4)


def test_pairs_sum_to_the_score(tiny: LanguageModel) -> None:
    trace = random_trace(tiny)
    for layer, unit, query, key in ((0, 5, 6, 2), (2, 17, 4, 0), (2, 40, 3, 3)):
        pairs, queries, keys, score = trace.qk(layer, unit, query, key)
        assert pairs.shape == (len(queries), len(keys))
        assert float(pairs.sum()) == pytest.approx(score, abs=1e-4)
        module = trace.sparse.layers[layer].module  # type: ignore[attr-defined]
        pattern = module.attention_pattern(trace.inputs[layer], unit // module.config.group_size)[0, query]
        scores = torch.tensor([trace.qk(layer, unit, query, other)[3] for other in range(query + 1)])
        assert torch.allclose(scores.softmax(dim=0), pattern[: query + 1], atol=1e-4)


TASK = planted.planted_task(n=1)


def planted_trace(model: LanguageModel, kind: str = "lorsa") -> Trace:
    return Trace(planted_sparse(model, kind), TASK.clean[0], TASK.answers[0].tolist(), TASK.wrong[0].tolist())


@pytest.fixture(scope="module")
def trace(model: LanguageModel) -> Trace:
    return planted_trace(model)


@pytest.fixture(scope="module")
def traced(trace: Trace) -> dict[str, Any]:
    page = "heads/{layer}_{unit}.html"
    return graph.trace_graph(trace, "planted", n_traced=8, probability=0.4, page=page)


def test_planted_circuit_is_read_off_graph_and_scores(trace: Trace, traced: dict[str, Any]) -> None:
    before, after = int(TASK.clean[0, 2]), int(TASK.answers[0, 0])
    units = [node for node in traced["nodes"] if node["kind"] == "unit"]
    strongest = max(units, key=lambda node: node["influence"])
    assert strongest["node_id"] == f"1_{after}_8"
    into = [link for link in traced["links"] if link["target"] == strongest["node_id"]]
    sources = {link["source"] for link in into if abs(link["weight"]) > 0.5 * strongest["activation"]}
    assert sources == {f"E_{after}_3"}, "the token after the one like the last"
    pairs, queries, keys, score = trace.qk(1, after, 8, 3)
    query, key = divmod(int(pairs.argmax()), len(keys))
    assert queries[query] == "embedding"
    assert keys[key] == f"0.{before}", "it looks there because of the token before"
    assert float(pairs.max()) > 0.8 * score


def test_graph_facts(trace: Trace, traced: dict[str, Any]) -> None:
    facts, ids = traced["metadata"]["facts"], {node["node_id"] for node in traced["nodes"]}
    assert facts["edge_sum"] == pytest.approx(facts["logit_difference"], abs=1e-3)
    assert sum(facts[f"{kind}_share"] for kind in ("error", "embedding", "untraced", "bias")) == pytest.approx(1)
    assert {link[end] for link in traced["links"] for end in ("source", "target")} <= ids
    smaller = graph.trace_graph(trace, "planted", n_traced=8, node_share=0.3)
    assert len(smaller["nodes"]) < len(ids)


def test_influence_follows_paths_model() -> None:
    # 0 and 1 feed 2; 0 (with weight 1) and 2 (with weight 3) feed the last.
    inputs = {3: torch.tensor([1.0, 0.0, 3.0]), 2: torch.tensor([2.0, -2.0, 0.0])}
    expected = torch.tensor([0.25 + 0.75 * 0.5, 0.75 * 0.5, 0.75, 1.0])
    for order in ((3, 2), (2, 3)):
        assert torch.allclose(graph.influence([-1, -1, 0, 1], {number: inputs[number] for number in order}), expected)


@given(scores=st.lists(st.floats(0, 10), min_size=1, max_size=20), share=st.floats(0.05, 1.0))
def test_kept_scores_are_the_fewest_that_hold_the_share(scores: list[float], share: float) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    kept = values[graph.keep_cumulative(values, share)].sort(descending=True).values
    wanted = share * float(values.sum())
    assert float(kept.sum()) >= wanted - 1e-9
    assert len(kept) <= 1 or float(kept[:-1].sum()) < wanted


def test_file_has_what_viewers_ask_for(traced: dict[str, Any], tmp_path: Path) -> None:
    store.write_json(tmp_path / "g.json", traced)
    assert graph.read_graph(tmp_path / "g.json") == traced
    nodes = traced["nodes"]
    assert {node["kind"] for node in nodes} == {"embedding", "unit", "logit"}
    assert set(traced) == {"metadata", "qParams", "nodes", "links"}
    needed = {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version"}
    assert needed <= set(traced["metadata"])
    assert set(traced["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    needed = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "is_target_logit", "run_idx"}
    needed |= {"reverse_ctx_idx", "jsNodeId", "clerp", "influence", "activation"}
    for node in nodes:
        assert needed <= set(node)
        assert isinstance(node["feature"], int)
        assert node["feature_type"] in {"embedding", "cross layer transcoder", "mlp reconstruction error", "logit"}
        layer, feature, position = node["node_id"].split("_")
        assert (layer, int(position)) == (node["layer"], node["ctx_idx"])
        if node["kind"] == "unit":
            assert node["page"] == f"heads/{layer}_{feature}.html"
            total = int(layer) + int(feature)
            assert node["feature"] == total * (total + 1) // 2 + int(feature)
    assert [node["token_prob"] for node in nodes if node["is_target_logit"]] == [0.4]
    assert len({node["node_id"] for node in nodes}) == len(nodes)


def test_bad_input_is_refused_in_one_sentence(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    with pytest.raises(UserError, match="MHSA head has no single activation"):
        planted_trace(trace.sparse.model, "mhsa")
    with pytest.raises(UserError, match="at most 5,000"):
        graph.trace_graph(trace, "g", n_traced=6_000)
    with pytest.raises(UserError, match=r"200 tokens, about .* GB .* cut it to 128"):
        Trace(trace.sparse, torch.zeros(200, dtype=torch.long), [1], [2])
    with pytest.raises(UserError, match="Layer 7 has no Lorsa"):
        trace.qk(7, 0, 1, 0)
    with pytest.raises(UserError, match="cannot look at 5"):
        trace.qk(1, 0, 2, 5)
    node, lost = {"node_id": "1_2_3", "feature_type": "logit"}, {"source": "9_9_9", "target": "1_2_3", "weight": 1.0}
    content = {"metadata": {"prompt_tokens": []}, "nodes": [node]}
    for links, sentence in (([lost], "link to 9_9_9"), ([{}], "not a graph in circuit-tracer's schema")):
        store.write_json(path, content | {"links": links})
        with pytest.raises(UserError, match=sentence):
            graph.read_graph(path)
    store.write_json(path, content | {"links": []})
    assert graph.read_graph(path)["nodes"][0]["kind"] == "logit", "files of circuit-tracer do not say it"
