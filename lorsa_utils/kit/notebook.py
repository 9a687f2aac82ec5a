"""What every notebook calls: provenance at the top, figures and numbers on the way, expected values at the end.

run = notebook.start("02_train_lorsa", PROFILE, RUN_DIR)
folder = run.stage("lorsa", {"layer": 17}, make)     # done once, found again later
run.show(figure, "P4_layer_fvu", "What one sees.")
run.record("fvu", 0.19)
run.finish()                                          # asserts data/expected/02_train_lorsa.json
"""

from __future__ import annotations

import functools
import json
import math
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from lorsa_utils import __version__, store
from lorsa_utils.config import LorsaConfig, Profile, SAEConfig, TrainConfig, get_profile
from lorsa_utils.exceptions import UserError
from lorsa_utils.view import figures

if TYPE_CHECKING:
    from lorsa_utils.activations import ActivationCache
    from lorsa_utils.models import LanguageModel
    from lorsa_utils.text import Sequences

TESTED_VERSIONS = {"torch": ((2, 8), (3,)), "transformers": ((5,), (6,))}
"""Package to the first version that is tested and the first that is not."""

VERSIONS = ("kit", "python", "torch", "transformers", "device")
"""What of `provenance` a figure's record holds beside the commit."""


# ---- provenance


def check_versions(installed: Mapping[str, str] | None = None) -> None:
    """Refuse versions of torch and transformers that the notebooks were not tested with.

    Args:
        installed: package to version; those of this environment by default.

    Raises:
        UserError: names the package and the command that repairs it.
    """
    for package, (first, end) in TESTED_VERSIONS.items():
        version = metadata.version(package) if installed is None else installed[package]
        release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if not first <= release < end:
            low, high = (".".join(map(str, bound)) for bound in (first, end))
            raise UserError(
                f'{package} {version} is outside the tested range; run: pip install -c constraints.txt "{package}>={low},<{high}"'
            )


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that holds this package, with `+` when files differ from it; None when there is none."""
    root = store.CHECKOUT

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = git("rev-parse", "--short=10", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def device_name() -> str:
    """The device that models run on by default, for a person."""
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def provenance() -> dict[str, str]:
    """Versions, commit and device that numbers of this process come from."""
    return {
        "kit": __version__,
        "commit": git_commit() or "none",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "device": device_name(),
    }


# ---- stages


def stage(folder: str | Path, name: str, key: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
    """A costly step that is done once: the folder `<folder>/<name>-<hash of key>`, made when it is not whole.

    stage.json, written last, marks a whole stage and lists its files; when one of them is missing the stage is made
    again. `make` is handed the folder as it is, so that it can go on from what a killed run left there.

    Args:
        folder: where stages live.
        name: of the step.
        key: everything the result depends on, as JSON values (settings, hashes of inputs).
        make: fills the folder.

    Returns:
        the folder.
    """
    full_key = {"kit": __version__, "stage": name, **key}
    target = Path(folder) / f"{name}-{store.sha256_json(full_key)[:8]}"
    marker = target / "stage.json"
    if marker.is_file():
        files = store.read_json(marker)["files"]
        if all((target / file).is_file() for file in files):
            return target
        marker.unlink()
    store.require_writable(target)
    make(target)
    made = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    store.write_json(marker, {"key": full_key, "files": made})
    return target


# ---- expected values


@dataclass(frozen=True)
class Check:
    """One recorded value against what is expected of it."""

    key: str
    """Name of the value."""
    value: Any
    """What was recorded, None when it was not."""
    expected: str
    """The expectation, for a person; empty when there is none."""
    passed: bool | None
    """None when nothing is expected."""

    @property
    def word(self) -> str:
        """PASS, FAIL or a dash."""
        return {True: "PASS", False: "FAIL", None: "-"}[self.passed]


def expected_values(name: str, section: str) -> dict[str, dict[str, Any]]:
    """The section of `data/expected/<name>.json` for a profile, or for one that looks at the checkpoint alone; empty when there is none."""
    file = store.data_dir() / "expected" / f"{name}.json"
    return dict(store.read_json(file).get(section, {})) if file.is_file() else {}


def check_values(values: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Compare recorded values with expectations of the form {min}, {max} or {value, tolerance}, each with an optional note."""
    checks = []
    for key in [*values, *(key for key in expected if key not in values)]:
        rule = expected.get(key)
        value = values.get(key)
        passed = None if rule is None else key in values and _meets(value, rule, key)
        checks.append(Check(key, value, "" if rule is None else _describe(rule), passed))
    return checks


