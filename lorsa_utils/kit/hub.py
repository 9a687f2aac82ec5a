"""Small checkpoints, published formats in and out, model cards, the Hugging Face Hub.

A small checkpoint (`data/checkpoints/<name>/`) is a run folder at 40 % of the size. Read and write directions are int8
with one scale per row, queries and keys float16 (small errors there move whole patterns), biases float32.
`checkpoint.json` holds hashes and the command, `README.md` the model card.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from lorsa_utils import __version__, metrics, store
from lorsa_utils.activations import ActivationStream
from lorsa_utils.config import PRESETS, SCHEMA_VERSION, TrainConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import formats
from lorsa_utils.lorsa import Lorsa, load, read_module_settings
from lorsa_utils.models import LanguageModel
from lorsa_utils.training import read_log

INT8 = ("W_V", "W_O", "W_E")
FLOAT16 = ("W_Q", "W_K")
LARGEST_ERROR = 0.02
"""Share of a weight's norm that packing may lose."""
LOG_ROWS = 60
LICENCES = {"smollm2": "apache-2.0", **{preset.model: preset.licence for preset in PRESETS.values()}}
"""Of the language model that a module's weights derive from."""
TEMPLATES = Path(__file__).parent / "templates"
DOWNLOADED = (
    "config.json",
    "*.safetensors",
    "final.pth",
    "checkpoint.json",
    "README.md",
    "metrics.jsonl",
    "results*.json",
)


# ---- the Hub


