"""Configurations come back equal from JSON, and impossible ones are refused in a sentence."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from lorsa_utils import config
from lorsa_utils.config import PROFILES, Config, LorsaConfig, Preset, Profile, RotaryConfig, SAEConfig, TrainConfig
from lorsa_utils.selection import SCORES

BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    "int": st.integers(1, 300),
    "float": st.floats(0.1, 0.5),
    "bool": st.booleans(),
    "str": st.text(),
    "tuple[int, ...]": st.lists(st.integers(0, 99), max_size=4).map(tuple),
}


def drawn(settings: type[Config], /, **own: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Fields are at random within their types but for `own`."""
    plain = {field.name: BY_TYPE[field.type] for field in dataclasses.fields(settings) if field.type in BY_TYPE}
    return st.builds(settings, **plain | own)


ROTARIES = drawn(
    RotaryConfig,
    rope_type=st.sampled_from(config.ROPE_TYPES),
    rotary_dim=st.integers(1, 64).map(lambda pairs: 2 * pairs),
)
STRATEGIES: dict[type[Config], st.SearchStrategy[Any]] = {
    RotaryConfig: ROTARIES,
    LorsaConfig: drawn(
        LorsaConfig,
        n_ov_heads=st.sampled_from([600, 1200]),
        n_qk_heads=st.sampled_from([1, 4, 600]),
        d_qk=st.integers(128, 512),
        rotary=ROTARIES,
        score=st.sampled_from(list(SCORES)),
    ),
    SAEConfig: drawn(SAEConfig, n_features=st.integers(300, 10**6), kind=st.sampled_from(["sae", "transcoder"])),
    TrainConfig: drawn(TrainConfig, init=st.sampled_from(["mhsa", "random"])),
    Profile: drawn(Profile),
    Preset: drawn(Preset),
}
KINDS = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Config)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Config], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_comes_back_equal_from_json(kind: type[Config], data: st.DataObject) -> None:
    assert kind in STRATEGIES, f"{kind.__name__} is new: add a strategy that draws it"
    one = data.draw(STRATEGIES[kind])
    again = kind.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert hash(again) == hash(one)
    assert type(again) is kind


GOOD: dict[type[Config], dict[str, int]] = {
    LorsaConfig: {"d_model": 8, "n_ov_heads": 12, "n_qk_heads": 3, "d_qk": 4, "k": 2},
    SAEConfig: {"d_model": 8, "n_features": 16, "k": 2},
    RotaryConfig: {},
    TrainConfig: {},
}


IMPOSSIBLE: dict[type[Config], list[tuple[dict[str, Any], str]]] = {
    RotaryConfig: [
        ({"rope_type": "yarn"}, "rope_type must be 'none' or 'default' or .*not 'yarn'"),
        ({"rotary_dim": 3}, "must be even"),
        ({"rotary_dim": -2}, "must be even"),
        ({"rope_type": "default", "rotary_dim": 0}, "must be positive"),
    ],
    LorsaConfig: [
        ({"d_model": 0}, "d_model must be at least 1, not 0"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 13}, r"k \(13\) must not exceed the number of heads \(12\)"),
        ({"n_qk_heads": 5}, r"n_heads \(12\) must be a multiple of n_qk \(5\)"),
        ({"score": "best"}, "score must be 'relu' or 'abs', not 'best'"),
        ({"rotary": RotaryConfig("default", 8)}, r"rotary_dim \(8\) must not exceed d_qk \(4\)"),
        ({"n_heads": 12}, "another version .*unexpected .*'n_heads'"),
        ({"rotary": {"base": 1.0}}, "another version .*unexpected .*'base'"),
        ({"k": "2"}, "k of a LorsaConfig must be of type int, not '2'"),
        ({"k": 2.5}, "k of a LorsaConfig must be of type int, not 2.5"),
        ({"qk_norm": 1}, "qk_norm of a LorsaConfig must be of type bool"),
        ({"rotary": None}, "rotary must be a RotaryConfig"),
    ],
    SAEConfig: [
        ({"k": 17}, r"k \(17\) must not exceed the number of features \(16\)"),
        ({"n_features": 0}, "n_features must be at least 1"),
        ({"kind": "crosscoder"}, "kind must be"),
    ],
    TrainConfig: [
        ({"tokens": 0}, "tokens must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"decay": 1.5}, "decay is a share of the budget"),
        ({"warmup": 0.6, "decay": 0.6}, "together exceed the whole budget"),
        ({"clip": -1.0}, "clip must not be negative"),
        ({"tokens": True}, "tokens of a TrainConfig must be of type int, not True"),
        ({"init": "zeros"}, "init must be"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "change", "words"), [(kind, *case) for kind, cases in IMPOSSIBLE.items() for case in cases]
)
def test_impossible_settings_are_refused_in_a_sentence(kind: type[Config], change: dict[str, Any], words: str) -> None:
    kind.from_dict(GOOD[kind])
    with refused(words):
        kind.from_dict(GOOD[kind] | change)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, good in GOOD.items() for name in good])
def test_missing_settings_are_refused_in_a_sentence(kind: type[Config], name: str) -> None:
    with refused(f"incomplete.*'{name}'"):
        kind.from_dict({key: value for key, value in GOOD[kind].items() if key != name})


def test_a_changed_copy_is_checked_again_and_the_original_stays() -> None:
    one = LorsaConfig.from_dict(GOOD[LorsaConfig])
    assert one.replace(k=12).k == 12
    with refused("must not exceed"):
        one.replace(k=13)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.k = 3  # type: ignore[misc]
    assert one.k == 2


def test_sizes_are_those_of_the_paper() -> None:
    pythia = LorsaConfig(d_model=768, n_ov_heads=6144, n_qk_heads=96, d_qk=64, k=64)
    llama = LorsaConfig(d_model=4096, n_ov_heads=32768, n_qk_heads=256, d_qk=128, k=128)
    assert pythia.n_parameters == 18 * 2**20
    assert llama.n_parameters == 512 * 2**20
    assert (pythia.group_size, llama.group_size) == (64, 128)
    assert SAEConfig(d_model=768, n_features=12288, k=64).n_parameters == pythia.n_parameters


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_profiles_compare_like_with_like(profile: Profile) -> None:
    """d_model cancels."""
    sizes = {"n_ov_heads": profile.n_heads, "n_qk_heads": profile.n_qk, "d_qk": profile.d_head}
    equal = SAEConfig(d_model=64, n_features=profile.sae_features_equal_parameters, k=profile.k)
    assert equal.n_parameters == LorsaConfig(d_model=64, k=profile.k, **sizes).n_parameters
    assert profile.layer in profile.layers
    assert config.get_profile(profile.name) is profile
    assert profile.is_scaled_down == (profile.name in ("smoke", "laptop"))


def test_presets_are_profiles_and_unknown_names_are_refused() -> None:
    assert list(PROFILES) == ["smoke", "laptop", "paper", *config.PRESETS]
    assert PROFILES["paper"] == PROFILES["pythia-160m"].replace(name="paper")
    assert config.get_preset("qwen3-1.7b").n_heads == 8 * 2048
    with refused("no preset 'gpt-5'; choose one of pythia-160m, llama-3.1-8b, qwen3-1.7b"):
        config.get_preset("gpt-5")
    with refused("no profile 'tiny'; choose one of smoke, laptop, paper"):
        config.get_profile("tiny")
