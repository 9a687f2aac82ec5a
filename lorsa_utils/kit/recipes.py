"""Artefacts that notebooks share (text, activation cache, trained modules), made by the first that asks.

Each is known by all it depends on: settings, text, and the code that decides what a trained module is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorsa_utils import __version__, store
from lorsa_utils.activations import ActivationCache, build_cache, source_identity
from lorsa_utils.config import LorsaConfig, Profile, SAEConfig, TrainConfig
from lorsa_utils.kit import hub
from lorsa_utils.lorsa import Lorsa
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences, load_text
from lorsa_utils.training import RunSpec, train_runs, training_sources

if TYPE_CHECKING:
    from lorsa_utils.kit.notebook import Context

LAYER_MODULES = ("lorsa", "sae_equal_features", "sae_equal_parameters")
"""Of notebook 03 in each layer: a Lorsa, an SAE with as many features, one with as many parameters."""


def sequences(run: Context, model: LanguageModel) -> dict[str, Sequences]:
    """`train` and `held_out` sequences of the embedded text, sized by the profile."""
    p = run.profile
    held_out_tokens = p.compare_held_out_tokens
    text = load_text(model, p.cache_tokens, held_out_tokens=held_out_tokens, context=p.context, seed=run.seed)
    return text.splits()


def activation_cache(run: Context, model: LanguageModel, splits: Mapping[str, Sequences]) -> Path:
    """Folder of cached inputs and outputs of the run's layers."""
    layers = sorted({run.profile.layer, *run.layers})
    texts = {split: source_identity(model, split_sequences) for split, split_sequences in splits.items()}
    return run.stage(
        "activations",
        {"layers": layers, **texts},
        lambda folder: build_cache(model, splits, layers, folder, text="embedded"),
    )


def trained(
    run: Context,
    model: LanguageModel,
    source: ActivationCache,
    modules: Mapping[str, tuple[int, LorsaConfig | SAEConfig]],
    train: TrainConfig,
) -> dict[str, Path]:
    """Run folders `<folder>/runs/<name>-<hash>` of modules (name to layer and shape).

    Missing ones are trained now, together, on the same tokens.
    """
    specs = []
    for name, (layer, module) in modules.items():
        settings = {"layer": layer, "module": module.to_dict(), "train": train.to_dict(), "source": source.identity()}
        key = store.sha256_json({"kit": __version__, "code": training_sources(), **settings})
        specs.append(RunSpec(name, layer, module, train, run.folder / "runs" / f"{name}-{key[:8]}"))
    missing = [spec for spec in specs if not (spec.folder / "model.safetensors").is_file()]
    if missing:
        sites = {spec.layer: model.site(spec.layer) for spec in missing}
        train_runs(missing, source, sites, device=model.device, resume=True)
    return {spec.name: spec.folder for spec in specs}


