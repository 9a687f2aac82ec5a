"""Units against the modules' own methods; shares sum to one; removing nothing changes nothing, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_heads import random_heads
from tiny_models import byte_tokenizer, random_tokens, save_tiny_model
from torch import Tensor
from toys import D_MODEL, random_inputs, random_lorsa, random_sae, toy_site

from lorsa_utils.exceptions import UserError
from lorsa_utils.heads import families, units
from lorsa_utils.heads.prompts import Vocabulary
from lorsa_utils.heads.units import LorsaHeads, MHSAHeads, Removals, SAEFeatures, Unembedding, Units, ablate
from lorsa_utils.models import LanguageModel, load_model

LENGTH = 9


def layer_output(x: Tensor) -> Tensor:
    return toy_site().head_outputs(x).sum(dim=2) + toy_site().b_O


KINDS: dict[str, Units] = {
    "lorsa": LorsaHeads(random_lorsa(score="relu")),
    "signed": LorsaHeads(random_lorsa(score="abs")),
    "sae": SAEFeatures(random_sae(), toy_site()),
    "mhsa": MHSAHeads(toy_site()),
}


@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 20))
def test_masses_split_over_all_sources(kind: str, seed: int) -> None:
    each, x = KINDS[kind], random_inputs(2, LENGTH, seed=seed)
    positions = torch.tensor([0, 3, LENGTH - 1])
    one_by_one = torch.eye(LENGTH)[:, None].expand(-1, 3, -1)
    rows = each.rows(each.prepare(x, layer_output(x)), 1, positions, one_by_one)
    assert torch.allclose(rows.mass.sum(dim=0), rows.total, atol=1e-4)
    later = torch.arange(LENGTH)[:, None] > positions
    assert not rows.mass[later].any(), "nothing comes from later tokens"
    assert ((rows.activation > 0) == (rows.total > 0)).all()


def test_lorsa_heads_are_the_modules() -> None:
    module, x = random_lorsa(), random_inputs(1, LENGTH)
    each = LorsaHeads(module)
    batch, positions = each.prepare(x, x), torch.arange(LENGTH)
    source = torch.zeros(1, LENGTH, LENGTH)
    source[0, :, 2] = 1
    rows = each.rows(batch, 0, positions, source)
    indices, values = module.encode(x)
    kept = torch.zeros(LENGTH, 24).scatter(1, indices[0], values[0])
    assert torch.allclose(rows.value, kept, atol=1e-5)
    assert torch.allclose(rows.activation, kept * module.W_O.norm(dim=1), atol=1e-5)
    for head in range(24):
        pattern = module.z_pattern(x, head)[0]
        active = kept[:, head] > 0
        assert torch.allclose(pattern.sum(dim=1)[active], kept[active, head], atol=1e-5)
        assert torch.allclose(rows.mass[0, active, head], pattern[active, 2].abs(), atol=1e-5)
        assert torch.allclose(rows.total[active, head], pattern[active].abs().sum(dim=1), atol=1e-5)


def test_patterns_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    each, x = LorsaHeads(random_lorsa()), random_inputs(1, LENGTH)
    arguments = (each.prepare(x, x), 0, torch.arange(LENGTH), torch.rand(2, LENGTH, LENGTH))
    whole = each.rows(*arguments)
    monkeypatch.setattr(units, "_PATTERN_VALUES_AT_ONCE", LENGTH**2)
    for one, other in zip(whole, each.rows(*arguments), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_attribution_of_sae_features_is_exact() -> None:
    sae, site, x = random_sae(), toy_site(), random_inputs(1, LENGTH)
    y = layer_output(x)
    pre = sae.pre_activations(y)[0]
    each = SAEFeatures(sae, site)
    rows = each.rows(each.prepare(x, y), 0, torch.arange(LENGTH), torch.zeros(0, LENGTH, LENGTH))
    pattern, moved = site.pattern(x)[0], site.values(x)[0] @ site.W_O
    parts = torch.einsum("hij,hjd,nd->ijn", pattern, moved, sae.W_E)
    constant = sae.W_E @ site.b_O + sae.b_E
    assert torch.allclose(parts.sum(dim=1) + constant, pre, atol=1e-4)
    active = rows.value > 0
    assert torch.allclose(rows.total[active], parts.abs().sum(dim=1)[active], atol=1e-4)
    with pytest.raises(UserError, match="transcoder"):
        SAEFeatures(random_sae(kind="transcoder"), site)


def test_mhsa_heads() -> None:
    site, x = toy_site(), random_inputs(3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    mean = units.mean_head_values(site, x, mask)
    assert torch.allclose(mean, site.head_values(x)[mask].mean(dim=0).double(), atol=1e-6)
    each = MHSAHeads(site, mean)
    rows = each.rows(each.prepare(x, x), 2, torch.tensor([4]), torch.ones(1, 1, LENGTH))
    expected = torch.einsum("he,hed->hd", site.head_values(x)[2, 4] - mean.float(), site.W_O)
    assert torch.allclose(rows.activation[0], expected.norm(dim=1), atol=1e-5)
    norms = (site.values(x)[2] @ site.W_O).norm(dim=2)
    assert torch.allclose(rows.total[0], (site.pattern(x)[2, :, 4] * norms).sum(dim=1), atol=1e-5)
    with pytest.raises(UserError, match="longer text"):
        units.mean_head_values(site, x, torch.zeros_like(mask))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_all_units_write_is_what_the_module_writes(kind: str) -> None:
    each, x = KINDS[kind], random_inputs(2, LENGTH)
    y = layer_output(x)
    written = each.written(x, y, torch.arange(each.n))
    module: Any = toy_site() if kind == "mhsa" else each.module  # type: ignore[attr-defined]
    whole = y if kind == "mhsa" else module(module.input_from(x, y)).y
    assert torch.allclose(written, whole - module.b_O, atol=1e-4)
    directions = torch.randn(LENGTH, D_MODEL, generator=torch.Generator().manual_seed(0))
    batch, positions = each.prepare(x, y), torch.arange(LENGTH)
    value = each.rows(batch, 1, positions, torch.zeros(0, LENGTH, LENGTH)).value
    along = each.along(batch, 1, positions, value, directions)
    for unit in (0, each.n - 1):
        alone = each.written(x, y, torch.tensor([unit]))[1]
        assert torch.allclose(along[:, unit], (alone * directions).sum(dim=1), atol=1e-4)
    assert float(each.written(x, y, torch.tensor([], dtype=torch.long)).detach().abs().sum()) == 0


# ---- in a whole model


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("model"), request.param))


@pytest.fixture(scope="module")
def heads(model: LanguageModel) -> LorsaHeads:
    return LorsaHeads(random_heads(model.site(1), scale=0.2))


def test_direct_effect_on_logits_is_the_models(model: LanguageModel, heads: LorsaHeads) -> None:
    """With the norm's scale frozen, a vector added to what the norm reads changes centred logits by its dot product."""
    found: dict[str, Tensor] = {}
    norm = units.final_norm(model)
    handle = norm.register_forward_pre_hook(lambda module, arguments: found.update(residual=arguments[0]))
    logits = model.logits(random_tokens(2, 7))
    handle.remove()
    residual, tokens = found["residual"][0], torch.tensor([5, 9, 200, 31, 7, 7, 0])
    unembedding = Unembedding(model)
    bias = getattr(norm, "bias", None)
    constant = 0.0 if bias is None else unembedding.weight[tokens] @ bias
    centred = logits[0] - logits[0].mean(dim=-1, keepdim=True)
    whole = (unembedding.directions(residual, tokens) * residual).sum(dim=1) + constant
    assert torch.allclose(whole, centred.gather(1, tokens[:, None])[:, 0], atol=1e-3)
    write = heads.lorsa.W_O
    logits = unembedding.logits(write)
    assert torch.equal(unembedding.top_tokens(write, 3, True)[:, 0], logits.argmax(dim=1))
    assert torch.equal(unembedding.top_tokens(write, 3, False)[:, 0], logits.argmin(dim=1))


