"""Load a causal language model; read and replace the output of an attention layer by forward hooks.

At layer L, with the names of TransformerLens 4:

- attention input (`blocks.{L}.ln1.hook_out`): what the attention module reads, after the norm and its gain
  (`ln1.hook_normalized` is before the gain; up to TransformerLens 2 it was after it for layer norms alone);
- attention output (`blocks.{L}.hook_attn_out`): after the output projection and its bias, before the residual sum.

Head h reads a vector x [d_model] as x @ W_Q[h].
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorsa_utils import architectures, ops, reference
from lorsa_utils.config import ROPE_TYPES, RotaryConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.fetch import EMBEDDED_NAME, fetch_embedded_model, quiet_transformers
from lorsa_utils.resume import blocks_from
from lorsa_utils.store import sha256_json

Replacement = Callable[[Tensor, Tensor], Tensor]
"""(attention input, attention output) to the new output, all [batch, length, d_model]."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_LOGIT_VALUES_AT_ONCE = 1 << 26  # 256 MiB of fp32 logits while the loss is computed


# ---- RoPE

LLAMA3_FACTORS = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
LLAMA3_FACTORS["original_context"] = "original_max_position_embeddings"


def rotary_from_config(config: Any) -> RotaryConfig:
    """RoPE settings of a Hugging Face config.

    Raises:
        UserError: the architecture or rope type is not supported, or a scaling factor is missing.
    """
    if not architectures.of(config.model_type).has_rotary:
        return RotaryConfig()
    parameters: dict[str, Any] = config.rope_parameters
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UserError(
            "This model's RoPE differs between layer types, which is not supported; "
            "use a model with one RoPE for all layers."
        )
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES[1:]:
        raise UserError(
            f"Rope type {rope_type!r} of this model is not supported; supported are {', '.join(ROPE_TYPES[1:])}."
        )
    names = {"default": {}, "linear": {"factor": "factor"}, "llama3": LLAMA3_FACTORS}[rope_type]
    settings: dict[str, Any] = {ours: parameters.get(theirs) for ours, theirs in names.items()}
    if missing := [name for name, value in settings.items() if value is None]:
        raise UserError(f"The model's config has rope type {rope_type!r} without {missing[0]}; repair its config.json.")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return RotaryConfig(
        rope_type=rope_type,
        rotary_dim=int(d_head * parameters.get("partial_rotary_factor", 1.0)),
        theta=float(parameters["rope_theta"]),
        **settings,
    )


def _check_rotary(model: Any, rotary: RotaryConfig) -> None:
    """Refuse a model whose rotary frequencies differ from its config's."""
    if rotary.rope_type == "none":
        return
    module = model.base_model.rotary_emb
    expected = torch.tensor(reference.inverse_frequencies(rotary), dtype=torch.float64)
    actual = module.inv_freq.double().cpu()
    same = actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=0)
    if not same or module.attention_scaling != 1.0:
        raise UserError(
            "The rotary frequencies in the loaded model differ from its config, so its attention cannot be rebuilt; "
            "save the model again with the installed version of transformers."
        )


# ---- attention site