def _meets(value: Any, rule: Mapping[str, Any], key: str) -> bool:
    if not set(rule) & {"min", "max", "value"}:
        raise UserError(f"The expected value of {key!r} has neither min, max nor value; repair it in data/expected.")
    if not isinstance(value, int | float):
        return "value" in rule and value == rule["value"]
    within = (
        abs(value - rule["value"]) <= rule.get("tolerance", 0)
        if isinstance(rule.get("value"), int | float)
        else "value" not in rule
    )
    return within and rule.get("min", -math.inf) <= value <= rule.get("max", math.inf)


def _describe(rule: Mapping[str, Any]) -> str:
    parts = []
    if "value" in rule:
        parts.append(f"{rule['value']}" + (f" ± {rule['tolerance']}" if "tolerance" in rule else ""))
    parts += [f"at least {rule['min']}"] if "min" in rule else []
    parts += [f"at most {rule['max']}"] if "max" in rule else []
    return ", ".join(parts) + (f" ({rule['note']})" if rule.get("note") else "")


# ---- context


class Context:
    """One notebook's run: its profile, its folder, its seed, and what it shows and records. Made by `start`."""

    def __init__(self, name: str, profile: Profile, folder: Path, seed: int) -> None:
        self.name, self.profile, self.folder, self.seed = name, profile, folder, seed
        self.about: dict[str, Any] = {"model": profile.model, "layer": profile.layer, "tokens": profile.train_tokens}
        """What figures say of their run unless told otherwise; a notebook that looks at another module changes it."""
        self.layers = profile.layers
        """Layers that are compared; `modules_at_hand` may find fewer than the profile names."""
        self.checkpoint_alone = False
        """Whether `modules_at_hand` found nothing but the checkpoint that travels with the kit; `finish` expects other values then."""

    def stage(
        self, name: str, key: Mapping[str, Any], make: Callable[[Path], object], code: Sequence[ModuleType] = ()
    ) -> Path:
        """A costly step, done once per run folder and shared by all notebooks that name it with the same key; see `stage`.

        `code`: the modules that the result comes from. When their source changes, the step is done again.
        """
        sources = {"code": [store.sha256_file(str(module.__file__)) for module in code]} if code else {}
        return stage(self.folder / "stages", name, {**key, **sources}, make)

    def title(self, text: str) -> str:
        """`text`, saying that the run is scaled down unless it is the paper's size."""
        return f"{text} ({self.profile.name} profile, scaled down)" if self.profile.is_scaled_down else text

    def show(
        self, figure: go.Figure, label: str, caption: str, data: pd.DataFrame | None = None, **facts: Any
    ) -> figures.SavedFigure:
        """Save a figure under `<folder>/figures/` and display it: interactive in Jupyter, as a static image elsewhere.

        Args:
            figure: its title gets the note of a scaled-down run.
            label: file name, starting with the paper item, as `P4_layer_fvu`.
            caption: what one sees, in a sentence or two.
            data: the numbers for the CSV; taken from the figure when not given.
            **facts: what the figure's record says besides label, caption, notebook, profile, seed, commit and versions;
                `model`, `layer` and `tokens` are the profile's unless given here (None where they do not apply; without
                a model nothing is scaled down).
        """
        figure = go.Figure(figure)
        text = figure.layout.title.text or label
        about = self.about | facts
        # A figure without a language model has the same size in every profile.
        said = "scaled down" in text or about["model"] is None
        figure.update_layout(title_text=_wrap(text if said else self.title(text)))
        saved = figures.save_figure(figure, label, self.folder / "figures", data, caption)
        facts_of = provenance()
        record = {"label": label, "caption": caption, "notebook": self.name, "profile": self.profile.name, **about}
        record |= {"seed": self.seed, "commit": git_commit(), "versions": {key: facts_of[key] for key in VERSIONS}}
        store.write_json(saved.html.with_suffix(".json"), {key: _plain(value, key) for key, value in record.items()})
        _display(figure, saved, f"{label}. {caption}")
        return saved

    def record(self, key: str, value: Any) -> None:
        """Write one number (or text, or truth value) into `<folder>/results.json` under this notebook's name.

        Raises:
            UserError: it is not a finite number, a text, a truth value, None or a list or dict of them.
        """
        results = read_results(self.folder)
        results.setdefault(self.name, {})[key] = _plain(value, key)
        store.write_json(self.folder / "results.json", results)

    def finish(self) -> pd.DataFrame:
        """Check what was recorded against `data/expected/<notebook>.json`.

        Returns:
            a table with columns `key`, `value`, `expected` and `result`.

        Raises:
            AssertionError: names every value that missed its expectation; the table is printed first.
        """
        section = self.profile.name + ("_checkpoint" if self.checkpoint_alone else "")
        expected = expected_values(self.name, section)
        checks = check_values(read_results(self.folder).get(self.name, {}), expected)
        table = pd.DataFrame(
            [
                {"key": check.key, "value": check.value, "expected": check.expected, "result": check.word}
                for check in checks
            ],
            columns=["key", "value", "expected", "result"],
        )
        failed = [check for check in checks if check.passed is False]
        if failed:
            print(table.to_string(index=False))
            missed = "; ".join(f"{check.key} is {check.value}, expected {check.expected}" for check in failed)
            raise AssertionError(f"{self.name} ({section}): {missed}")
        return table