BYTES = Vocabulary(byte_tokenizer(), 256)
FOUND = families.induction(BYTES, 3, length=8)


def test_ablate_nothing_changes_nothing(model: LanguageModel, heads: LorsaHeads) -> None:
    logits, untouched = model.logits(FOUND.tokens), model.loss(FOUND.tokens)[0]
    last = torch.zeros(len(FOUND.tokens), 1, heads.n + 1)
    for nothing in ([], {3: 0.0}, last):
        with ablate(model, {1: heads}, {1: nothing}):
            assert torch.equal(model.logits(FOUND.tokens), logits)
    last[-1, :, :-1] = 1
    with ablate(model, {1: heads}, {1: last}):
        changed = model.logits(FOUND.tokens)
    assert torch.equal(changed[:-1], logits[:-1]), "the other sequences keep theirs"
    assert not torch.equal(changed[-1], logits[-1])
    removals = Removals(model, 1, FOUND, batch_size=len(FOUND.tokens))
    assert torch.equal(removals.untouched, untouched[FOUND.row, FOUND.position])
    assert torch.equal(removals.losses(heads, []), removals.untouched)


def test_ablate_takes_shares_the_error_and_another_prompt(model: LanguageModel, heads: LorsaHeads) -> None:
    """With `ablate` a layer's output moves by what is removed and what comes in its place."""
    tokens, other = random_tokens(2, 9), random_tokens(2, 9, seed=7)
    (x, y), elsewhere = model.capture(tokens, [1])[1], model.capture(other, [1])[1]
    written = heads.written(x, y, [1, 2])
    everything = torch.ones(heads.n + 1, dtype=torch.bool)
    expected: list[tuple[Any, Any, Tensor]] = [
        ([1, 2], None, y - written),
        ({1: -1.0, 2: -1.0}, None, y + written),
        (~everything.index_fill(0, torch.tensor([heads.n]), False), None, heads.lorsa(x).y),
        (everything, {1: heads.activity(*elsewhere)}, elsewhere[1]),
    ]
    for chosen, instead, output in expected:
        with ablate(model, {1: heads}, {1: chosen}, instead):
            assert torch.allclose(model.capture(tokens, [1])[1][1], output, atol=1e-5)
    with pytest.raises(UserError, match="choose one from 0 to 23"), ablate(model, {1: heads}, {1: [3, 24]}):
        pass


