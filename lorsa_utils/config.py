"""Settings as frozen dataclasses, checked when created; presets and profiles are in `profiles.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from lorsa_utils.exceptions import UserError
from lorsa_utils.selection import SCORES

SCHEMA_VERSION = 1
PLAIN_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
ROPE_TYPES = ("none", "default", "linear", "llama3")
BOUNDS: dict[str, Callable[[float], bool]] = {
    "must be at least 1": lambda value: value >= 1,
    "must be positive": lambda value: value > 0,
    "must not be negative": lambda value: value >= 0,
    "is a share of the budget, between 0 and 1": lambda value: 0 <= value <= 1,
}


@dataclass(frozen=True)
class Config:
    """To and from JSON-ready dicts; an impossible setting raises UserError."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if expected := PLAIN_TYPES.get(str(item.type)):
                _check(
                    isinstance(value, expected) and (item.type == "bool") == isinstance(value, bool),
                    f"{item.name} of a {type(self).__name__} must be of type {item.type}, not {value!r}.",
                )

    def _bound(self, phrase: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            _check(BOUNDS[phrase](value), f"{name} {phrase}, not {value}.")

    def _choose(self, name: str, choices: Collection[str]) -> None:
        value = getattr(self, name)
        _check(value in choices, f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}.")

    to_dict = asdict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`; UserError if a field is unknown or missing, or a value impossible."""
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if isinstance(rotary := values.get("rotary"), Mapping):
            arguments["rotary"] = RotaryConfig.from_dict(rotary)
        try:
            return cls(**arguments)
        except TypeError as error:
            raise UserError(
                f"The settings of a {cls.__name__} are incomplete or written by another version ({error}); known are "
                f"{sorted(item.name for item in fields(cls))}; restore the file they are from."
            ) from error

    replace = replace  # a copy with changes, checked again


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


@dataclass(frozen=True)
class RotaryConfig(Config):
    """Rotary position embedding, derived from the model."""

    rope_type: str = "none"
    rotary_dim: int = 0
    """Rotated dimensions (fewer than d_qk in GPT-NeoX: partial RoPE)."""
    theta: float = 10000.0
    """Base of the frequencies."""
    adjacent_pairs: bool = False
    """False: dimension i turns with i + rotary_dim/2 (NeoX, Llama). True: 2i turns with 2i+1 (GPT-J)."""
    factor: float = 1.0
    """Scaling of `linear` and `llama3`."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths longer than original_context/low_freq_factor are stretched by `factor`."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths shorter than original_context/high_freq_factor are left alone."""
    original_context: int = 8192
    """`llama3`: context length before scaling, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose("rope_type", ROPE_TYPES)
        _check(self.rotary_dim % 2 == 0 and self.rotary_dim >= 0, f"rotary_dim must be even, not {self.rotary_dim}.")
        _check(self.rope_type == "none" or self.rotary_dim > 0, "rotary_dim must be positive when there is a rotation.")


@dataclass(frozen=True)
class LorsaConfig(Config):
    """Shape and options of one Lorsa module (paper, Sec. 3)."""

    d_model: int
    n_ov_heads: int
    """Lorsa heads, each with a rank-1 OV circuit."""
    n_qk_heads: int
    """QK groups; every n_ov_heads / n_qk_heads consecutive heads share W_Q and W_K."""
    d_qk: int
    """Width of queries and keys."""
    k: int
    attn_scale: float = 0.0
    """Factor on query-key products; 0 means 1/sqrt(d_qk)."""
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation (Qwen3)."""
    qk_norm_eps: float = 1e-6
    score: str = "relu"
    """See `selection`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bound("must be at least 1", "d_model", "n_ov_heads", "n_qk_heads", "d_qk", "k")
        self._choose("score", SCORES)
        _check(
            self.n_ov_heads % self.n_qk_heads == 0,
            f"n_heads ({self.n_ov_heads}) must be a multiple of n_qk ({self.n_qk_heads}), "
            "because every QK group holds equally many heads.",
        )
        _check(self.k <= self.n_ov_heads, f"k ({self.k}) must not exceed the number of heads ({self.n_ov_heads}).")
        _check(isinstance(self.rotary, RotaryConfig), f"rotary must be a RotaryConfig, not {self.rotary!r}.")
        _check(
            self.rotary.rotary_dim <= self.d_qk,
            f"rotary_dim ({self.rotary.rotary_dim}) must not exceed d_qk ({self.d_qk}).",
        )

    kind = "lorsa"  # not a field
    reads = "input"  # of the attention layer, or its output

    @property
    def n_units(self) -> int:
        """Heads."""
        return self.n_ov_heads

    @property
    def group_size(self) -> int:
        """G: heads per QK group."""
        return self.n_ov_heads // self.n_qk_heads

    @property
    def n_parameters(self) -> int:
        """Weights without biases, as the paper counts them: 2 n_qk d_model d_qk + 2 n_ov d_model."""
        return 2 * self.d_model * (self.n_qk_heads * self.d_qk + self.n_ov_heads)


@dataclass(frozen=True)
class SAEConfig(Config):
    """Shape and options of a Top-K sparse autoencoder or transcoder."""

    d_model: int
    n_features: int
    k: int
    kind: Literal["sae", "transcoder"] = "sae"
    """`sae` rebuilds the layer's output from itself, `transcoder` predicts it from the layer's input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bound("must be at least 1", "d_model", "n_features", "k")
        self._choose("kind", ("sae", "transcoder"))
        _check(self.k <= self.n_features, f"k ({self.k}) must not exceed the number of features ({self.n_features}).")

    score = "relu"  # not a field

    @property
    def n_units(self) -> int:
        """Features."""
        return self.n_features

    @property
    def reads(self) -> str:
        """Which end of the attention layer the module reads."""
        return "output" if self.kind == "sae" else "input"

    @property
    def n_parameters(self) -> int:
        """Weights without biases: 2 n_features d_model."""
        return 2 * self.n_features * self.d_model


def setting(default: Any, meaning: str) -> Any:
    """A field with its help text in `lorsa train --help`."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig(Config):
    """How one module is trained; tokens are those that count in the loss."""

    tokens: int = setting(250_000, "Budget.")
    batch_size: int = setting(4, "Sequences in one step.")
    lr: float = setting(2e-3, "Adam's learning rate on the plateau.")
    qk_lr_factor: float = setting(
        0.2, "Factor on it for W_Q, W_K and their biases: attention patterns want smaller steps than reads and writes."
    )
    warmup: float = setting(0.05, "Share of the budget with a rising learning rate.")
    decay: float = setting(0.8, "Share of the budget, at the end, with a falling learning rate.")
    beta1: float = setting(0.9, "Adam's decay of the gradient mean.")
    beta2: float = setting(0.999, "Adam's decay of the squared gradient mean.")
    clip: float = setting(0.0, "Largest gradient norm; 0 means no clipping.")
    k_start: int = setting(0, "Heads kept at the first step, falling exponentially to k; 0 means k from the start.")
    k_warmup: float = setting(0.2, "Share of the budget over which it falls.")
    aux_k: int = setting(32, "AuxK: dead heads that rebuild the remaining error at each step; 0 means none.")
    aux_weight: float = setting(1 / 32, "Weight of the AuxK loss.")
    dead_window: int = setting(8_000, "Tokens without an activation after which training counts a head as dead.")
    freeze_qk: bool = setting(False, "Leave W_Q, W_K and their biases at the start.")
    init: Literal["mhsa", "random"] = setting("mhsa", "Start, see `initialize`.")
    seed: int = setting(0, "Seed of the start.")
    log_every: int = setting(10, "Steps between two lines of metrics.jsonl.")
    save_every_seconds: float = setting(120.0, "Seconds between two savings of the state.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bound("must be positive", "tokens", "batch_size", "lr", "dead_window", "log_every")
        self._bound("must not be negative", "clip", "k_start", "aux_k", "aux_weight", "save_every_seconds")
        self._bound("is a share of the budget, between 0 and 1", "warmup", "decay", "k_warmup")
        self._choose("init", ("mhsa", "random"))
        _check(
            self.warmup + self.decay <= 1,
            f"warmup ({self.warmup}) and decay ({self.decay}) together exceed the whole budget.",
        )


@dataclass(frozen=True, kw_only=True)
class Profile(Config):
    """How large a run of the notebooks is: `smoke` (minutes), `laptop` (two cores), `paper`, or a preset.

    The defaults are those of the paper's size.
    """

    name: str
    model: str
    """See `models.load_model`."""
    layer: int
    """Of the notebooks on one layer."""
    layers: tuple[int, ...]
    """Of notebook 03."""
    n_heads: int
    n_qk: int
    d_head: int
    """Width of the model's queries and keys, and of Lorsa's."""
    k: int
    context: int
    """Tokens per sequence, with BOS."""
    batch_size: int = 4
    cache_tokens: int = 1_000_000
    """Training tokens in the activation cache of notebook 01."""
    train_tokens: int = 800_000_000
    """Budget of one module."""
    held_out_tokens: int = 1_000_000
    """For the main layer."""
    compare_held_out_tokens: int = 1_000_000
    """For each layer of notebook 03."""
    seeds: int = 5
    """For the toy of notebook 00."""

    @property
    def sae_features_equal_parameters(self) -> int:
        """Of an SAE with as many parameters as Lorsa."""
        return self.n_heads + self.n_qk * self.d_head

    @property
    def is_scaled_down(self) -> bool:
        """Whether shapes and budgets are smaller than the paper's."""
        return self.name in ("smoke", "laptop")


@dataclass(frozen=True, kw_only=True)
class Preset(Profile):
    """A language model, and the shape and training of its Lorsa layers: the notebooks can run in this size too."""

    licence: str
    """Of the weights, as the Hub spells it."""
    source: str
    """Where shape and budget are from."""
    n_layers: int
    d_model: int
    parameters: float
    """Of the model, embeddings included."""
    multiplied: float
    """Those that a pass up to the last attention layer multiplies with: all but embedding and unembedding."""
    dataset: str = "cerebras/SlimPajama-627B"
    """On the Hugging Face Hub."""


_TABLES = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
PRESETS = {name: Preset.from_dict({"name": name} | values) for name, values in _TABLES["presets"].items()}
PROFILES: dict[str, Profile] = {
    **{name: Profile.from_dict({"name": name} | values) for name, values in _TABLES["profiles"].items()},
    "paper": PRESETS["pythia-160m"].replace(name="paper"),
    **PRESETS,
}
"""By name; each preset is also a profile."""


def get_preset(name: str) -> Preset:
    """By name, else UserError."""
    _check(name in PRESETS, f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def get_profile(name: str) -> Profile:
    """By name, else UserError."""
    _check(name in PROFILES, f"There is no profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]