def start(name: str, profile: str, run_dir: str | Path = "", seed: int = 0) -> Context:
    """Begin a notebook: check versions, say where numbers come from, forget this notebook's earlier results.

    Args:
        name: of the notebook, as `02_train_lorsa`.
        profile: `smoke`, `laptop`, `paper` or a preset. Where its model's weights are gated or out of reach, a banner
            says so and the run goes on with the embedded model in the sizes of the laptop profile.
        run_dir: run folder; data/runs/<profile> when empty.
        seed: everything random in the notebook derives from it.

    Raises:
        UserError: torch or transformers is outside the tested range, the profile does not exist or the folder cannot be
            written.
    """
    check_versions()
    settings, banner = _within_reach(get_profile(profile))
    folder = store.require_writable(Path(run_dir) if run_dir else store.data_dir() / "runs" / profile)
    results = read_results(folder)
    results[name] = {}
    store.write_json(folder / "results.json", results)
    _show_banner(folder, name, banner)
    facts = provenance()
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"notebook {name}  profile {settings.name}  seed {seed}")
    return Context(name, settings, folder, seed)


def _within_reach(profile: Profile) -> tuple[Profile, str | None]:
    """The profile, or that of a laptop with a sentence that says why, when the weights of its model are gated or out of reach."""
    if profile.is_scaled_down:
        return profile, None
    from lorsa_utils.models import require_available

    try:
        require_available(profile.model)
    except UserError as error:
        instead = get_profile("laptop")
        return instead, f"{error} This run goes on with {instead.model} in the sizes of the laptop profile."
    return profile, None


BANNERS_FILE = "banners.json"


def banners(folder: str | Path) -> list[str]:
    """What every page about a run has to say first: that it is not of the model that was asked for."""
    file = Path(folder) / BANNERS_FILE
    return sorted(set(store.read_json(file).values())) if file.is_file() else []


def profile_of_run(folder: str | Path, profile: str) -> str:
    """The profile that a run folder's numbers are really of: `laptop` where a banner says that its model was out of reach."""
    return "laptop" if banners(folder) else profile


