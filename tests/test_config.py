"""Configurations come back equal from JSON, and impossible ones are refused in a sentence."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorsa_utils import config
from lorsa_utils.config import (
    PRESETS,
    PROFILES,
    Config,
    LorsaConfig,
    Preset,
    Profile,
    RotaryConfig,
    SAEConfig,
    TrainConfig,
)
from lorsa_utils.exceptions import UserError
from lorsa_utils.selection import SCORES

positive = st.integers(1, 10**6)
number = st.floats(0.1, 1e9)


@st.composite
def rotaries(draw: st.DrawFn, d_qk: int = 256) -> RotaryConfig:
    return RotaryConfig(
        rope_type=draw(st.sampled_from(config.ROPE_TYPES)),
        rotary_dim=2 * draw(st.integers(1, d_qk // 2)),
        theta=draw(number),
        adjacent_pairs=draw(st.booleans()),
        factor=draw(number),
        low_freq_factor=draw(number),
        high_freq_factor=draw(number),
        original_context=draw(positive),
    )


@st.composite
def lorsas(draw: st.DrawFn) -> LorsaConfig:
    n_qk, group, d_qk = draw(st.integers(1, 300)), draw(st.integers(1, 300)), draw(st.integers(2, 512))
    return LorsaConfig(
        d_model=draw(positive),
        n_ov_heads=n_qk * group,
        n_qk_heads=n_qk,
        d_qk=d_qk,
        k=draw(st.integers(1, n_qk * group)),
        attn_scale=draw(number),
        rotary=draw(rotaries(d_qk)),
        qk_norm=draw(st.booleans()),
        qk_norm_eps=draw(st.floats(1e-12, 1e-2)),
        score=draw(st.sampled_from(list(SCORES))),
    )


@st.composite
def saes(draw: st.DrawFn) -> SAEConfig:
    n_features = draw(positive)
    return SAEConfig(
        draw(positive), n_features, draw(st.integers(1, n_features)), draw(st.sampled_from(["sae", "transcoder"]))
    )


def train_configs() -> st.SearchStrategy[TrainConfig]:
    share = st.floats(0, 0.5)
    return st.builds(
        TrainConfig,
        **dict.fromkeys(("tokens", "batch_size", "k_start", "aux_k", "dead_window", "seed", "log_every"), positive),
        **dict.fromkeys(("lr", "clip", "aux_weight", "save_every_seconds"), number),
        **dict.fromkeys(("warmup", "decay", "k_warmup", "beta1", "beta2"), share),
        freeze_qk=st.booleans(),
        init=st.sampled_from(["mhsa", "random"]),
    )


def profiles() -> st.SearchStrategy[Profile]:
    layers = st.lists(positive, max_size=4).map(tuple)
    texts = {"name": st.text(), "model": st.text()}
    rest = {field.name: positive for field in dataclasses.fields(Profile) if field.name not in {*texts, "layers"}}
    return st.builds(Profile, layers=layers, **texts, **rest)


STRATEGIES: dict[type[Config], st.SearchStrategy[Any]] = {
    RotaryConfig: rotaries(),
    LorsaConfig: lorsas(),
    SAEConfig: saes(),
    TrainConfig: train_configs(),
    Profile: profiles(),
    Preset: st.sampled_from(list(PRESETS.values())),
}
KINDS = [
    kind
    for kind in vars(config).values()
    if isinstance(kind, type) and issubclass(kind, Config) and kind not in (Config, config.Size)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_comes_back_equal_from_json(kind: type[Config], data: st.DataObject) -> None:
    assert kind in STRATEGIES, f"{kind.__name__} is new: add a strategy that draws it"
    one = data.draw(STRATEGIES[kind])
    again = kind.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert hash(again) == hash(one)
    assert type(again) is kind


LORSA = {"d_model": 8, "n_ov_heads": 12, "n_qk_heads": 3, "d_qk": 4, "k": 2}
SAE = {"d_model": 8, "n_features": 16, "k": 2}


@pytest.mark.parametrize(
    ("kind", "good", "change", "words"),
    [
        (RotaryConfig, {}, {"rope_type": "yarn"}, "'yarn' is not supported; supported are none, default"),
        (RotaryConfig, {}, {"rotary_dim": 3}, "must be even"),
        (RotaryConfig, {}, {"rotary_dim": -2}, "must be even"),
        (RotaryConfig, {}, {"rope_type": "default", "rotary_dim": 0}, "must be positive"),
        (LorsaConfig, LORSA, {"d_model": 0}, "d_model must be at least 1, not 0"),
        (LorsaConfig, LORSA, {"k": 0}, "k must be at least 1"),
        (LorsaConfig, LORSA, {"k": 13}, r"k \(13\) must not exceed the number of heads \(12\)"),
        (LorsaConfig, LORSA, {"n_qk_heads": 5}, r"n_heads \(12\) must be a multiple of n_qk \(5\)"),
        (LorsaConfig, LORSA, {"score": "best"}, "score must be 'relu' or 'abs', not 'best'"),
        (LorsaConfig, LORSA, {"rotary": RotaryConfig("default", 8)}, r"rotary_dim \(8\) must not exceed d_qk \(4\)"),
        (LorsaConfig, LORSA, {"n_heads": 12}, "Unknown setting 'n_heads'"),
        (LorsaConfig, LORSA, {"rotary": {"base": 1.0}}, "Unknown setting 'base'"),
        (LorsaConfig, LORSA, {"k": "2"}, "k of a LorsaConfig must be of type int, not '2'"),
        (LorsaConfig, LORSA, {"k": 2.5}, "k of a LorsaConfig must be of type int, not 2.5"),
        (LorsaConfig, LORSA, {"qk_norm": 1}, "qk_norm of a LorsaConfig must be of type bool"),
        (LorsaConfig, LORSA, {"rotary": None}, "rotary must be a RotaryConfig"),
        (SAEConfig, SAE, {"k": 17}, r"k \(17\) must not exceed the number of features \(16\)"),
        (SAEConfig, SAE, {"n_features": 0}, "n_features must be at least 1"),
        (SAEConfig, SAE, {"kind": "crosscoder"}, "kind must be"),
        (TrainConfig, {}, {"tokens": 0}, "tokens must be positive"),
        (TrainConfig, {}, {"lr": float("nan")}, "lr must be positive"),
        (TrainConfig, {}, {"decay": 1.5}, "decay is a share of the budget"),
        (TrainConfig, {}, {"warmup": 0.6, "decay": 0.6}, "together exceed the whole budget"),
        (TrainConfig, {}, {"clip": -1.0}, "clip must not be negative"),
        (TrainConfig, {}, {"tokens": True}, "tokens of a TrainConfig must be of type int, not True"),
        (TrainConfig, {}, {"init": "zeros"}, "init must be"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(
    kind: type[Config], good: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    kind.from_dict(good)
    with pytest.raises(UserError, match=words) as caught:
        kind.from_dict(good | change)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "good"), [(LorsaConfig, LORSA), (SAEConfig, SAE)], ids=["lorsa", "sae"])
def test_missing_settings_are_refused_in_a_sentence(kind: type[Config], good: dict[str, Any]) -> None:
    for name in good:
        with pytest.raises(UserError, match=f"incomplete.*'{name}'"):
            kind.from_dict({key: value for key, value in good.items() if key != name})


def test_a_changed_copy_is_checked_again_and_the_original_stays() -> None:
    one = LorsaConfig.from_dict(LORSA)
    assert one.replace(k=12).k == 12
    with pytest.raises(UserError, match="must not exceed"):
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
    """d_model cancels; 64 is the head width of SmolLM2-135M and of Pythia-160M."""
    d_qk = PRESETS[profile.name].d_head if profile.name in PRESETS else 64
    lorsa = LorsaConfig(d_model=64, n_ov_heads=profile.n_heads, n_qk_heads=profile.n_qk, d_qk=d_qk, k=profile.k)
    assert (
        SAEConfig(d_model=64, n_features=profile.sae_features_equal_parameters, k=profile.k).n_parameters
        == lorsa.n_parameters
    )
    assert profile.sae_features == profile.n_heads
    assert profile.layer in profile.layers
    assert config.get_profile(profile.name) is profile
    assert profile.is_scaled_down == (profile.name in ("smoke", "laptop"))


def test_presets_are_profiles_and_unknown_names_are_refused() -> None:
    assert list(PROFILES) == ["smoke", "laptop", "paper", *PRESETS]
    assert PROFILES["paper"] == PROFILES["pythia-160m"].replace(name="paper")
    assert config.get_preset("qwen3-1.7b").n_heads == 8 * 2048
    with pytest.raises(UserError, match="no preset 'gpt-5'; choose one of pythia-160m, llama-3.1-8b, qwen3-1.7b"):
        config.get_preset("gpt-5")
    with pytest.raises(UserError, match="no profile 'tiny'; choose one of smoke, laptop, paper"):
        config.get_profile("tiny")


def test_importing_settings_is_quick() -> None:
    """Commands read profiles before they answer `--help`."""
    code = (
        "import sys, lorsa_utils.config; print([name for name in ('torch', 'numpy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
