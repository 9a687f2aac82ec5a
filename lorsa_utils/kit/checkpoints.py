"""Small checkpoints: trained modules that travel with the repository, a quarter of their size, and say where they come from.

`data/checkpoints/<name>/` is a run folder like any other (`config.json`, `model.safetensors`, `metrics.jsonl`,
`results.json`), so everything that takes one takes it. Read and write directions are stored as int8 with one scale a
row, queries and keys as float16 (small errors there move whole patterns), biases as float32. `checkpoint.json` holds
the hashes and the command, `README.md` the model card.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorsa_utils import __version__, store
from lorsa_utils.config import PRESETS, LorsaConfig, SAEConfig, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.lorsa import SAE, Lorsa, load
from lorsa_utils.train import read_log

if TYPE_CHECKING:
    from lorsa_utils.models import LanguageModel

INT8 = ("W_V", "W_O", "W_E")
FLOAT16 = ("W_Q", "W_K")
LARGEST_ERROR = 0.02
"""Share of a weight's norm that packing may lose."""
LOG_ROWS = 60
EMBEDDED_TEXT = "embedded text of the kit (English Wikipedia, CC BY-SA, and documentation prose)"
LICENCES = {"smollm2": "apache-2.0", **{preset.model: preset.licence for preset in PRESETS.values()}}
"""Licence of the language model that a module's weights derive from."""


# ---- pack and unpack


def pack(run_folder: str | Path, target: str | Path, *, command: str | None = None) -> Path:
    """Write a small copy of a finished run, without its state, into `target`.

    Args:
        run_folder: of `lorsa train`.
        target: new folder, or one that an earlier `pack` filled.
        command: what made the run; without, the `lorsa train` command that follows from its settings.

    Returns:
        `target`.

    Raises:
        UserError: the run is not finished, its weights lose more than `LARGEST_ERROR`, or `target` holds something
            else.
    """
    source, folder = Path(run_folder), Path(target)
    module = load(source)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "checkpoint.json").is_file():
        raise UserError(f"{folder} holds files that are no checkpoint; choose an empty folder.")
    small = _compacted(module, source)
    config = without_places(store.read_json(source / "config.json"))
    store.require_writable(folder)
    (folder / "checkpoint.json").unlink(missing_ok=True)  # written last, it marks a whole checkpoint
    store.write_tensors(folder / "model.safetensors", small)
    store.write_json(folder / "config.json", config)
    _copy_results(source, folder)
    facts = {
        "kit": __version__,
        "source_sha256": store.sha256_file(source / "model.safetensors"),
        "sha256": store.sha256_file(folder / "model.safetensors"),
        "command": command or train_command(config),
    }
    store.write_text(folder / "README.md", model_card(folder, facts))
    store.write_json(folder / "checkpoint.json", facts)
    return folder


def unpack(folder: str | Path, target: str | Path) -> Path:
    """Write an ordinary run folder, all weights float32, from a small one.

    Raises:
        UserError: the checkpoint is damaged, or `target` holds another run.
    """
    source, path = Path(folder), Path(target)
    check(source)
    module = load(source)
    config = store.read_json(source / "config.json")
    if (path / "config.json").is_file() and store.read_json(path / "config.json") != config:
        raise UserError(f"{path} holds another run; choose an empty folder.")
    store.require_writable(path)
    store.write_json(path / "config.json", config)
    _copy_results(source, path)
    store.write_tensors(path / "model.safetensors", dict(module.state_dict()))
    return path


def check(folder: str | Path) -> dict[str, Any]:
    """What `checkpoint.json` says, once the weights beside it are found to be those that were packed.

    Raises:
        UserError: there is no checkpoint, or its weights are not whole.
    """
    path = Path(folder)
    if not (path / "checkpoint.json").is_file():
        raise UserError(
            f"{path} holds no checkpoint (checkpoint.json is missing); give a folder below data/checkpoints."
        )
    facts: dict[str, Any] = store.read_json(path / "checkpoint.json")
    weights = path / "model.safetensors"
    if not weights.is_file() or store.sha256_file(weights) != facts.get("sha256"):
        raise UserError(
            f"{weights} is not the file that was packed (another SHA-256); restore it, with git for instance."
        )
    return facts