def _show_banner(folder: Path, name: str, banner: str | None) -> None:
    """Keep a notebook's banner for the run's page, or forget an earlier one, and show it."""
    file = folder / BANNERS_FILE
    kept = dict(store.read_json(file)) if file.is_file() else {}
    if kept.pop(name, None) is not None or banner:
        store.write_json(file, kept | ({name: banner} if banner else {}))
    if not banner:
        return
    import html

    style = "border: 2px solid #b45309; background: #fef3c7; color: #451a03; padding: 0.6em 1em; font-weight: bold"
    if not _display_bundle(
        {"text/plain": banner, "text/html": f'<div role="alert" style="{style}">{html.escape(banner)}</div>'}
    ):
        print(banner)


# ---- artefacts that notebooks share


def sequences(run: Context, model: LanguageModel) -> dict[str, Sequences]:
    """Token sequences of the embedded text, the same in every notebook of a run: `train` and `held_out`, sized by the profile."""
    from lorsa_utils.text import embedded_corpus, tokenize

    profile, text = run.profile, embedded_corpus()
    budgets = {
        "train": (text.train, profile.cache_tokens),
        "held_out": (text.held_out, profile.compare_held_out_tokens),
    }
    return {
        split: tokenize(documents, model.tokenizer, context=profile.context, n_tokens=n_tokens, seed=run.seed)
        for split, (documents, n_tokens) in budgets.items()
    }


def activation_cache(run: Context, model: LanguageModel, splits: Mapping[str, Sequences]) -> Path:
    """The cache folder with inputs and outputs of the run's layers; made by the first notebook that asks for it."""
    from lorsa_utils.activations import build_cache, source_identity

    layers = sorted({run.profile.layer, *run.layers})
    texts = {split: source_identity(model, part) for split, part in splits.items()}
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
    """Run folders of trained modules. Those not trained yet are trained now, together, on the same tokens.

    Args:
        run: the notebook's context; runs lie in `<folder>/runs/<name>-<hash of settings, text and code>`.
        model: the language model, for the starts.
        source: training activations.
        modules: name to layer and shape.
        train: how all of them are trained.
    """
    from lorsa_utils.train import RunSpec, train_runs, training_sources

    # Runs of an older version of this code must not pass for runs of this one.
    code = training_sources()
    specs = {}
    for name, (layer, module) in modules.items():
        settings = {"layer": layer, "module": module.to_dict(), "train": train.to_dict(), "source": source.identity()}
        key = {"kit": __version__, "code": code, **settings}
        specs[name] = RunSpec(name, layer, module, train, run.folder / "runs" / f"{name}-{store.sha256_json(key)[:8]}")
    # A killed run can leave modules saved at different steps; each group goes on from its own.
    groups: dict[str | None, list[RunSpec]] = {}
    for spec in specs.values():
        if not (spec.folder / "model.safetensors").is_file():
            groups.setdefault(_saved_position(spec.folder), []).append(spec)
    for group in groups.values():
        sites = {spec.layer: model.site(spec.layer) for spec in group}
        train_runs(group, source, sites, device=model.device, resume=True)
    return {name: spec.folder for name, spec in specs.items()}


