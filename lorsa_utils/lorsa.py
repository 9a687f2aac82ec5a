"""Lorsa, many sparse attention heads with rank-1 OV circuits in place of an attention layer, and baselines.

It is attention with n_qk heads whose values have width G = n_ov / n_qk, then a top-K over all n_ov numbers and a linear
decode (in loops: `reference.lorsa_forward`). Top-K SAEs and transcoders use the same selection and decode:

    f = relu(W_E x + b_E),  keep the K features with the largest f * ||w_o||,  y = sum f w_o + b_O
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lorsa_utils import ops, store
from lorsa_utils.config import SCHEMA_VERSION, LorsaConfig, SAEConfig
from lorsa_utils.exceptions import UserError
from lorsa_utils.models import AttentionSite
from lorsa_utils.selection import Selection

KINDS = ("lorsa", "sae", "transcoder")


class SparseOutput(NamedTuple):
    """Output y [batch, length, d_model], and `ops.KeptHeads` as [batch, length, k] and [..., aux_k]."""

    y: Tensor
    indices: Tensor
    values: Tensor
    aux_indices: Tensor
    aux_values: Tensor


class Scaling(NamedTuple):
    """From raw activations to training space: inputs have mean 0; inputs and targets have mean norm sqrt(d_model).

    Attention inputs have a large common mean (69 % of their energy at layer 17 of SmolLM2-135M); a step along it moves
    a head's z at all tokens. Runs on centred inputs had far fewer dead heads; centring alone was not ablated.
    """

    input_mean: Tensor
    """[d_model], over counted tokens."""
    input_scale: float
    """For centred inputs."""
    output_scale: float

    def inputs(self, x: Tensor) -> Tensor:
        """Raw inputs [..., d_model] to training space."""
        return (x - self.input_mean) * self.input_scale

    def targets(self, y: Tensor) -> Tensor:
        """Raw targets [..., d_model] to training space."""
        return y * self.output_scale


class SparseModule(nn.Module, ABC):
    """What Lorsa and SAE share; `W_O` [n, d_model] has the write directions, `b_O` [d_model] is the output bias."""

    W_O: Tensor
    b_O: Tensor
    config: LorsaConfig | SAEConfig
    read_by: str
    """Letters of the weights and biases that read x."""
    backend: str = "auto"
    """See `ops`."""

    @property
    def k(self) -> int:
        """Units kept per token."""
        return self.config.k

    @property
    def n_units(self) -> int:
        """Heads or features."""
        return self.config.n_units

    def selection(self, k: int | None = None, dead: Tensor | None = None, aux_k: int = 0) -> Selection:
        """How units are selected; training anneals k."""
        return Selection(k or self.k, self.W_O.detach().norm(dim=1), self.config.score, dead, aux_k)

    @abstractmethod
    def pre_activations(self, x: Tensor) -> Tensor:
        """Activations before the selection, [batch, length, d_model] to [batch, length, n]."""

    def select(self, pre: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Kept units and their activations, each [batch, length, k], from pre-activations [batch, length, n]."""
        selection = self.selection(k)
        with torch.no_grad():
            indices = ops.select_heads(pre.flatten(0, -2), selection, backend="torch").unflatten(0, pre.shape[:-1])
        return indices, selection.activations(pre.gather(-1, indices))

    @abstractmethod
    def keep(self, x: Tensor, selection: Selection) -> ops.KeptHeads:
        """Kept units of x [batch, length, d_model], one row per token, with a cheaper gradient than `select`'s."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Kept units and their activations, each [batch, length, k], from x [batch, length, d_model]."""
        kept = self.keep(x, self.selection())
        return kept.indices.unflatten(0, x.shape[:-1]), kept.values.unflatten(0, x.shape[:-1])

    def decode(self, indices: Tensor, values: Tensor, bias: bool = True) -> Tensor:
        """Output [batch, length, d_model] of kept units [batch, length, k]."""
        flat = ops.sparse_decode(indices.flatten(0, -2), values.flatten(0, -2), self.W_O, self.backend)
        y = flat.unflatten(0, indices.shape[:-1])
        return y + self.b_O if bias else y

    def forward(self, x: Tensor, selection: Selection | None = None) -> SparseOutput:
        """Predict the layer's output from raw x [batch, length, d_model]."""
        kept = [side.unflatten(0, x.shape[:-1]) for side in self.keep(x, selection or self.selection())]
        return SparseOutput(self.decode(kept[0], kept[1]), *kept)

    def input_from(self, attn_input: Tensor, attn_output: Tensor) -> Tensor:
        """Whichever of the two the module reads."""
        return attn_output if self.config.reads == "output" else attn_input

    @property
    def readers(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases that read x; activations are proportional to the last, [n, d_model] and [n]."""
        return [(getattr(self, f"W_{part}"), getattr(self, f"b_{part}")) for part in self.read_by]

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Scale w_o to norm 1 and multiply w_v and b_V by ||w_o|| (paper, Sec. 5); outputs stay the same."""
        norms = self.W_O.norm(dim=1).clamp_min(torch.finfo(self.W_O.dtype).tiny)
        weight, bias = self.readers[-1]
        self.W_O /= norms[:, None]
        weight *= norms[:, None]
        bias *= norms

    @torch.no_grad()
    def shift_inputs(self, mean: Tensor) -> None:
        """Change biases so that x is read as x - mean was."""
        for weight, bias in self.readers:
            bias -= torch.einsum("d,gdk->gk", mean, weight) if weight.dim() == 3 else weight @ mean

    @torch.no_grad()
    def scale_inputs(self, factor: float) -> None:
        """Change weights so that x is read as factor * x was."""
        for weight, _ in self.readers:
            weight *= factor

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """From weights for training space to weights for raw inputs and outputs."""
        self.scale_inputs(scaling.input_scale)
        self.shift_inputs(scaling.input_mean)
        self.W_O /= scaling.output_scale
        self.b_O /= scaling.output_scale

    @torch.no_grad()
    def unfold(self, scaling: Scaling) -> None:
        """The inverse of `fold`."""
        self.shift_inputs(-scaling.input_mean)
        self.scale_inputs(1 / scaling.input_scale)
        self.W_O *= scaling.output_scale
        self.b_O *= scaling.output_scale

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, for raw activations."""
        path = store.require_writable(folder)
        store.write_tensors(path / "model.safetensors", dict(self.state_dict()))
        module = {**self.config.to_dict(), "kind": self.config.kind}
        store.write_json(path / "config.json", {"schema_version": SCHEMA_VERSION, "module": module})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """`load`, but UserError if the module is of another class."""
        module = load(folder, device)
        if isinstance(module, cls):
            return module
        held = f"{folder} holds a {module.config.kind}, not a module of class {cls.__name__}"
        raise UserError(f"{held}; load it with lorsa_utils.load.")


def _weight(*shape: int, value: float = 0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, float(value)))


def _check_index(index: int, count: int, what: str) -> None:
    if not 0 <= index < count:
        raise UserError(f"There is no {what} {index}; choose one from 0 to {count - 1}.")


class Lorsa(SparseModule):
    """Low-rank sparse attention (paper, Sec. 3); heads of a QK group are consecutive."""

    read_by = "QKV"

    def __init__(self, config: LorsaConfig) -> None:
        super().__init__()
        self.config: LorsaConfig = config
        n_qk, n_ov, d, d_qk = config.n_qk_heads, config.n_ov_heads, config.d_model, config.d_qk
        self.W_Q, self.W_K = _weight(n_qk, d, d_qk), _weight(n_qk, d, d_qk)
        self.b_Q, self.b_K = _weight(n_qk, d_qk), _weight(n_qk, d_qk)
        self.W_V, self.b_V = _weight(n_ov, d), _weight(n_ov)
        self.W_O, self.b_O = _weight(n_ov, d), _weight(d)
        if config.qk_norm:
            self.q_norm, self.k_norm = _weight(n_qk, d_qk, value=1), _weight(n_qk, d_qk, value=1)
        self._tables: tuple[Tensor, Tensor] | None = None

    @classmethod
    def config_for_site(cls, site: AttentionSite, n_heads: int, n_qk: int, k: int) -> LorsaConfig:
        """Config with widths, scale, rotation and QK norm of an attention layer."""
        copied = {name: getattr(site, name) for name in ("d_model", "attn_scale", "rotary", "qk_norm", "qk_norm_eps")}
        return LorsaConfig(n_ov_heads=n_heads, n_qk_heads=n_qk, d_qk=site.d_head, k=k, **copied)

    @property
    def attn_scale(self) -> float:
        """Factor on query-key products."""
        return self.config.attn_scale or self.config.d_qk**-0.5

    def queries_keys(self, x: Tensor, groups: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, x [batch, length, d_model] to two [batch, n_groups, length, d_qk]."""
        length, place = x.shape[1], (self.W_Q.device, self.W_Q.dtype)
        if self._tables is None or len(cos := self._tables[0]) < length or (cos.device, cos.dtype) != place:
            self._tables = ops.rotary_tables(self.config.rotary, length, *place)
        cos, sin = (table[:length] for table in self._tables)
        sides = []
        for letter in "QK":
            weight, bias = (getattr(self, f"{kind}_{letter}")[groups] for kind in "Wb")
            rows = F.linear(x, weight.transpose(1, 2).reshape(-1, weight.shape[1]), bias.flatten())
            side = rows.unflatten(2, bias.shape).transpose(1, 2)
            if self.config.qk_norm:
                gain = getattr(self, f"{letter.lower()}_norm")[groups]
                side = ops.rms_norm(side, gain[:, None], self.config.qk_norm_eps)
            sides.append(ops.apply_rotary(side, cos, sin, self.config.rotary.adjacent_pairs, self.backend))
        return sides[0], sides[1]

    def attention_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, keys, and values by QK group, each [batch, n_qk, length, width]."""
        v = (
            F.linear(x, self.W_V, self.b_V)
            .unflatten(2, (self.config.n_qk_heads, self.config.group_size))
            .transpose(1, 2)
        )
        return *self.queries_keys(x), v

    @override
    def keep(self, x: Tensor, selection: Selection) -> ops.KeptHeads:
        return ops.sparse_attention(*self.attention_inputs(x), self.attn_scale, selection, self.backend)

    @override
    def pre_activations(self, x: Tensor) -> Tensor:
        z = ops.causal_attention(*self.attention_inputs(x), self.attn_scale, self.backend)
        return z.transpose(1, 2).flatten(2)

    def attention_pattern(self, x: Tensor, group: int) -> Tensor:
        """A of one QK group, [batch, length, length]; rows are queries and sum to 1."""
        _check_index(group, self.config.n_qk_heads, "QK group")
        q, k = self.queries_keys(x, slice(group, group + 1))
        return ops.attention_pattern(q, k, self.attn_scale)[:, 0]

    def z_pattern(self, x: Tensor, head: int) -> Tensor:
        """A_ij v_j of a head, [batch, length, length]: row i sums to z_i."""
        _check_index(head, self.config.n_ov_heads, "head")
        v = x @ self.W_V[head] + self.b_V[head]
        return self.attention_pattern(x, head // self.config.group_size) * v[:, None, :]


class SAE(SparseModule):
    """Top-K SAE or transcoder."""

    read_by = "E"

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config: SAEConfig = config
        self.W_E, self.b_E = _weight(config.n_features, config.d_model), _weight(config.n_features)
        self.W_O, self.b_O = _weight(config.n_features, config.d_model), _weight(config.d_model)

    @override
    def pre_activations(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_E, self.b_E)

    @override
    def keep(self, x: Tensor, selection: Selection) -> ops.KeptHeads:
        return ops.sparse_encode(x.flatten(0, -2), self.W_E, self.b_E, selection, self.backend)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Lorsa | SAE:
    """A saved module, frozen, for raw activations; UserError if `folder` is not a run folder or is damaged."""
    settings = read_module_settings(folder)
    kind = settings.pop("kind")
    if kind not in KINDS:
        raise UserError(f"{folder} holds a module of kind {kind!r}; this version reads {', '.join(KINDS)}.")
    module: Lorsa | SAE
    if kind == "lorsa":
        module = Lorsa(LorsaConfig.from_dict(settings))
    else:
        module = SAE(SAEConfig.from_dict(settings | {"kind": kind}))
    path = Path(folder) / "model.safetensors"
    tensors, expected = store.read_tensors(path), module.state_dict()
    for name, value in expected.items():
        if name not in tensors or tensors[name].shape != value.shape:
            state = "missing" if name not in tensors else f"of shape {list(tensors[name].shape)}"
            raise UserError(
                f"{path}: {name} is {state}, not {list(value.shape)}; the file and config.json do not belong together."
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; restore a copy or train again.")
    module.load_state_dict({name: tensors[name] for name in expected})
    return module.to(device).requires_grad_(False)


def read_module_settings(folder: str | Path) -> dict[str, object]:
    """`module` of config.json; UserError if that is missing, damaged, or of another schema version."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder (config.json is missing); give the --out folder of `lorsa train`."
        )
    config = store.read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("module"), dict) or "kind" not in config["module"]:
        raise UserError(f"{path} does not say what kind of module it describes; restore a copy or train again.")
    if (version := config.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}; train again.")
    return dict(config["module"])
