"""Published Lorsa weights in, and out.

Two formats are read, told apart by their files: Language-Model-SAEs (Llamascopium), `config.json` beside
`sae_weights.safetensors`, and the older OpenMOSS/Lorsa, `config.json` beside `final.pth`. The first one is written as
well. What they call the same thing:

    queries, keys          W_Q, W_K [n_qk, d_model, d_qk], b_Q, b_K as here; scores are divided by `attn_scale`, here
                           multiplied
    QK norm                ln_q.w, ln_k.w [n_qk, d_qk], here q_norm, k_norm: after the bias, before the rotation
    rotation               adjacent pairs or halves, both known here; "NTK by parts" is the `llama3` scaling
    reads and writes       W_V, W_O [n_ov, d_model] (older: [n_ov, d_model, 1] and [n_ov, 1, d_model]), b_V [n_ov]
                           (older: [n_ov, 1])
    output bias            b_D, older b_O, here b_O
    selection              act_fn `topk`: relu(z) ||w_o||; older: |z| ||w_o||, or relu with `use_z_relu`; `relu` and no
                           top-k keep all heads

Weights may want inputs and outputs of mean norm sqrt(d_model) (`norm_activation` "dataset-wise", older always). A saved
folder can say so although the scales are folded in already, and the input can be the norm's output without its gain. So
where a language model is at hand, every such reading is measured on text and the one with the lowest FVU is taken.

A known difference: where fewer than K heads are active, the older code lets inactive heads through; here they stay
silent.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorsa_utils import metrics, store
from lorsa_utils.activations import ActivationStream
from lorsa_utils.config import SCHEMA_VERSION, LorsaConfig, RotaryConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.kit import checkpoints
from lorsa_utils.lorsa import Lorsa, Scaling, read_module_settings
from lorsa_utils.models import LanguageModel
from lorsa_utils.text import Sequences

NAMES = {
    "W_Q": "W_Q",
    "W_K": "W_K",
    "b_Q": "b_Q",
    "b_K": "b_K",
    "W_V": "W_V",
    "b_V": "b_V",
    "W_O": "W_O",
    "b_D": "b_O",
    "b_O": "b_O",
    "ln_q.w": "q_norm",
    "ln_k.w": "k_norm",
}
"""Their names and ours."""
LOADING = (
    "In the format of Language-Model-SAEs (Llamascopium): load the folder with its `LowRankSparseAttention.from_pretrained`. The input\n"
    "is what the attention module reads, the output of the norm before it with its gain and bias; the target is what it returns.\n"
)
BUFFERS = {"mask", "IGNORE", "rotary_sin", "rotary_cos"}
QK_WEIGHTS = ("W_Q", "W_K", "b_Q", "b_K", "q_norm", "k_norm")
NORM_PREFIX = "dataset_average_activation_norm."
KNOWN = {
    *(
        "sae_type",
        "d_model",
        "expansion_factor",
        "use_decoder_bias",
        "act_fn",
        "norm_activation",
        "sparsity_include_decoder_norm",
        "top_k",
    ),
    *(
        "n_qk_heads",
        "d_qk_head",
        "n_ctx",
        "hook_point_in",
        "hook_point_out",
        "positional_embedding_type",
        "rotary_dim",
        "rotary_base",
    ),
    *(
        "rotary_adjacent_pairs",
        "rotary_scale",
        "use_NTK_by_parts_rope",
        "NTK_by_parts_factor",
        "NTK_by_parts_low_freq_factor",
    ),
    *(
        "NTK_by_parts_high_freq_factor",
        "old_context_len",
        "attn_scale",
        "use_post_qk_ln",
        "normalization_type",
        "eps",
        "n_ov_heads",
    ),
    *("d_ov_head", "avg_norm", "mode", "use_z_relu", "virtual_kv_num", "layer", "model_name"),
    # These say how they train and where, nothing about what is computed.
    *(
        "device",
        "dtype",
        "use_triton_kernel",
        "sparsity_threshold_for_triton_spmm_kernel",
        "jumprelu_threshold_window",
        "skip_bos",
    ),
}
"""Settings of the two formats whose meaning is known."""


@dataclass(frozen=True)
class Reading:
    """One way to understand a published checkpoint."""

    scaled: bool
    """Whether inputs and outputs are to be scaled by the norms it states."""
    gain: bool = True
    """Whether its input is the norm's output with its gain (and bias), which is what attention modules read."""

    def __str__(self) -> str:
        return f"{'normalised' if self.scaled else 'raw'} activations{'' if self.gain else ', before the gain of the norm'}"