def test_removal_is_the_splice_without_those_heads(model: LanguageModel, heads: LorsaHeads) -> None:
    lorsa = heads.lorsa
    chosen = [int(unit) for unit in lorsa(model.capture(FOUND.tokens, [1])[1][0]).indices[0, 12]]

    def by_hand(x: Tensor, y: Tensor) -> Tensor:
        output = lorsa(x)
        gone = torch.isin(output.indices, torch.tensor(chosen))
        return lorsa.decode(output.indices, output.values.masked_fill(gone, 0.0)) + y - output.y

    with model.splice({1: by_hand}):
        expected, _ = model.loss(FOUND.tokens)
    removals = Removals(model, 1, FOUND, batch_size=3)
    values = removals.losses(heads, chosen)
    assert torch.allclose(values, expected[FOUND.row, FOUND.position], atol=1e-4)
    table = removals.effects(heads, {"none": [], "some": chosen})
    assert table["n"].tolist() == [0, len(chosen)]
    assert table.loc[0, ["labelled", "controls"]].tolist() == [0.0, 0.0]
    difference = (values - removals.untouched)[FOUND.positive]
    assert table.loc[1, "labelled"] == pytest.approx(float(difference.mean()), abs=1e-4)


def test_effect_error_is_over_pairs() -> None:
    found: Any = families.induction(BYTES, 2, length=4)
    changed = torch.where(found.pair == 0, 1.0, 3.0)
    effect = units.effect(changed, torch.zeros(len(found.row)), found, found.pair == 1)
    assert effect.labelled == 2.0
    assert effect.labelled_error == pytest.approx(1.0)
    assert effect.p == pytest.approx(0.25, abs=0.02), "one of four ways to flip two pairs"
    assert (effect.where_active, effect.active) == (3.0, 0.5)
    assert effect.controls == 2.0


def test_prompts_where_no_removed_unit_is_active_are_not_run(
    model: LanguageModel, heads: LorsaHeads, monkeypatch: pytest.MonkeyPatch
) -> None:
    removals, real, ran = Removals(model, 1, FOUND), model.loss, list[int]()
    untouched = removals.untouched
    whole = {unit: removals.losses(heads, [unit]) for unit in range(heads.n)}
    active = heads.active(*model.capture(FOUND.tokens, [1])[1]).any(dim=1)
    some = [unit for unit in range(heads.n) if 0 < int(active[:, unit].sum()) < len(FOUND.tokens)]
    monkeypatch.setattr(model, "loss", lambda tokens, *rest: (ran.append(len(tokens)), real(tokens, *rest))[1])
    table = removals.effects(heads, {str(unit): [unit] for unit in some})
    assert some
    assert sum(ran) == int(active[:, some].sum())
    for unit, measured in zip(some, table["labelled"], strict=True):
        assert measured == pytest.approx(float((whole[unit] - untouched)[FOUND.positive].mean()), abs=1e-6)


def test_units_of_several_kinds_share_one_pass_over_the_first_blocks(model: LanguageModel, heads: LorsaHeads) -> None:
    kinds = {"lorsa": heads, "mhsa": MHSAHeads(model.site(1))}
    passes: list[int] = []
    hook = model.attention_module(0).register_forward_hook(lambda module, args, output: passes.append(1))
    removals = Removals(model, 1, FOUND, batch_size=len(FOUND.tokens))
    tables = {name: removals.effects(each, {"first": [0], "all": range(each.n)}) for name, each in kinds.items()}
    hook.remove()
    assert len(passes) == 1
    with model.splice({1: lambda x, y: y - kinds["mhsa"].written(x, y, torch.arange(4))}):
        changed, _ = model.loss(FOUND.tokens)
    expected = (changed[FOUND.row, FOUND.position] - removals.untouched)[FOUND.positive]
    assert tables["mhsa"].loc[1, "labelled"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert (tables["lorsa"]["labelled"] != tables["mhsa"]["labelled"]).all()