@dataclass(eq=False, repr=False)
class AttentionSite:
    """One attention layer by head; weights are fp32 copies, absent biases zeros.

    W_Q [n_heads, d_model, d_head], W_K and W_V [n_kv_heads, d_model, d_head], W_O [n_heads, d_head, d_model]; b_Q, b_K
    and b_V without d_model, b_O [d_model]. Query head h reads key head h // (n_heads / n_kv_heads).
    """

    attn_scale: float
    """Factor on query-key products."""
    rotary: RotaryConfig
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor
    q_norm_weight: Tensor | None = None
    """[d_head], for an RMSNorm before the rotation (Qwen3)."""
    k_norm_weight: Tensor | None = None
    qk_norm_eps: float = 0.0
    layer: int = 0

    def __post_init__(self) -> None:
        self.n_heads, self.d_model, self.d_head = self.W_Q.shape
        self.n_kv_heads = len(self.W_K)
        self.qk_norm = self.q_norm_weight is not None

    def expand_kv(self, tensor: Tensor) -> Tensor:
        """[n_kv_heads, ...] repeated for each query head, [n_heads, ...]."""
        return tensor.repeat_interleave(self.n_heads // self.n_kv_heads, dim=0)

    # From here on x is the attention input, [batch, length, d_model].

    def queries(self, x: Tensor) -> Tensor:
        """Queries after norm and rotation, [batch, n_heads, length, d_head]."""
        return self._turned(self._project(x, self.W_Q, self.b_Q), self.q_norm_weight)

    def keys(self, x: Tensor) -> Tensor:
        """Keys after norm and rotation, one for each query head, [batch, n_heads, length, d_head]."""
        k = self._turned(self._project(x, self.W_K, self.b_K), self.k_norm_weight)
        return self.expand_kv(k.transpose(0, 1)).transpose(0, 1)

    def values(self, x: Tensor) -> Tensor:
        """Values, one for each query head, [batch, n_heads, length, d_head]."""
        return self.expand_kv(self._project(x, self.W_V, self.b_V).transpose(0, 1)).transpose(0, 1)

    def pattern(self, x: Tensor) -> Tensor:
        """Causal, [batch, n_heads, length, length]; rows are queries and sum to 1."""
        return ops.attention_pattern(self.queries(x), self.keys(x), self.attn_scale)

    def head_values(self, x: Tensor) -> Tensor:
        """Each head's output before W_O (z_h), [batch, length, n_heads, d_head]."""
        return ops.causal_attention(self.queries(x), self.keys(x), self.values(x), self.attn_scale).transpose(1, 2)

    def head_outputs(self, x: Tensor) -> Tensor:
        """Each head's output, [batch, length, n_heads, d_model]; with b_O they sum to the layer's."""
        return torch.einsum("blhe,hed->blhd", self.head_values(x), self.W_O)

    @staticmethod
    def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.einsum("bld,hde->bhle", x.to(weight.dtype), weight) + bias[:, None, :]

    def _turned(self, side: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None:
            side = ops.rms_norm(side, gain, self.qk_norm_eps)
        cos, sin = ops.rotary_tables(self.rotary, side.shape[-2], side.device, side.dtype)
        return ops.apply_rotary(side, cos, sin, self.rotary.adjacent_pairs)


# ---- language model


class _DeepestLayerReached(Exception):
    """Raised by a hook to end the forward pass early."""


_LIVE: weakref.WeakSet[LanguageModel] = weakref.WeakSet()
"""Models still in use."""


class LanguageModel:
    """A frozen causal language model with its tokenizer; `model` is the Hugging Face module.

    Methods raise UserError for a layer that does not exist or token ids outside the vocabulary. `context_length` is
    the longest sequence, in tokens.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any | None, revision: str | None = None):
        self.name, self.revision = name, revision
        self.model, self.config, self._tokenizer = model, model.config, tokenizer
        self.architecture = architectures.of(self.config.model_type)
        self.rotary = rotary_from_config(self.config)
        self.d_model = int(self.config.hidden_size)
        self.n_layers = int(self.config.num_hidden_layers)
        self.context_length = int(self.config.max_position_embeddings)
        self._resumed: tuple[int, Tensor] | None = None
        _LIVE.add(self)
        _check_rotary(model, self.rotary)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; UserError if the model has none."""
        if self._tokenizer is None:
            raise UserError(
                f"Model {self.name} has no tokenizer files beside its weights; put its tokenizer.json there."
            )
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of captured activations."""
        return self.model.get_input_embeddings().weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, norms, RoPE and, of every weight, both ends and the sum; the same on any device."""
        names = ("hidden_act", "activation_function", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")
        settings = {name: getattr(self.config, name, None) for name in (*names, "use_parallel_residual")}
        site = self.site(0)
        settings |= {name: getattr(site, name) for name in ("n_heads", "n_kv_heads", "d_head", "attn_scale")}
        settings |= {"model_type": self.config.model_type, "n_layers": self.n_layers, "rotary": self.rotary.to_dict()}
        digest = hashlib.sha256(sha256_json(settings).encode())
        for name, parameter in sorted(self.model.named_parameters()):
            flat = parameter.detach().reshape(-1)
            bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
            total = int(bits.sum(dtype=torch.int64))  # of integers: exact in any order
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {total} ".encode())
            digest.update(torch.cat((bits[:1024], bits[-1024:])).cpu().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over rules, vocabulary and special tokens."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # calls with these options leave them behind
            rules.pop(transient, None)
        return sha256_json([rules, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])

    def attention_module(self, layer: int) -> nn.Module:
        """The module at `module_path`."""
        return self.model.get_submodule(self.module_path(layer))

    def module_path(self, layer: int) -> str:
        """Dotted path of a layer's attention module inside `model`.

        Raises:
            UserError: the layer does not exist, or has no full attention.
        """
        if not 0 <= layer < self.n_layers:
            raise UserError(f"Layer {layer} does not exist in {self.name}; choose one of 0..{self.n_layers - 1}.")
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types and layer_types[layer] != "full_attention":
            raise UserError(
                f"Layer {layer} of {self.name} uses {layer_types[layer]}; choose a layer with full attention."
            )
        return f"{self.architecture.blocks}.{layer}.{self.architecture.attention}"

    def block(self, layer: int) -> nn.Module:
        """One Transformer block; `architecture` has the paths of its parts."""
        return self.model.get_submodule(f"{self.architecture.blocks}.{layer}")

    def site(self, layer: int) -> AttentionSite:
        """The attention layer with its weights by head."""
        weights = self.architecture.weights(self.config, self.attention_module(layer))
        for name, value in weights.items():
            if isinstance(value, Tensor):
                weights[name] = value.detach().to(torch.float32, copy=True).contiguous()
        return AttentionSite(rotary=self.rotary, layer=layer, **weights)

    @torch.no_grad()
    def capture(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Attention input and output, each [batch, length, d_model], by layer; the pass ends at the deepest.

        Tokens [batch, length] may be padded on the right. Inside `splice` outputs are the replaced ones.
        """
        captured: dict[int, tuple[Tensor, Tensor]] = {}
        deepest = max(layers)

        def read(layer: int, x: Tensor, y: Tensor) -> None:
            captured[layer] = (x, y)
            if layer == deepest:
                raise _DeepestLayerReached

        with contextlib.suppress(_DeepestLayerReached), self._hooked(read, set(layers)):
            self._hidden(self._checked(tokens))
        return {layer: captured[layer] for layer in layers}

    def logits(self, tokens: Tensor, positions: Sequence[int] | Tensor | None = None) -> Tensor:
        """Next-token logits [batch, length, vocabulary], or [batch, n_positions, vocabulary] at given positions.

        Gradients reach a `splice` replacement.
        """
        hidden = self._hidden(self._checked(tokens))
        if positions is not None:
            hidden = hidden[:, torch.as_tensor(positions, device=hidden.device)]
        return self.model.get_output_embeddings()(hidden)

    @torch.no_grad()
    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy in nats, fp32, and whether it counts, each [batch, length - 1].

        Entry t is for token t + 1, and 0 where it does not count: `mask` [batch, length] is False for tokens that are
        no targets (BOS, padding on the right). The logits of the whole batch are never in memory.
        """
        tokens = self._checked(tokens)
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        counted = mask[:, 1:].to(self.device).bool()
        hidden = self._hidden(tokens)[:, :-1][counted]
        head = self.model.get_output_embeddings()
        rows = max(1, _LOGIT_VALUES_AT_ONCE // head.weight.shape[0])
        chunks = zip(hidden.split(rows), tokens[:, 1:][counted].split(rows), strict=True)
        losses = torch.zeros(counted.shape, device=self.device)
        losses[counted] = torch.cat([F.cross_entropy(head(h).float(), t, reduction="none") for h, t in chunks])
        return losses, counted

    @torch.no_grad()
    def residual(self, tokens: Tensor, layer: int) -> Tensor:
        """The residual stream that a block reads, [batch, length, d_model]; later blocks do not run."""
        self.module_path(layer)  # refuses a layer that is not there
        read: list[Tensor] = []

        def stop(block: nn.Module, args: tuple[Any, ...]) -> None:
            read.append(args[0])
            raise _DeepestLayerReached

        with contextlib.suppress(_DeepestLayerReached), self.block(layer).register_forward_pre_hook(stop):
            self._hidden(self._checked(tokens))
        return read[0]

    @contextlib.contextmanager
    def resume(self, layer: int, residual: Tensor) -> Iterator[None]:
        """Inside the context forward passes start at block `layer`, which reads `residual`.

        With the `residual` of the same tokens, results equal those of a whole pass bit for bit. A `splice` of an
        earlier layer has no effect.
        """
        self.module_path(layer)  # refuses a layer that is not there
        before, self._resumed = self._resumed, (layer, residual)
        try:
            yield
        finally:
            self._resumed = before

    @contextlib.contextmanager
    def splice(self, replacements: Mapping[int, Replacement]) -> Iterator[None]:
        """Inside the context a layer's output is `replacement(attention input, attention output)`.

        Raises:
            UserError: (in the forward pass) a replacement has another shape than the output.
        """

        def replace(layer: int, x: Tensor, y: Tensor) -> Tensor:
            new = replacements[layer](x, y)
            if new.shape != y.shape:
                raise UserError(
                    f"The replacement of layer {layer} has shape {list(new.shape)}; "
                    f"return {list(y.shape)}, the output's."
                )
            return new.to(y.dtype)

        with self._hooked(replace, replacements):
            yield

    @contextlib.contextmanager
    def _hooked(self, hook: Callable[[int, Tensor, Tensor], Tensor | None], layers: Iterable[int]) -> Iterator[None]:
        """Inside the context `hook(layer, attention input, output)` runs in each pass and may give a new output."""

        def run(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            new = hook(layer, args[0] if args else kwargs["hidden_states"], output[0])
            return None if new is None else (new, *output[1:])

        with contextlib.ExitStack() as stack:
            for layer in layers:
                module = self.attention_module(layer)
                stack.enter_context(module.register_forward_hook(partial(run, layer), with_kwargs=True))
            yield

    def _hidden(self, tokens: Tensor) -> Tensor:
        """The unembedding's input, [batch, length, d_model]."""
        with contextlib.ExitStack() as stack:
            if self._resumed is not None:
                stack.enter_context(blocks_from(self.model, self.architecture.blocks, *self._resumed))
            return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    def _checked(self, tokens: Tensor) -> Tensor:
        """Tokens on the model's device; on a GPU an invalid id would end the process."""
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
            shape = list(tokens.shape)
            raise UserError(f"Tokens must be integers of shape [batch, length], not {tokens.dtype} of shape {shape}.")
        last = self.model.get_input_embeddings().weight.shape[0] - 1
        if len(outside := tokens[(tokens < 0) | (tokens > last)]):
            raise UserError(f"Token id {int(outside[0])} is outside 0..{last} of {self.name}; use its own tokenizer.")
        if not self.architecture.has_rotary and tokens.shape[1] > self.context_length:
            raise UserError(
                f"{self.name} has learned positions for {self.context_length} tokens, not {tokens.shape[1]}; "
                "choose a shorter context."
            )
        return tokens.to(self.device)


# ---- loading


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    shared: bool = False,
) -> LanguageModel:
    """Load a causal language model, frozen and in eval mode.

    Args:
        name: "smollm2" (embedded, fetched when needed), a local folder, a .gguf file, or a Hub id. Local paths never
            touch the network; a Hub id is looked up in the local cache first.
        revision: commit, branch or tag of a Hub id.
        device: see `resolve_device`.
        dtype: by default float32 on the CPU and bfloat16 elsewhere.
        shared: take a model that is in memory, if it has these properties.

    Raises:
        UserError: the model cannot be found, read or downloaded, or is not supported.
    """
    place = resolve_device(device)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    for alive in _LIVE if shared else ():
        same = (alive.name, alive.device, alive.dtype) == (str(name), place, dtype)
        if same and revision in (None, alive.revision):
            return alive
    location, arguments = _resolve(str(name), revision)
    with quiet_transformers():
        try:
            model, tokenizer = _read(str(name), location, dtype, arguments | {"local_files_only": True})
        except _NotRead:
            if Path(location).exists() or _offline():
                raise
            model, tokenizer = _read(str(name), location, dtype, arguments)
    model.requires_grad_(False).eval()
    commit = getattr(model.config, "_commit_hash", None) or revision
    return LanguageModel(str(name), model.to(place), tokenizer, commit)


def require_available(name: str) -> None:
    """UserError if a Hub id's weights are gated, absent or out of reach; nothing is loaded, local models pass."""
    if name == EMBEDDED_NAME or Path(_resolve(name)[0]).exists():
        return
    from huggingface_hub import auth_check, try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in weights):
        return
    with _load_errors(name):
        if _offline():
            raise FileNotFoundError(name)
        auth_check(name)


def resolve_device(device: str | torch.device) -> torch.device:
    """A torch device, else UserError; "auto" is CUDA if available, else the CPU."""
    if str(device) == "auto":
        # torchrun tells every process which GPU is its own.
        gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return gpu if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {str(device)!r} is not available here; use auto, cpu or cuda.") from error


class _NotRead(UserError):
    """A model's files could not be read; a download may help."""


def _resolve(name: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """A folder or a Hub id, and transformers' arguments."""
    if name == EMBEDDED_NAME:
        return str(fetch_embedded_model()), {}
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"{name} is a file but not a .gguf one; give the folder that holds config.json and the weights."
            )
        return str(path.absolute().parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"The folder {name} has no config.json; give the folder of a saved Hugging Face model.")
        return str(path.absolute()), {}
    like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf")
    if like_a_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"There is no model at {name}; give {EMBEDDED_NAME}, a local folder, a .gguf file or a Hugging Face Hub id."
        )
    return name, {"revision": revision} if revision else {}


def _read(name: str, location: str, dtype: torch.dtype, arguments: dict[str, Any]) -> tuple[Any, Any | None]:
    """Model and tokenizer, None where there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

    gguf = "gguf_file" in arguments
    with _load_errors(name):
        if not gguf:
            # The plain dict first: an unknown architecture is named before any code or weight of it is touched.
            plain, _ = PretrainedConfig.get_config_dict(location, **arguments)
            architectures.of(plain.get("model_type"))
            if plain.get("quantization_config"):
                raise UserError(f"The weights of {name} are quantized; use the float checkpoint of the same model.")
        config = AutoConfig.from_pretrained(location, **arguments)
        rotary_from_config(config)
        how = {"config": config, "dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
        how |= {} if gguf else {"use_safetensors": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, **how, **arguments)
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"{name} is not a whole causal language model: {missing[0]} is missing; load the original checkpoint."
            )
        is_bare = not any((Path(location) / file).is_file() for file in _TOKENIZER_FILES)
        if Path(location).exists() and is_bare and not gguf:
            return model, None
        return model, AutoTokenizer.from_pretrained(location, **arguments)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn the many types that loaders raise into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"{name} does not fit in memory; use a smaller model, another device or a smaller dtype."
        ) from error
    except Exception as error:
        text = str(error) or type(error).__name__
        reason = text.strip().splitlines()[0].rstrip(".")
        if "gated repo" in text.lower() or "GatedRepoError" in (type(error).__name__, type(error.__cause__).__name__):
            sentence = (
                f"{name} is gated: accept its licence on its Hugging Face page, run `hf auth login`, and try again."
            )
        elif Path(name).exists() or name == EMBEDDED_NAME:
            sentence = f"The model at {name} cannot be read ({reason}); restore its files or save it again."
        else:
            reason = "HF_HUB_OFFLINE is set, so only the local cache was searched" if _offline() else reason
            sentence = (
                f"Model {name} cannot be loaded ({reason}); check the name and the network, or use {EMBEDDED_NAME}."
            )
        raise _NotRead(sentence) from error