def download(source: str | Path) -> Path:
    """The folder of weights, from the Hugging Face Hub if `source` is `<repo>:<folder>`; UserError if there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    place = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", str(source))
    if not place or ".." in str(source):
        raise UserError(
            f"There is no checkpoint at {source}; give a folder, or <repo>:<folder> on the Hugging Face Hub."
        )
    repo, inside = place[1], f"{place[2].strip('/')}/" if place[2] else ""
    with _hub_errors(f"{source} cannot be downloaded"):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repo, allow_patterns=[inside + name for name in DOWNLOADED])) / inside
    if not (folder / "config.json").is_file():
        raise UserError(f"{repo} has no {inside}config.json; give <repo>:<folder> with a folder that has one.")
    return folder


def push_to_hub(folder: str | Path, repo_id: str, path_in_repo: str | None = None, private: bool = False) -> str:
    """Upload a run folder or a packed or exported checkpoint, without `state/`, with a model card; returns the address.

    The token is that of `hf auth login` or $HF_TOKEN. A missing repository is created.

    Raises:
        UserError: the name is invalid, nobody is logged in, or there is no network.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give a run folder or an exported one.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"{repo_id!r} is no repository on the Hub; give <user>/<name>.")
    if not (path / "README.md").is_file():
        store.write_text(path / "README.md", model_card(path))
    with _hub_errors(f"{path} was not uploaded to {repo_id}"):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True, private=private)
        left_out = ["state/*", ".*.tmp", "stage.json"]
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=path, path_in_repo=path_in_repo, ignore_patterns=left_out)
        )


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Raise UserError for any error, because those of huggingface_hub have many unrelated types."""
    try:
        yield
    except Exception as error:
        name, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
        if name == "GatedRepoError" or status == 403:
            reason = "access is restricted; accept the licence on its page and run `hf auth login`"
        elif status == 401 or "TokenNotFound" in name:
            reason = "it does not exist or you are not logged in; check the name and run `hf auth login`"
        elif name in ("RepositoryNotFoundError", "EntryNotFoundError") or status == 404:
            reason = "it does not exist; check the name"
        else:
            first = (str(error).strip().splitlines() or [name])[0].rstrip(".")
            reason = f"{first}; check the network, or use a local folder"
        raise UserError(f"{what}: {reason}.") from error


# ---- published weights in and out


def import_checkpoint(
    source: str | Path,
    folder: str | Path,
    layer: int | None = None,
    stream: Callable[[int, int], ActivationStream] | None = None,
) -> dict[str, Any]:
    """Make a run folder from published weights: a small checkpoint, or one of the formats of `formats`.

    On the activations of `stream`, called with a context length and a layer, every reading of the weights is measured
    and the one of lowest FVU taken; without, the config's reading, unmeasured. By default the config names the layer.

    Returns `path`, `format`, `warning`; of published formats also `layer`, `keys` (their name to ours), `ignored`
    settings, `reading`, `fvu` by reading.

    Raises:
        UserError: it cannot be read; the model has another width; the layer is not known; the folder holds something
            else.
    """
    place, path = download(source), Path(folder)
    if (place / "checkpoint.json").is_file():
        return {"path": str(unpack(place, path)), "format": "small", "warning": None}
    _require_empty(path)
    published = formats.read(place)
    layer = published.layer if layer is None else layer
    measured: dict[str, dict[str, float]] = {}
    config: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    config |= {"module": {**published.lorsa.config.to_dict(), "kind": "lorsa"}, "layer": layer}
    if stream is None:
        lorsa, chosen = published.as_read(published.reading), published.reading
    elif layer is None:
        raise UserError("The checkpoint does not say which layer it is for; give --layer.")
    else:
        activations = stream(published.context, layer)
        config |= {"source": activations.identity()}
        lorsa, chosen, measured = _best(published, activations)
    name = Path(source).name if Path(source).is_dir() else str(source)
    origin = {"from": name, "format": published.format, "sha256": published.sha256, "reading": chosen}
    store.write_tensors(path / "model.safetensors", lorsa.state_dict())
    store.write_json(path / "config.json", config | {"imported": origin})
    if measured:
        store.write_json(path / "results.json", measured[chosen])
    return {
        "path": str(path),
        "format": published.format,
        "layer": layer,
        "keys": published.keys,
        "ignored": published.ignored,
        "reading": chosen,
        "fvu": {name: result["fvu"] for name, result in measured.items()},
        "warning": _warning(published, chosen, measured),
    }


def _require_empty(folder: Path, unless: str = "") -> None:
    """Refuse a folder that holds something, but for one with a file of that name."""
    if folder.is_dir() and any(folder.iterdir()) and not (unless and (folder / unless).is_file()):
        raise UserError(f"{folder} is not empty; choose a new folder.")


def norm_gain(model: LanguageModel, layer: int) -> formats.Gain:
    """Weight and bias [d_model] of the norm whose output a layer's attention reads."""
    norm: Any = model.block(layer).get_submodule(model.architecture.norms[0])
    bias = getattr(norm, "bias", None)
    return norm.weight, torch.zeros_like(norm.weight) if bias is None else bias


def _best(published: formats.Published, stream: ActivationStream) -> tuple[Lorsa, str, dict[str, dict[str, float]]]:
    """The reading of lowest FVU, and all results."""
    model, (layer,), width = stream.model, stream.layers, published.lorsa.config.d_model
    if model.d_model != width:
        raise UserError(f"{model.name} has width {model.d_model}, the checkpoint {width}; give its own model.")
    gain = norm_gain(model, layer)
    lorsas = {reading: published.as_read(reading, gain).to(model.device) for reading in published.readings(gain)}
    measured = metrics.evaluate_activations({reading: (layer, lorsa) for reading, lorsa in lorsas.items()}, stream)
    best = min(lorsas, key=lambda reading: measured[reading]["fvu"])
    return lorsas[best], best, measured


