"""Starts: the copy of the MHSA has its patterns and its output space, scales are matched, draws follow the seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from tiny_models import random_tokens, save_tiny_model
from toys import D_HEAD, D_MODEL, ROTARY, ToySource, toy_site

from lorsa_utils.config import LorsaConfig, SAEConfig
from lorsa_utils.initialize import initialize, match_scale
from lorsa_utils.lorsa import SAE, Lorsa, Scaling
from lorsa_utils.models import load_model

SOURCE = ToySource(24, 12)
X, Y, MASK = SOURCE.inputs[0], SOURCE.outputs[0], SOURCE.mask
CONFIG = LorsaConfig(d_model=D_MODEL, n_ov_heads=64, n_qk_heads=4, d_qk=D_HEAD, k=64, rotary=ROTARY, score="abs")
SAE_CONFIG, TRANSCODER = SAEConfig(D_MODEL, 40, 6), SAEConfig(D_MODEL, 40, 6, kind="transcoder")


def started(config: LorsaConfig | SAEConfig = CONFIG, init: str = "mhsa", seed: int = 0) -> tuple[Any, Scaling]:
    """A module and the space it is trained in."""
    module = Lorsa(config) if isinstance(config, LorsaConfig) else SAE(config)
    return module, initialize(module, toy_site(), X, Y, MASK, init, seed)


@torch.no_grad()
def fvu(module: Any, scaling: Scaling, x: torch.Tensor = X) -> float:
    counted = scaling.targets(Y[MASK])
    error = module(scaling.inputs(x)).y[MASK] - counted
    return float(error.square().sum() / (counted - counted.mean(0)).square().sum())


def test_with_all_heads_kept_the_mhsa_start_rebuilds_much_and_a_random_one_nothing() -> None:
    copied, drawn = fvu(*started()), fvu(*started(init="random"))
    assert copied < 0.5
    assert drawn > 0.8
    assert copied < 0.5 * drawn


def test_more_heads_rebuild_the_head_outputs_better() -> None:
    many, few = (fvu(*started(CONFIG.replace(n_ov_heads=n, k=n))) for n in (1024, 8))
    assert many < 0.8 * few


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen3", "gpt2"])
def test_patterns_are_the_models(tmp_path: Path, kind: str) -> None:
    """Every QK group of the start attends as one of the model's heads does, and every head is there."""
    lm = load_model(save_tiny_model(tmp_path / kind, kind), device="cpu")
    site = lm.site(1)
    x, y = lm.capture(random_tokens(3, 20), [1])[1]
    module = Lorsa(Lorsa.config_for_site(site, n_heads=24, n_qk=2 * site.n_heads, k=4))
    module.fold(initialize(module, site, x, y, torch.ones(3, 20, dtype=torch.bool), "mhsa", 0))
    patterns = site.pattern(x)
    nearest = []
    for group in range(2 * site.n_heads):
        distance = (module.attention_pattern(x, group)[:, None] - patterns).abs().amax(dim=(0, 2, 3))
        assert distance.min() < 1e-4
        nearest.append(int(distance.argmin()))
    assert sorted(nearest) == sorted(2 * list(range(site.n_heads)))


def test_heads_write_inside_the_output_space_of_their_mhsa_head() -> None:
    module, *_ = started()
    site = toy_site()
    for head in range(64):
        inside = [float((module.W_O[head].detach() @ torch.linalg.pinv(W_O) @ W_O).norm()) for W_O in site.W_O]
        assert max(inside) == pytest.approx(1.0, abs=1e-4)


def test_activations_start_with_mean_zero() -> None:
    """A Lorsa head carries its MHSA head's deviation from the mean; the mean itself is in b_O."""
    module, scaling = started()
    z = module.pre_activations(scaling.inputs(X))[MASK]
    assert z.std() > 0.1
    assert z.mean(dim=0).abs().max() < 1e-3 * z.std()


@pytest.mark.parametrize("init", ["mhsa", "random"])
@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(k=8, score="relu"), SAE_CONFIG, TRANSCODER])
def test_what_every_start_promises(config: LorsaConfig | SAEConfig, init: str) -> None:
    """Mean 0, mean norm sqrt(d) of reads and writes, unit write directions, the mean as bias, the target's size."""
    module, scaling = started(config, init)
    inputs, targets = scaling.inputs(Y if config.kind == "sae" else X), scaling.targets(Y)
    assert inputs[MASK].mean(dim=0).abs().max() < 1e-4
    assert float(inputs[MASK].norm(dim=1).mean()) == pytest.approx(D_MODEL**0.5, rel=1e-4)
    assert float(targets[MASK].norm(dim=1).mean()) == pytest.approx(D_MODEL**0.5, rel=1e-4)
    assert torch.allclose(module.W_O.norm(dim=1), torch.ones(module.n_units), atol=1e-5)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert match_scale(module, inputs, targets, MASK) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("init", ["mhsa", "random"])
def test_the_seed_decides(init: str) -> None:
    first, same, other = (started(CONFIG, init, seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(parameter, same.get_parameter(name)) for name, parameter in first.named_parameters())
    assert not torch.equal(first.W_O, other.W_O)


def test_an_sae_and_a_transcoder_start_below_the_mean_predictor() -> None:
    assert fvu(*started(SAEConfig(D_MODEL, 64, 16)), Y) < 0.9
    assert fvu(*started(SAEConfig(D_MODEL, 64, 16, kind="transcoder"))) < 1.0


def test_another_head_width_is_refused() -> None:
    with refused(r"copies heads of width 4, not 6; use d_qk 4 or --init random"):
        started(CONFIG.replace(d_qk=6))
    assert fvu(*started(CONFIG.replace(d_qk=6), "random")) < 1.5