def find(
    model: LanguageModel,
    layer: int,
    kind: str,
    shape: LorsaConfig | SAEConfig | None = None,
    folder: str | Path | None = None,
) -> Path | None:
    """The shipped checkpoint of a layer of a language model, None when there is none.

    Args:
        model: it was trained on; the same weights, or the same name and tokenizer where they were loaded in another
            dtype.
        layer: attention layer.
        kind: `lorsa`, `sae` or `transcoder`.
        shape: when given, only a module of this very shape will do.
        folder: where checkpoints are; data/checkpoints by default.

    Returns:
        the run folder; of several, that with the most training tokens.

    Raises:
        UserError: it is damaged.
    """
    found: list[tuple[int, Path]] = []
    for marker in sorted((Path(folder) if folder else store.data_dir() / "checkpoints").glob("*/checkpoint.json")):
        config = store.read_json(marker.parent / "config.json")
        module, source = dict(config["module"]), config.get("source", {})
        same_model = source.get("model_sha256") == model.fingerprint or (
            source.get("model") == model.name and source.get("tokenizer_sha256") == model.tokenizer_fingerprint
        )
        if not same_model or (config["layer"], module["kind"]) != (layer, kind):
            continue
        if shape is not None and {**json.loads(json.dumps(shape.to_dict())), "kind": kind} != module:
            continue
        found.append((config.get("train", {}).get("tokens", 0), marker.parent))
    if not found:
        return None
    best = max(found)[1]
    check(best)
    return best