def _warning(published: formats.Published, chosen: str, measured: Mapping[str, Mapping[str, float]]) -> str | None:
    fvu = {reading: f"{result['fvu']:.3g}" for reading, result in measured.items()}
    sentences = []
    if chosen != published.reading:
        compared = ", ".join(f"{name}: FVU {fvu[name]}" for name in (chosen, published.reading) if name in fvu)
        sentences.append(
            f"The config asks for {published.reading}, but the weights work on {chosen} ({compared}), "
            "so they were read that way."
        )
    if not measured:
        sentences.append("Nothing was measured: give --model, so that FVU shows whether the weights were read rightly.")
    elif measured[chosen]["fvu"] > 1:
        sentences.append(f"FVU is {fvu[chosen]}, worse than predicting the mean; model or layer is probably another.")
    if published.ignored:
        sentences.append(f"Settings of unknown meaning were ignored: {', '.join(published.ignored)}.")
    return " ".join(sentences) or None


def export_checkpoint(run_folder: str | Path, target: str | Path) -> dict[str, Any]:
    """Write a Lorsa run as a Language-Model-SAEs folder, with a model card.

    Its input is the norm's output with gain and bias. Returns `path`, `format` and `keys` (our name to theirs).

    Raises:
        UserError: the run is no Lorsa, or uses an option that the format does not have; `target` is not empty.
    """
    source, path = Path(run_folder), Path(target)
    kind = read_module_settings(source)["kind"]
    if kind != "lorsa":
        raise UserError(f"{source} holds a {kind}; only a Lorsa is exported.")
    _require_empty(path)
    keys = formats.write_llamascopium(Lorsa.load(source), store.read_json(source / "config.json"), path)
    store.write_text(path / "README.md", model_card(source, exported=True))
    return {"path": str(path), "format": "llamascopium", "keys": keys}


# ---- small checkpoints