def train_config(run: Context, tokens: int, log_lines: int = 50) -> TrainConfig:
    """How notebooks train modules on `tokens` tokens, with about so many lines of metrics."""
    p = run.profile
    steps = tokens / (p.batch_size * (p.context - 1))
    return TrainConfig(
        tokens=tokens,
        batch_size=p.batch_size,
        seed=run.seed,
        log_every=max(1, int(steps) // log_lines),
        dead_window=min(8_000, tokens // 5),
    )


def compare_tokens(profile: Profile) -> int:
    """Training tokens of each module of notebook 03: there are three in each layer, so scaled-down profiles give each less."""
    return max(20_000, profile.train_tokens * 2 // 5) if profile.is_scaled_down else profile.train_tokens


def _lorsa_shape(run: Context, model: LanguageModel, layer: int) -> LorsaConfig:
    """The profile's Lorsa for a layer."""
    from lorsa_utils.lorsa import Lorsa

    return Lorsa.config_for_site(model.site(layer), run.profile.n_heads, run.profile.n_qk, run.profile.k)


def main_lorsa(run: Context, model: LanguageModel, source: ActivationCache) -> Path:
    """Run folder of the Lorsa of notebook 02: the profile's layer, trained longest. Trained now when it is missing."""
    layer = run.profile.layer
    wanted = {"lorsa": (layer, _lorsa_shape(run, model, layer))}
    return trained(run, model, source, wanted, train_config(run, run.profile.train_tokens))["lorsa"]


def short_config(run: Context) -> TrainConfig:
    """How the short runs of notebook 02 are trained."""
    train = train_config(run, run.profile.train_tokens)
    return train.replace(tokens=max(10_000, train.tokens // 5), log_every=max(1, train.log_every // 2))


def short_starts(run: Context, model: LanguageModel, source: ActivationCache) -> dict[str, Path]:
    """Run folders of the short runs of notebook 02 from both starts, `mhsa` and `random`.

    Trained now when they are missing.
    """
    layer = run.profile.layer
    folders: dict[str, Path] = {}
    for init in ("mhsa", "random"):
        name = f"start_{init}"
        module = {name: (layer, _lorsa_shape(run, model, layer))}
        folders |= {init: trained(run, model, source, module, short_config(run).replace(init=init))[name]}
    return folders


LAYER_MODULES = ("lorsa", "sae_equal_features", "sae_equal_parameters")


def layer_modules(
    run: Context, model: LanguageModel, source: ActivationCache, kinds: Sequence[str] = LAYER_MODULES
) -> dict[int, dict[str, Path]]:
    """Run folders of the modules of notebook 03, all trained on the same tokens.

    Those that are missing are trained now.

    Args:
        run: the notebook's context.
        model: the language model.
        source: training activations.
        kinds: some of `LAYER_MODULES`.

    Returns:
        layer to kind to run folder.
    """
    layers = run.profile.layers
    wanted = {
        f"layer{layer:02d}_{kind}": (layer, _layer_shape(run, model, layer, kind)) for layer in layers for kind in kinds
    }
    folders = trained(run, model, source, wanted, train_config(run, compare_tokens(run.profile), 25))
    return {layer: {kind: folders[f"layer{layer:02d}_{kind}"] for kind in kinds} for layer in layers}


def best_modules(run: Context, model: LanguageModel) -> dict[str, Path]:
    """Run folders of the best Lorsa and SAE of the profile's layer, by `lorsa` and `sae`.

    The checkpoints that travel with the kit (`data/checkpoints`) where there are both for this model and layer, so that
    a notebook opens at once; otherwise the Lorsa of notebook 02 and the SAE of notebook 03, trained now when they are
    missing.
    """
    from lorsa_utils.activations import ActivationCache

    if shipped := _shipped_pair(run, model):
        return shipped
    source = ActivationCache(activation_cache(run, model, sequences(run, model)), "train", model=model)
    pair = layer_modules(run, model, source, ("sae_equal_features",))[run.profile.layer]
    return {"lorsa": main_lorsa(run, model, source), "sae": pair["sae_equal_features"]}


def _shipped_pair(run: Context, model: LanguageModel) -> dict[str, Path] | None:
    """The checkpoints of the profile's layer that travel with the kit, by `lorsa` and `sae`; None unless both are there."""
    from lorsa_utils.kit import checkpoints

    shipped = {kind: checkpoints.find(model, run.profile.layer, kind) for kind in ("lorsa", "sae")}
    found = {kind: place for kind, place in shipped.items() if place is not None}
    return found if len(found) == len(shipped) else None


def modules_at_hand(
    run: Context, model: LanguageModel, splits: Mapping[str, Sequences], train: bool
) -> dict[int, dict[str, Path]]:
    """Lorsa and SAE, of equally many units, of the layers that notebooks compare, for one that has to open at once.

    Those of notebook 03 where it has run in this folder. Where it has not, the checkpoints that travel with the kit
    stand in: one layer alone, which is said, and which `run.layers`, the figures' facts and the expected values
    (section `<profile>_checkpoint`) then follow.

    Args:
        run: the notebook's context.
        model: the language model.
        splits: of `sequences`.
        train: train what is missing instead. What is missing is trained, too, where no checkpoint fits.

    Returns:
        layer to run folder by `lorsa` and `sae`.
    """
    from lorsa_utils.activations import ActivationCache

    kinds, layers = {"lorsa": "lorsa", "sae": "sae_equal_features"}, run.profile.layers
    finished = (f"layer{layer:02d}_{kind}-*/model.safetensors" for layer in layers for kind in kinds.values())
    wait = train or all(any((run.folder / "runs").glob(pattern)) for pattern in finished)
    shipped = None if wait else _shipped_pair(run, model)
    if shipped:
        run.layers, run.checkpoint_alone = (run.profile.layer,), True
        print(
            f"Notebook 03 has not run in {run.folder.name}, so this run looks at layer {run.profile.layer} alone, at the checkpoint that "
            "travels with the kit. For all layers run notebook 03 first, or set TRAIN = True."
        )
        folders = {run.profile.layer: shipped}
    else:
        source = ActivationCache(activation_cache(run, model, splits), "train", model=model)
        trained_now = layer_modules(run, model, source, tuple(kinds.values()))
        folders = {layer: {name: places[kind] for name, kind in kinds.items()} for layer, places in trained_now.items()}
    tokens = store.read_json(next(iter(folders.values()))["lorsa"] / "config.json")["train"]["tokens"]
    run.about |= {"layer": list(run.layers), "tokens": tokens}
    return folders


def second_seed(
    run: Context, model: LanguageModel, source: ActivationCache, layer: int, kinds: Sequence[str] = ("lorsa",)
) -> dict[str, Path]:
    """Run folders of a layer's modules as in `layer_modules`, from the next seed's start on the same tokens; kind to folder."""
    names = {kind: f"layer{layer:02d}_{kind}_second" for kind in kinds}
    wanted = {name: (layer, _layer_shape(run, model, layer, kind)) for kind, name in names.items()}
    folders = trained(
        run, model, source, wanted, train_config(run, compare_tokens(run.profile), 25).replace(seed=run.seed + 1)
    )
    return {kind: folders[name] for kind, name in names.items()}


def _layer_shape(run: Context, model: LanguageModel, layer: int, kind: str) -> LorsaConfig | SAEConfig:
    p = run.profile
    if kind == "lorsa":
        return _lorsa_shape(run, model, layer)
    features = {"sae_equal_features": p.sae_features, "sae_equal_parameters": p.sae_features_equal_parameters}
    return SAEConfig(model.d_model, features[kind], p.k)


def _saved_position(folder: Path) -> str | None:
    """Where a run's saved state stands in the data, None when it has none."""
    state = folder / "state" / "state.safetensors"
    return str(json.loads(store.read_tensor_metadata(state)["counters"])["tokens_seen"]) if state.is_file() else None


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """All recorded values of a run folder: notebook to key to value."""
    file = Path(folder) / "results.json"
    return dict(store.read_json(file)) if file.is_file() else {}


def _plain(value: Any, key: str) -> Any:
    """A JSON value from Python, numpy or torch."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value}, which is no result; look for the step that made it.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{key} is a {type(value).__name__}; record a number, a text or a list of them.")


def _wrap(title: str) -> str:
    """Break a title that is too long for a figure of 600 pixels."""
    import textwrap

    return "<br>".join(textwrap.wrap(title.replace("<br>", " "), 68))


def _display(figure: go.Figure, saved: figures.SavedFigure, text: str) -> None:
    """Show the figure where a notebook is running: interactive, static and as text, the reader's program takes what it can show."""
    bundle: dict[str, Any] = {"text/plain": text, "application/vnd.plotly.v1+json": json.loads(figure.to_json())}
    if saved.png is not None:
        import base64

        bundle["image/png"] = base64.b64encode(saved.png.read_bytes()).decode()
    _display_bundle(bundle)


def _display_bundle(bundle: Mapping[str, Any]) -> bool:
    """Show something in several forms; False where no notebook is running."""
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import display
    except ImportError:
        return False
    if get_ipython() is None:
        return False
    display(dict(bundle), raw=True)
    return True