@dataclass(frozen=True)
class Published:
    """A checkpoint as it was read, its weights as they are in the file."""

    format: str
    """`llamascopium` or `openmoss-lorsa`."""
    lorsa: Lorsa
    reading: Reading
    """What its config says."""
    norms: tuple[float, float] | None
    """Mean norms of inputs and outputs, where stated."""
    layer: int | None
    context: int
    keys: dict[str, str]
    """Their tensors and ours."""
    ignored: list[str]
    """Settings whose meaning is not known."""
    sha256: str


# ---- where it is


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, downloaded when `source` is `<repo>:<folder>` on the Hugging Face Hub.

    Raises:
        UserError: there is no such folder, or it cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", str(source))
    if not found or ".." in str(source):
        raise UserError(
            f"There is no checkpoint at {source}; give a folder, or <repo>:<folder> on the Hugging Face Hub."
        )
    repo, inside = found[1], (found[2] or "").strip("/")
    with _hub_errors(f"{source} cannot be downloaded"):
        from huggingface_hub import snapshot_download

        patterns = [
            f"{inside}/{name}" if inside else name for name in ("config.json", "sae_weights.safetensors", "final.pth")
        ]
        folder = Path(snapshot_download(repo, allow_patterns=patterns)) / inside
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{repo} has no {inside + '/' if inside else ''}config.json; give <repo>:<folder> with a folder that has one."
        )
    return folder


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one sentence; its errors have many unrelated types."""
    try:
        yield
    except UserError:
        raise
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


# ---- reading


def read(folder: str | Path) -> Published:
    """Read a published checkpoint of either format.

    Raises:
        UserError: files are missing or damaged, or it uses an option that Lorsa here does not have, which is named.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give the folder of a published Lorsa.")
    config = store.read_json(path / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} holds no settings; restore a copy.")
    if (path / "sae_weights.safetensors").is_file():
        file, name, settings = path / "sae_weights.safetensors", "llamascopium", _llamascopium_settings
        tensors = store.read_tensors(file)
    elif (path / "final.pth").is_file():
        file, name, settings = path / "final.pth", "openmoss-lorsa", _openmoss_settings
        tensors = _read_pickled(file)
    else:
        raise UserError(
            f"{path} has neither sae_weights.safetensors nor final.pth; give the folder of a published Lorsa."
        )
    norms = _norms(config, tensors)
    weights, keys = _renamed(tensors, file)
    _require(weights, ("W_Q", "W_K", "W_V", "W_O"), file)
    module, reading = settings(config, weights, path)
    return Published(
        format=name,
        lorsa=_filled(module, weights, file),
        reading=reading,
        norms=norms,
        layer=_layer(config),
        context=int(config.get("n_ctx", 256)),
        keys=keys,
        ignored=sorted(set(config) - KNOWN),
        sha256=store.sha256_file(file),
    )


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a torch file; nothing in it is run."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and the unpickler raise many types
        if "GLOBAL" in str(error):  # the unpickler's word for a function that the file wants to call
            raise UserError(
                f"{file} wants to run code when it is read, which is refused; ask for safetensors."
            ) from error
        raise UserError(f"{file} is damaged ({type(error).__name__}); download it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file} is no list of named tensors; give the final.pth of a published Lorsa.")
    return dict(tensors)