def pack(run_folder: str | Path, target: str | Path) -> Path:
    """Write a small copy of a finished run.

    Raises:
        UserError: the run is not finished, its weights lose more than `LARGEST_ERROR`, or `target` is neither empty
            nor a small checkpoint.
    """
    source, folder = Path(run_folder), Path(target)
    module = load(source)
    _require_empty(folder, unless="checkpoint.json")
    small: dict[str, Tensor] = {}
    for name, weight in module.state_dict().items():
        packed = store.compact(name, weight) if name in INT8 else {name: weight.half() if name in FLOAT16 else weight}
        back = store.expand(dict(packed), source)[name].float()
        lost = float((back - weight).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not lost <= LARGEST_ERROR:
            raise UserError(
                f"{source}: {name} would lose {lost:.1%} of its norm in the small form; share the run folder as it is."
            )
        small |= packed
    config = _without_places(store.read_json(source / "config.json"))
    (folder / "checkpoint.json").unlink(missing_ok=True)  # written last: it marks a whole checkpoint
    store.write_tensors(folder / "model.safetensors", small)
    store.write_json(folder / "config.json", config)
    _copy_results(source, folder)
    hashes = [store.sha256_file(place / "model.safetensors") for place in (source, folder)]
    facts = {"kit": __version__, "source_sha256": hashes[0], "sha256": hashes[1], "command": train_command(config)}
    store.write_text(folder / "README.md", model_card(folder, facts))
    store.write_json(folder / "checkpoint.json", facts)
    return folder


def unpack(folder: Path, target: Path) -> Path:
    """Write an ordinary float32 run folder; UserError if the checkpoint is damaged or `target` holds another run."""
    check(folder)
    config = store.read_json(folder / "config.json")
    if (target / "config.json").is_file() and store.read_json(target / "config.json") != config:
        raise UserError(f"{target} holds another run; choose an empty folder.")
    store.write_json(target / "config.json", config)
    _copy_results(folder, target)
    store.write_tensors(target / "model.safetensors", load(folder).state_dict())
    return target


def check(folder: Path) -> None:
    """Verify the weights of a small checkpoint; UserError if there are none, or not those packed."""
    if not (folder / "checkpoint.json").is_file():
        raise UserError(
            f"{folder} holds no checkpoint (checkpoint.json is missing); give a folder below data/checkpoints."
        )
    sha256, weights = store.read_json(folder / "checkpoint.json").get("sha256"), folder / "model.safetensors"
    if not weights.is_file() or store.sha256_file(weights) != sha256:
        raise UserError(
            f"{weights} is not the file that was packed (another SHA-256); restore it, with git for instance."
        )


def find(model: LanguageModel, layer: int, kind: str) -> Path | None:
    """The longest-trained checkpoint in data/checkpoints for a layer of a language model.

    It was trained on the same weights, or on those of the same name and tokenizer, perhaps in another dtype. UserError
    if it is damaged.
    """
    candidates = []
    for marker in sorted((store.data_dir() / "checkpoints").glob("*/checkpoint.json")):
        config = store.read_json(marker.parent / "config.json")
        source = config.get("source", {})
        same_name = (source.get("model"), source.get("tokenizer_sha256")) == (model.name, model.tokenizer_fingerprint)
        same_model = same_name or source.get("model_sha256") == model.fingerprint
        if same_model and (config["layer"], config["module"]["kind"]) == (layer, kind):
            candidates.append((config.get("train", {}).get("tokens", 0), marker.parent))
    _, best = max(candidates, default=(0, None))
    if best:
        check(best)
    return best


def _copy_results(source: Path, target: Path) -> None:
    if (source / "metrics.jsonl").is_file():
        rows = read_log(source)
        thinned = [*rows[: -1 : -(-len(rows) // LOG_ROWS) or 1], *rows[-1:]]
        store.write_text(target / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in thinned))
    for file in sorted(source.glob("results*.json")):
        store.write_json(target / file.name, store.read_json(file))


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A config that names model and text files without their folders."""
    source = dict(config.get("source", {}))
    for key in source.keys() & {"model", "text"}:
        place = source[key]
        if isinstance(place, list):
            source[key] = [Path(file).name for file in place]
        elif place and Path(place).is_absolute():
            source[key] = Path(place).name
    return config | ({"source": source} if source else {})


# ---- model card


def train_command(config: Mapping[str, Any]) -> str:
    """The `lorsa train` or `lorsa import` command behind a config.json; options with their defaults are left out."""
    if "train" not in config:  # its weights came from elsewhere
        return shlex.join(["lorsa", "import", config.get("imported", {}).get("from", "SRC"), "DIR"])
    module, train, source = config["module"], config["train"], config["source"]
    words = ["lorsa", "train", "--model", source["model"], "--layer", config["layer"], "--kind", module["kind"]]
    words += ["--n-heads", module.get("n_features") or module["n_ov_heads"]]
    words += ["--n-qk", module["n_qk_heads"]] if module["kind"] == "lorsa" else []
    words += ["--k", module["k"], "--tokens", train["tokens"], "--context", source["context"]]
    if isinstance(source["text"], list):
        words += ["--text", *source["text"]]
    elif source["text"] not in (None, "embedded"):
        words += ["--dataset", source["text"]]
    for item in fields(TrainConfig):
        value = train.get(item.name, item.default)
        if item.name != "tokens" and value != item.default:
            words += [f"--{item.name.replace('_', '-')}", *([] if item.name == "freeze_qk" else [value])]
    return shlex.join([*map(str, words), "--out", "DIR"])


def model_card(path: Path, facts: Mapping[str, Any] | None = None, exported: bool = False) -> str:
    """Markdown on a run folder: model, layer, training, results, licence, how to load it.

    `facts` are those of `checkpoint.json`; `exported` modules are loaded with the library they were exported for.
    """
    config = {"layer": None, "source": {}, "train": {}} | store.read_json(path / "config.json")
    files = sorted(path.glob("results*.json"), key=lambda file: len(file.stem))
    results = {file.stem.removeprefix("results").strip("_"): store.read_json(file) for file in files}
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["number"] = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    template = environment.from_string((TEMPLATES / "card.md").read_text(encoding="utf-8"))
    about = {"licences": LICENCES, "results": results, "exported": exported, "facts": facts}
    return template.render(config | about)