def train_config(run: Context, tokens: int, log_lines: int = 50) -> TrainConfig:
    """Settings of notebooks for `tokens` tokens, with about `log_lines` lines of metrics."""
    p = run.profile
    steps = tokens / (p.batch_size * (p.context - 1))
    return TrainConfig(
        tokens=tokens,
        batch_size=p.batch_size,
        seed=run.seed,
        log_every=max(1, int(steps) // log_lines),
        dead_window=min(8_000, tokens // 5),
    )


def short_config(run: Context) -> TrainConfig:
    """Settings of the short runs of notebook 02."""
    train = train_config(run, run.profile.train_tokens)
    return train.replace(tokens=max(10_000, train.tokens // 5), log_every=max(1, train.log_every // 2))


def compare_tokens(profile: Profile) -> int:
    """Training tokens per module of notebook 03; with three per layer, scaled-down profiles give each less."""
    return max(20_000, profile.train_tokens * 2 // 5) if profile.is_scaled_down else profile.train_tokens


def shape(run: Context, model: LanguageModel, layer: int, kind: str) -> LorsaConfig | SAEConfig:
    """The profile's shape of one of `LAYER_MODULES`."""
    p = run.profile
    if kind == "lorsa":
        return Lorsa.config_for_site(model.site(layer), p.n_heads, p.n_qk, p.k)
    features = {"sae_equal_features": p.sae_features, "sae_equal_parameters": p.sae_features_equal_parameters}
    return SAEConfig(model.d_model, features[kind], p.k)


def main_lorsa(run: Context, model: LanguageModel, source: ActivationCache) -> Path:
    """Run folder of notebook 02's Lorsa: the profile's layer, trained longest."""
    return _lorsa(run, model, source, "lorsa", train_config(run, run.profile.train_tokens))


def short_starts(run: Context, model: LanguageModel, source: ActivationCache) -> dict[str, Path]:
    """Run folders of notebook 02's short runs by start, `mhsa` and `random`."""
    starts = {init: short_config(run).replace(init=init) for init in ("mhsa", "random")}
    return {init: _lorsa(run, model, source, f"start_{init}", train) for init, train in starts.items()}


def _lorsa(run: Context, model: LanguageModel, source: ActivationCache, name: str, train: TrainConfig) -> Path:
    layer = run.profile.layer
    return trained(run, model, source, {name: (layer, shape(run, model, layer, "lorsa"))}, train)[name]


def layer_modules(
    run: Context,
    model: LanguageModel,
    source: ActivationCache,
    kinds: Sequence[str] = LAYER_MODULES,
    second_at: int | None = None,
) -> dict[int, dict[str, Path]]:
    """Run folders of notebook 03's modules, trained on the same tokens: layer to kind to folder.

    With `second_at` those of this layer alone, from the next seed's start on the same tokens.
    """
    train = train_config(run, compare_tokens(run.profile), 25)
    layers, ending = run.profile.layers, ""
    if second_at is not None:
        layers, ending, train = (second_at,), "_second", train.replace(seed=run.seed + 1)
    names = {(layer, kind): f"layer{layer:02d}_{kind}{ending}" for layer in layers for kind in kinds}
    modules = {name: (layer, shape(run, model, layer, kind)) for (layer, kind), name in names.items()}
    folders = trained(run, model, source, modules, train)
    return {layer: {kind: folders[names[layer, kind]] for kind in kinds} for layer in layers}


def best_modules(run: Context, model: LanguageModel) -> dict[str, Path]:
    """Run folders of the best `lorsa` and `sae` of the profile's layer.

    The kit's checkpoints if both are there for this model and layer, so that a notebook opens at once; otherwise the
    Lorsa of notebook 02 and the SAE of notebook 03.
    """
    if shipped := _shipped_pair(run, model):
        return shipped
    source = ActivationCache(activation_cache(run, model, sequences(run, model)), "train", model=model)
    pair = layer_modules(run, model, source, ("sae_equal_features",))[run.profile.layer]
    return {"lorsa": main_lorsa(run, model, source), "sae": pair["sae_equal_features"]}


def _shipped_pair(run: Context, model: LanguageModel) -> dict[str, Path] | None:
    """None unless both checkpoints are there."""
    lorsa, sae = (hub.find(model, run.profile.layer, kind) for kind in ("lorsa", "sae"))
    return {"lorsa": lorsa, "sae": sae} if lorsa and sae else None


def modules_at_hand(
    run: Context, model: LanguageModel, splits: Mapping[str, Sequences], train: bool
) -> dict[int, dict[str, Path]]:
    """Run folders of `lorsa` and `sae`, of equally many units, by layer, for a notebook that has to open at once.

    Those of notebook 03 if it has run in this folder. If not, the kit's checkpoints stand in for one layer, which is
    printed; `run.layers`, the figures' facts and the expected values (section `<profile>_checkpoint`) follow. With
    `train`, or where no checkpoint fits, what is missing is trained.
    """
    kinds, layers = {"lorsa": "lorsa", "sae": "sae_equal_features"}, run.profile.layers
    finished = (f"layer{layer:02d}_{kind}-*/model.safetensors" for layer in layers for kind in kinds.values())
    has_run = all(any((run.folder / "runs").glob(pattern)) for pattern in finished)
    shipped = None if train or has_run else _shipped_pair(run, model)
    if shipped:
        run.layers, run.checkpoint_alone = (run.profile.layer,), True
        print(
            f"Notebook 03 has not run in {run.folder.name}, so this run looks at layer {run.profile.layer} alone, at "
            "the checkpoint that travels with the kit. For all layers run notebook 03 first, or set TRAIN = True."
        )
        folders = {run.profile.layer: shipped}
    else:
        source = ActivationCache(activation_cache(run, model, splits), "train", model=model)
        of_03 = layer_modules(run, model, source, tuple(kinds.values()))
        folders = {layer: {name: places[kind] for name, kind in kinds.items()} for layer, places in of_03.items()}
    tokens = store.read_json(next(iter(folders.values()))["lorsa"] / "config.json")["train"]["tokens"]
    run.about |= {"layer": list(run.layers), "tokens": tokens}
    return folders