def _renamed(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by our names, float32, and the names they had."""
    weights: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name in BUFFERS or name.startswith(NORM_PREFIX):
            continue
        if name.startswith("virtual_"):
            raise UserError(
                f"{file} has virtual keys ({name}), which Lorsa here does not have; export a checkpoint with virtual_kv_num 0."
            )
        if name not in NAMES:
            raise UserError(
                f"{file} holds {name}, which Lorsa here does not have; only {', '.join(sorted(NAMES))} are known."
            )
        keys[name] = NAMES[name]
        weights[NAMES[name]] = tensor.float()
    for name, trailing in (("W_V", 2), ("W_O", 1), ("b_V", 1)):
        if name in weights and weights[name].dim() == (2 if name == "b_V" else 3):
            if weights[name].shape[trailing] != 1:
                raise UserError(
                    f"{file}: OV heads of width {weights[name].shape[trailing]} (d_ov_head) are not supported; Lorsa has width 1."
                )
            weights[name] = weights[name].squeeze(trailing)
    return weights, keys


def _require(weights: Mapping[str, Tensor], names: tuple[str, ...], file: Path) -> None:
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"{file} has no {missing[0]}; give the weights of a published Lorsa.")


def _filled(config: LorsaConfig, weights: Mapping[str, Tensor], file: Path) -> Lorsa:
    """A Lorsa with these weights; biases that are not there are zero, fewer QK circuits than groups are shared by neighbours.

    Raises:
        UserError: a shape does not fit.
    """
    lorsa = Lorsa(config)
    expected = lorsa.state_dict()
    if config.qk_norm:
        _require(weights, ("q_norm", "k_norm"), file)
    for name, value in weights.items():
        if name not in expected:
            raise UserError(f"{file} holds {name}, but its config says that there is none; download both files again.")
        if name in QK_WEIGHTS and value.shape[0] and config.n_qk_heads % value.shape[0] == 0:
            value = value.repeat_interleave(config.n_qk_heads // value.shape[0], dim=0)
        if value.shape != expected[name].shape:
            raise UserError(
                f"{file}: {name} is of shape {list(value.shape)}, its config asks for {list(expected[name].shape)}."
            )
        if not torch.isfinite(value).all():
            raise UserError(f"{file}: {name} holds values that are not finite; download it again.")
        expected[name] = value
    lorsa.load_state_dict(expected)
    return lorsa.requires_grad_(False)


# ---- settings


def _llamascopium_settings(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> tuple[LorsaConfig, Reading]:
    """Shape, options and reading of a Language-Model-SAEs folder."""
    if config.get("sae_type", "lorsa") != "lorsa":
        raise UserError(f"{path} holds a {config['sae_type']}, not a Lorsa; only Lorsa checkpoints are imported.")
    act = str(config.get("act_fn", "relu")).lower()
    if act not in ("topk", "relu"):
        raise UserError(
            f"{path} selects heads by act_fn {act!r}, which Lorsa here does not have; topk and relu are supported."
        )
    norm = config.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "inference"):
        raise UserError(
            f"{path} normalises by norm_activation {norm!r}, which cannot be folded into weights; dataset-wise and inference can."
        )
    lengths = weights["W_O"].norm(dim=1)
    if (
        act == "topk"
        and not config.get("sparsity_include_decoder_norm", True)
        and bool((lengths / lengths[0] - 1).abs().max() > 1e-4)
    ):
        raise UserError(
            f"{path} selects without the length of w_o (sparsity_include_decoder_norm false), which Lorsa here does not have."
        )
    if config.get("use_post_qk_ln") and config.get("normalization_type", "RMS") != "RMS":
        raise UserError(
            f"{path} norms queries and keys by {config['normalization_type']} (normalization_type), only RMS is supported."
        )
    n_ov = weights["W_V"].shape[0]
    # Their number of heads is d_model times a rounded expansion_factor: the weights know better.
    if "expansion_factor" in config and abs(config["expansion_factor"] * weights["W_V"].shape[1] - n_ov) >= 1:
        raise UserError(
            f"{path}: expansion_factor {config['expansion_factor']} does not fit {n_ov} heads; download both files again."
        )
    k = n_ov if act == "relu" else int(config.get("top_k", 50))
    return _shape(config, weights, k, "relu", path), Reading(scaled=norm == "dataset-wise")


def _openmoss_settings(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> tuple[LorsaConfig, Reading]:
    """Shape, options and reading of an OpenMOSS/Lorsa folder."""
    if config.get("virtual_kv_num", 0):
        raise UserError(
            f"{path} has {config['virtual_kv_num']} virtual keys (virtual_kv_num), which Lorsa here does not have."
        )
    is_sparse = config.get("mode", "default") == "top_k"
    if is_sparse and not config.get("top_k"):
        raise UserError(f"{path} has mode top_k but no top_k; restore its config.json.")
    k = int(config["top_k"]) if is_sparse else weights["W_V"].shape[0]
    score = "relu" if is_sparse and config.get("use_z_relu", False) else "abs"
    return _shape(config, weights, k, score, path), Reading(scaled=True)


def _shape(config: Mapping[str, Any], weights: Mapping[str, Tensor], k: int, score: Any, path: Path) -> LorsaConfig:
    """What both formats say in the same way."""
    try:
        d_qk = int(config.get("d_qk_head", weights["W_Q"].shape[2]))
        return LorsaConfig(
            d_model=weights["W_V"].shape[1],
            n_ov_heads=weights["W_V"].shape[0],
            n_qk_heads=int(config.get("n_qk_heads", weights["W_Q"].shape[0])),
            d_qk=d_qk,
            k=k,
            attn_scale=1 / float(config.get("attn_scale") or math.sqrt(d_qk)),
            rotary=_rotary(config, path),
            qk_norm=bool(config.get("use_post_qk_ln", False)),
            qk_norm_eps=float(config.get("eps", 1e-6)),
            score=score,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path / 'config.json'} is incomplete or damaged ({error}); restore a copy.") from error


def _rotary(config: Mapping[str, Any], path: Path) -> RotaryConfig:
    if config.get("positional_embedding_type", "rotary") != "rotary":
        return RotaryConfig()
    if config.get("rotary_scale", 1) != 1:
        raise UserError(
            f"{path} has rotary_scale {config['rotary_scale']}, which Lorsa here does not have; only 1 is supported."
        )
    settings: dict[str, Any] = {"rope_type": "default"}
    factor = float(config.get("NTK_by_parts_factor", 1.0))
    if config.get("use_NTK_by_parts_rope") and factor != 1:
        low, high = (
            float(config.get("NTK_by_parts_low_freq_factor", 1.0)),
            float(config.get("NTK_by_parts_high_freq_factor", 1.0)),
        )
        if low >= high:
            raise UserError(
                f"{path} has NTK_by_parts_low_freq_factor {low} and no larger high one; only blends between the two are supported."
            )
        settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        settings["original_context"] = int(config.get("old_context_len", 2048))
    return RotaryConfig(
        rotary_dim=int(config["rotary_dim"]),
        theta=float(config.get("rotary_base", 10000)),
        adjacent_pairs=bool(config.get("rotary_adjacent_pairs", "sae_type" in config)),
        **settings,
    )


def _norms(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[float, float] | None:
    """Mean norms of inputs and outputs; None where they are not stated."""
    if config.get("avg_norm"):
        values: list[Any] = [config["avg_norm"].get("in"), config["avg_norm"].get("out")]
    else:
        values = [tensors.get(NORM_PREFIX + str(config.get(f"hook_point_{side}"))) for side in ("in", "out")]
    if any(value is None for value in values):
        return None
    norms = float(values[0]), float(values[1])
    return norms if all(math.isfinite(norm) and norm > 0 for norm in norms) else None


def _layer(config: Mapping[str, Any]) -> int | None:
    if isinstance(config.get("layer"), int):
        return int(config["layer"])
    found = re.search(r"(?:blocks|layers|h)\.(\d+)\.", str(config.get("hook_point_in", "")))
    return int(found[1]) if found else None


# ---- as we read


def as_read(published: Published, reading: Reading, gain: tuple[Tensor, Tensor] | None = None) -> Lorsa:
    """The Lorsa for raw attention inputs and outputs that a reading makes of a checkpoint.

    Args:
        published: from `read`.
        reading: one of `readings`.
        gain: weight and bias [d_model] of the norm before the attention; needed when the reading is without them.

    Raises:
        UserError: the reading needs norms or a gain that are not known.
    """
    lorsa = Lorsa(published.lorsa.config)
    lorsa.load_state_dict(published.lorsa.state_dict())
    lorsa.requires_grad_(False)
    zero = torch.zeros(lorsa.config.d_model)
    if reading.scaled:
        if published.norms is None:
            raise UserError(
                "This checkpoint wants normalised activations but does not state their norms; give --model, to measure it on text."
            )
        size = math.sqrt(lorsa.config.d_model)
        lorsa.fold(Scaling(zero, size / published.norms[0], size / published.norms[1]))
    if not reading.gain:
        if gain is None:
            raise UserError("Without the language model its norm's gain is not known; give --model.")
        weight, bias = (part.detach().float().cpu() for part in gain)
        for name in ("W_Q", "W_K"):
            getattr(lorsa, name).div_(weight[:, None])
        lorsa.W_V.div_(weight)
        lorsa.shift_inputs(bias)
    return lorsa


def readings(published: Published, gain: tuple[Tensor, Tensor] | None) -> list[Reading]:
    """All ways to understand a checkpoint that can be tried, its config's own first."""
    size = math.sqrt(published.lorsa.config.d_model)
    scaled = [False] if published.norms is None else [True, False]
    if published.norms is not None and all(math.isclose(norm, size, rel_tol=1e-6) for norm in published.norms):
        scaled = [published.reading.scaled]  # both are the same
    usable = gain is not None and bool((gain[0].abs() > 1e-6).all())
    every = [Reading(scale, inside) for scale in scaled for inside in ([True, False] if usable else [True])]
    return sorted(every, key=lambda reading: reading != published.reading)


def norm_gain(model: LanguageModel, layer: int) -> tuple[Tensor, Tensor]:
    """Weight and bias [d_model] of the norm whose output a layer's attention reads."""
    norm: Any = model.block(layer).get_submodule(model.architecture.norms[0])
    bias = getattr(norm, "bias", None)
    return norm.weight, torch.zeros_like(norm.weight) if bias is None else bias


def import_checkpoint(
    source: str | Path,
    folder: str | Path,
    model: LanguageModel | None = None,
    layer: int | None = None,
    sequences: Callable[[int], Sequences] | None = None,
    text: str | list[str] | None = None,
) -> dict[str, Any]:
    """Make a run folder from a published checkpoint.

    Args:
        source: folder, or `<repo>:<folder>` on the Hub.
        folder: run folder to make.
        model: the language model it is for; without, the config's own reading is taken and nothing is measured.
        layer: attention layer; without, the one its config names.
        sequences: from a context length to token sequences of text to measure on; needed with `model`.
        text: what that text is called.

    Returns:
        `path`, `format`, `layer`, `keys` (their name to ours), `ignored` settings, `reading`, `fvu` of every reading,
        `warning`.

    Raises:
        UserError: as `locate` and `read`; the model has another width; the layer is not known; the folder holds
            something else.
    """
    place, path = locate(source), Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty; choose a new folder.")
    published = read(place)
    layer = published.layer if layer is None else layer
    origin = {
        "from": Path(source).name if Path(source).is_dir() else str(source),
        "format": published.format,
        "sha256": published.sha256,
    }
    config: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    config["module"] = {**published.lorsa.config.to_dict(), "kind": "lorsa"}
    measured: dict[str, dict[str, float]] = {}
    if model is None:
        lorsa, chosen = as_read(published, published.reading), published.reading
    else:
        if layer is None or sequences is None:
            raise UserError("The checkpoint does not say which layer it is for; give --layer.")
        if model.d_model != published.lorsa.config.d_model:
            raise UserError(
                f"{model.name} has width {model.d_model}, the checkpoint {published.lorsa.config.d_model}; give its own model."
            )
        stream = ActivationStream(model, sequences(published.context), [layer], text)
        lorsa, chosen, measured = _best(published, model, layer, stream)
        config |= {"source": stream.identity()}
    config |= {"layer": layer, "imported": origin | {"reading": str(chosen)}}
    store.require_writable(path)
    store.write_tensors(path / "model.safetensors", lorsa.cpu().state_dict())
    store.write_json(path / "config.json", config)
    if measured:
        store.write_json(path / "results.json", measured[str(chosen)])
    return {
        "path": str(path),
        "format": published.format,
        "layer": layer,
        "keys": published.keys,
        "ignored": published.ignored,
        "reading": str(chosen),
        "fvu": {name: result["fvu"] for name, result in measured.items()},
        "warning": _warning(published, chosen, measured),
    }


def _best(
    published: Published, model: LanguageModel, layer: int, stream: ActivationStream
) -> tuple[Lorsa, Reading, dict[str, dict[str, float]]]:
    """The reading with the lowest FVU, and what was measured of each."""
    gain = norm_gain(model, layer)
    tried = {reading: as_read(published, reading, gain).to(model.device) for reading in readings(published, gain)}
    measured = metrics.evaluate_activations({str(reading): (layer, lorsa) for reading, lorsa in tried.items()}, stream)
    best = min(tried, key=lambda reading: measured[str(reading)]["fvu"])
    return tried[best], best, measured


def _warning(published: Published, chosen: Reading, measured: Mapping[str, Mapping[str, float]]) -> str | None:
    """What a user has to know about an import."""
    parts = []
    if chosen != published.reading:
        fvu = {
            str(reading): measured[str(reading)]["fvu"]
            for reading in (chosen, published.reading)
            if str(reading) in measured
        }
        told = ", ".join(f"{name}: FVU {value:.3g}" for name, value in fvu.items())
        parts.append(
            f"The config asks for {published.reading}, but the weights work on {chosen} ({told}), so they were read that way."
        )
    if measured and measured[str(chosen)]["fvu"] > 1:
        parts.append(
            f"FVU is {measured[str(chosen)]['fvu']:.3g}, worse than predicting the mean; model or layer is probably another."
        )
    if not measured:
        parts.append("Nothing was measured: give --model, so that FVU shows whether the weights were read rightly.")
    if published.ignored:
        parts.append(f"Settings of unknown meaning were ignored: {', '.join(published.ignored)}.")
    return " ".join(parts) or None


# ---- export


def export_checkpoint(run_folder: str | Path, target: str | Path) -> dict[str, Any]:
    """Write a Lorsa run as a Language-Model-SAEs folder, with a model card.

    Its input is what the attention module reads: the norm's output with its gain and bias.

    Returns:
        `path` and `keys` (our name to theirs).

    Raises:
        UserError: the run is no Lorsa, or uses an option that the format does not have; `target` is not empty.
    """
    source, path = Path(run_folder), Path(target)
    kind = read_module_settings(source)["kind"]
    if kind != "lorsa":
        raise UserError(f"{source} holds a {kind}; only a Lorsa is exported.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty; choose a new folder.")
    lorsa, run = Lorsa.load(source), store.read_json(source / "config.json")
    config = _llamascopium_config(lorsa.config, run)
    names = {ours: theirs for theirs, ours in NAMES.items() if theirs != "b_O"}
    tensors = {names[name]: value for name, value in lorsa.state_dict().items()}
    norm = torch.tensor(math.sqrt(lorsa.config.d_model))  # with this norm the other reading would change nothing
    tensors |= {NORM_PREFIX + config[f"hook_point_{side}"]: norm.clone() for side in ("in", "out")}
    store.require_writable(path)
    store.write_tensors(path / "sae_weights.safetensors", tensors, {"version": "lorsa-utils"})
    store.write_json(path / "config.json", config)
    store.write_text(path / "README.md", checkpoints.model_card(source, loading=LOADING))
    return {"path": str(path), "format": "llamascopium", "keys": {name: names[name] for name in lorsa.state_dict()}}


def _llamascopium_config(config: LorsaConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    rotary = config.rotary
    if config.score == "abs" and config.k < config.n_ov_heads:
        raise UserError(
            "Selection by |z| (score abs) is unknown to Language-Model-SAEs; only score relu can be exported."
        )
    if config.score == "abs":
        raise UserError("A layer that keeps every head with its sign (score abs) is unknown to Language-Model-SAEs.")
    if rotary.rope_type == "linear":
        raise UserError("RoPE scaling 'linear' is unknown to Language-Model-SAEs; default and llama3 can be exported.")
    if rotary.theta != int(rotary.theta):
        raise UserError(f"Language-Model-SAEs wants a whole number as base of RoPE, not {rotary.theta}.")
    factor = config.n_ov_heads / config.d_model
    while int(config.d_model * factor) < config.n_ov_heads:  # they round down
        factor = math.nextafter(factor, math.inf)
    layer = run.get("layer") or 0
    return {
        "sae_type": "lorsa",
        "d_model": config.d_model,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "act_fn": "topk",
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": True,
        "top_k": config.k,
        "hook_point_in": f"blocks.{layer}.ln1.hook_normalized",
        "hook_point_out": f"blocks.{layer}.hook_attn_out",
        "n_qk_heads": config.n_qk_heads,
        "d_qk_head": config.d_qk,
        "positional_embedding_type": "none" if rotary.rope_type == "none" else "rotary",
        "rotary_dim": rotary.rotary_dim,
        "rotary_base": int(rotary.theta),
        "rotary_adjacent_pairs": rotary.adjacent_pairs,
        "rotary_scale": 1,
        "use_NTK_by_parts_rope": rotary.rope_type == "llama3",
        "NTK_by_parts_factor": rotary.factor,
        "NTK_by_parts_low_freq_factor": rotary.low_freq_factor,
        "NTK_by_parts_high_freq_factor": rotary.high_freq_factor,
        "old_context_len": rotary.original_context,
        "n_ctx": run.get("source", {}).get("context", 256),
        "attn_scale": 1 / (config.attn_scale or config.d_qk**-0.5),
        "use_post_qk_ln": config.qk_norm,
        "normalization_type": "RMS" if config.qk_norm else None,
        "eps": config.qk_norm_eps,
    }


def push_to_hub(folder: str | Path, repo_id: str, path_in_repo: str | None = None, private: bool = False) -> str:
    """Upload a folder to the Hugging Face Hub, with a model card in front.

    The token is that of `hf auth login` or $HF_TOKEN.

    Args:
        folder: a run folder, a packed checkpoint or an exported one; `state/` stays here.
        repo_id: `<user>/<name>`; made when it does not exist.
        path_in_repo: folder in the repository; its root by default.
        private: whether a new repository is visible to its owner only.

    Returns:
        the address of what was uploaded.

    Raises:
        UserError: the name is impossible, nobody is logged in, or there is no network.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give a run folder or an exported one.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"{repo_id!r} is no repository on the Hub; give <user>/<name>.")
    if not (path / "README.md").is_file():
        store.write_text(path / "README.md", checkpoints.model_card(path))
    with _hub_errors(f"{path} was not uploaded to {repo_id}"):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True, private=private)
        kept_back = ["state/*", ".*.tmp", "stage.json"]
        return str(
            api.upload_folder(
                repo_id=repo_id, folder_path=str(path), path_in_repo=path_in_repo, ignore_patterns=kept_back
            )
        )