def _compacted(module: Lorsa | SAE, source: Path) -> dict[str, Tensor]:
    """The weights in their small form.

    Raises:
        UserError: one of them loses too much.
    """
    small: dict[str, Tensor] = {}
    for name, weight in module.state_dict().items():
        parts = (
            {name: weight.half()}
            if name in FLOAT16
            else store.compact(name, weight)
            if name in INT8
            else {name: weight}
        )
        back = store.expand(dict(parts), source)[name].float()
        lost = float((back - weight).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not lost <= LARGEST_ERROR:
            raise UserError(
                f"{source}: {name} would lose {lost:.1%} of its norm in the small form; share the run folder as it is."
            )
        small |= parts
    return small


def _copy_results(source: Path, target: Path) -> None:
    """`metrics.jsonl`, thinned to a log one can read, and every `results*.json`."""
    if (source / "metrics.jsonl").is_file():
        rows = read_log(source)
        step = -(-len(rows) // LOG_ROWS) or 1
        kept = [*rows[:-1:step], *rows[-1:]]
        store.write_text(target / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    for file in sorted(source.glob("results*.json")):
        store.write_json(target / file.name, store.read_json(file))


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose model and text files are named without the folders of the machine they were on."""
    if "source" not in config:
        return dict(config)
    source = dict(config["source"])
    for key in ("model", "text"):
        value = source.get(key)
        if isinstance(value, str) and Path(value).is_absolute():
            source[key] = Path(value).name
        elif isinstance(value, list):
            source[key] = [Path(part).name for part in value]
    return {**config, "source": source}


# ---- model card


def train_command(config: Mapping[str, Any]) -> str:
    """The `lorsa train` command that a run's config.json follows from; options with their defaults are left out."""
    if "train" not in config:  # its weights came from elsewhere
        return shlex.join(["lorsa", "import", config.get("imported", {}).get("from", "SRC"), "DIR"])
    module, train, source = config["module"], config["train"], config["source"]
    words = ["lorsa", "train", "--model", source["model"], "--layer", config["layer"], "--kind", module["kind"]]
    if module["kind"] == "lorsa":
        words += ["--n-heads", module["n_ov_heads"], "--n-qk", module["n_qk_heads"]]
    else:
        words += ["--n-heads", module["n_features"]]
    words += ["--k", module["k"], "--tokens", train["tokens"], "--context", source["context"]]
    if isinstance(source["text"], list):
        words += ["--text", *source["text"]]
    elif source["text"] not in (None, "embedded"):
        words += ["--dataset", source["text"]]
    for item in fields(TrainConfig):
        value = train.get(item.name, item.default)
        if item.name == "tokens" or value == item.default:
            continue
        option = f"--{item.name.replace('_', '-')}"
        words += [option] if item.name == "freeze_qk" else [option, value]
    return shlex.join([*map(str, words), "--out", "DIR"])


def model_card(
    folder: str | Path, facts: Mapping[str, Any] | None = None, licence: str | None = None, loading: str | None = None
) -> str:
    """Markdown that says what a run folder holds: model, layer, training, results, licence, how to load it.

    Args:
        folder: with `config.json` and, where they are, `metrics.jsonl` and `results*.json` (each becomes a row of the
            table).
        facts: of `checkpoint.json`.
        licence: of the weights, as the Hub spells it; by default that of the language model where it is known.
        loading: how to load it, when not with this kit.
    """
    path = Path(folder)
    config = store.read_json(path / "config.json")
    module, source, train = config["module"], config.get("source", {}), config.get("train", {})
    model, kind = source.get("model") or "an unnamed model", module["kind"]
    licence = licence or LICENCES.get(model, "other")
    title = {"lorsa": "Lorsa", "sae": "Top-K SAE", "transcoder": "Top-K transcoder"}[kind]
    weights = source.get("model_sha256") or "not recorded"
    rows = [("language model", f"{model} (SHA-256 of weights {weights[:12]})"), ("layer", config.get("layer"))]
    rows += [(key, value) for key, value in module.items() if not isinstance(value, dict)]
    rows += (
        [("training tokens", f"{train['tokens']:,}"), ("seed", train["seed"]), ("context", source.get("context"))]
        if train
        else []
    )
    text = source.get("text")
    rows += [
        ("training text", ", ".join(text) if isinstance(text, list) else EMBEDDED_TEXT if text == "embedded" else text)
    ]
    parts = [
        f"---\nlicense: {licence}\ntags: [lorsa, sparse-attention, interpretability]\n---\n",
        f"# {title} for layer {config.get('layer')} of {model}\n",
        _purpose(kind),
        _table(("setting", "value"), [row for row in rows if row[1] is not None]),
        _results(path),
        loading or _loading(facts),
    ]
    return "\n".join(part for part in parts if part)


def _purpose(kind: str) -> str:
    what = {
        "lorsa": "It reads the layer's input and predicts its output, by many small attention heads of which k act at each token.",
        "sae": "It reads the layer's output and rebuilds it from k of its features at each token.",
        "transcoder": "It reads the layer's input and predicts its output from k of its features at each token.",
    }
    return f"{what[kind]} Inputs and outputs are raw activations; no scale has to be applied.\n"


def _results(path: Path) -> str:
    """A table with one row for each `results*.json`."""
    shown = ("fvu", "fvu_token_mean", "ce_recovered", "l0", "dead_fraction", "n_tokens")
    rows = []
    for file in sorted(path.glob("results*.json"), key=lambda file: len(file.stem)):
        found = store.read_json(file)
        text = file.stem.removeprefix("results").strip("_") or "held-out part of the training text"
        rows.append((text, *(found.get(name, "-") for name in shown)))
    return _table(("measured on", *shown), rows) if rows else ""


def _loading(facts: Mapping[str, Any] | None) -> str:
    code = "import lorsa_utils as lu\n\nmodule = lu.load(folder)  # module(x).y, x [batch, length, d_model]"
    text = f"Loading it, and measuring it on a text of your own, with the Lorsa kit:\n\n```python\n{code}\n```\n"
    text += "\n```sh\nlorsa eval FOLDER --text my_text.txt\n```\n"
    if facts:
        text += f"\nMade by\n\n```sh\n{facts['command']}\n```\n\nPacked from weights with SHA-256 `{facts['source_sha256']}`: "
        text += "read and write directions are int8 with a scale a row, queries and keys float16.\n"
    return text


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)
