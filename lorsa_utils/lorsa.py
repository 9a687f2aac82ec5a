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

    Attention inputs have a large common mean (69 % of their energy at layer 17 of SmolLM2-135M). A step along it moves
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

    def selection(self, k: int | None = None) -> Selection:
        """How units are selected; training anneals k."""
        return Selection(k or self.k, self.W_O.detach().norm(dim=1), self.config.score)

    @abstractmethod
    def pre_activations(self, x: Tensor, backend: str = "torch") -> Tensor:
        """Activations before the selection, [batch, length, d_model] to [batch, length, n]."""

    def select(
        self, pre: Tensor, k: int | None = None, among: Tensor | None = None, backend: str = "torch"
    ) -> tuple[Tensor, Tensor]:
        """Kept units and their activations, each [batch, length, k], from pre-activations [batch, length, n].

        Only units in the mask `among` [n] compete. Gradients flow through the kept activations.
        """
        flat, selection = pre.reshape(-1, pre.shape[-1]), self.selection(k)
        with torch.no_grad():
            indices = ops.select_heads(flat, selection, among, backend)
        shape = (*pre.shape[:-1], indices.shape[-1])
        return indices.view(shape), selection.activations(flat.gather(1, indices)).view(shape)

    @abstractmethod
    def keep(self, x: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0) -> ops.KeptHeads:
        """`select` of `pre_activations` of x [batch, length, d_model], with a cheaper gradient; one row per token."""

    def encode(self, x: Tensor, backend: str = "torch") -> tuple[Tensor, Tensor]:
        """`select` for x [batch, length, d_model]."""
        if backend == "reference":
            return self.select(self.pre_activations(x, backend), backend=backend)
        kept = self.keep(x, self.k)
        return kept.indices.view(*x.shape[:-1], -1), kept.values.view(*x.shape[:-1], -1)

    def decode(self, indices: Tensor, values: Tensor, bias: bool = True, backend: str | None = None) -> Tensor:
        """Output [batch, length, d_model] of kept units [batch, length, k]."""
        rows = indices.reshape(-1, indices.shape[-1]), values.reshape(-1, values.shape[-1])
        flat = ops.sparse_decode(*rows, self.W_O, backend or self.backend)
        y = flat.view(*indices.shape[:-1], -1)
        return y + self.b_O if bias else y

    def forward(self, x: Tensor, k: int | None = None, dead: Tensor | None = None, aux_k: int = 0) -> SparseOutput:
        """Predict the layer's output from raw x [batch, length, d_model]; AuxK chooses in the mask `dead` [n]."""
        shape = (*x.shape[:-1], -1)
        kept = self.keep(x, k or self.k, dead, aux_k)
        indices, values = kept.indices.view(shape), kept.values.view(shape)
        aux = (side.view(*x.shape[:-1], side.shape[-1]) for side in (kept.aux_indices, kept.aux_values))
        return SparseOutput(self.decode(indices, values), indices, values, *aux)

    def input_from(self, attn_input: Tensor, attn_output: Tensor) -> Tensor:
        """Whichever of the two the module reads."""
        return attn_output if self.config.reads == "output" else attn_input

    @abstractmethod
    def readers(self) -> tuple[Tensor, Tensor]:
        """Weights [n, d_model] and biases [n] to which activations are proportional."""

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Scale w_o to norm 1 and multiply w_v and b_V by ||w_o|| (paper, Sec. 5); outputs stay the same."""
        norms = self.W_O.norm(dim=1).clamp_min(torch.finfo(self.W_O.dtype).tiny)
        self.W_O /= norms[:, None]
        for reader in self.readers():
            reader.mul_(norms.view(-1, *[1] * (reader.dim() - 1)))

    @abstractmethod
    def shift_inputs(self, mean: Tensor) -> None:
        """Change biases so that x is read as x - mean was."""

    @abstractmethod
    def scale_inputs(self, factor: float) -> None:
        """Change weights so that x is read as factor * x was."""

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """From weights for training space to weights for raw inputs and outputs."""
        self.scale_inputs(scaling.input_scale)
        self.shift_inputs(scaling.input_mean)
        self.W_O.div_(scaling.output_scale)
        self.b_O.div_(scaling.output_scale)

    @torch.no_grad()
    def unfold(self, scaling: Scaling) -> None:
        """The inverse of `fold`."""
        self.shift_inputs(-scaling.input_mean)
        self.scale_inputs(1 / scaling.input_scale)
        self.W_O.mul_(scaling.output_scale)
        self.b_O.mul_(scaling.output_scale)

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
        if not isinstance(module, cls):
            kind = module.config.kind
            raise UserError(
                f"{folder} holds a {kind}, not a module of class {cls.__name__}; load it with lorsa_utils.load."
            )
        return module

    def load_weights(self, folder: str | Path) -> None:
        """Read `folder`/model.safetensors.

        Raises:
            UserError: a tensor is missing, has another shape, or is not finite.
        """
        path = Path(folder) / "model.safetensors"
        tensors = store.read_tensors(path)
        expected = self.state_dict()
        for name, value in expected.items():
            if name not in tensors or tensors[name].shape != value.shape:
                found = "missing" if name not in tensors else f"of shape {list(tensors[name].shape)}"
                raise UserError(
                    f"{path}: {name} is {found}, not {list(value.shape)}; "
                    "the file and config.json do not belong together."
                )
            if not torch.isfinite(tensors[name]).all():
                raise UserError(f"{path}: {name} holds values that are not finite; restore a copy or train again.")
        self.load_state_dict({name: tensors[name] for name in expected})


class Lorsa(SparseModule):
    """Low-rank sparse attention (paper, Sec. 3); heads of a QK group are consecutive."""

    def __init__(self, config: LorsaConfig) -> None:
        super().__init__()
        self.config: LorsaConfig = config
        n_qk, n_ov, d, d_qk = config.n_qk_heads, config.n_ov_heads, config.d_model, config.d_qk
        self.W_Q = nn.Parameter(torch.zeros(n_qk, d, d_qk))
        self.W_K = nn.Parameter(torch.zeros(n_qk, d, d_qk))
        self.b_Q = nn.Parameter(torch.zeros(n_qk, d_qk))
        self.b_K = nn.Parameter(torch.zeros(n_qk, d_qk))
        self.W_V = nn.Parameter(torch.zeros(n_ov, d))
        self.b_V = nn.Parameter(torch.zeros(n_ov))
        self.W_O = nn.Parameter(torch.zeros(n_ov, d))
        self.b_O = nn.Parameter(torch.zeros(d))
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(n_qk, d_qk))
            self.k_norm = nn.Parameter(torch.ones(n_qk, d_qk))
        self._tables: tuple[Tensor, Tensor] | None = None

    @classmethod
    def config_for_site(
        cls, site: AttentionSite, n_heads: int, n_qk: int, k: int, d_qk: int | None = None
    ) -> LorsaConfig:
        """Config with widths, scale, rotation and QK norm of an attention layer."""
        return LorsaConfig(
            d_model=site.d_model,
            n_ov_heads=n_heads,
            n_qk_heads=n_qk,
            d_qk=d_qk or site.d_head,
            k=k,
            attn_scale=site.attn_scale,
            rotary=site.rotary,
            qk_norm=site.qk_norm,
            qk_norm_eps=site.qk_norm_eps,
        )

    @property
    def attn_scale(self) -> float:
        """Factor on query-key products."""
        return self.config.attn_scale or self.config.d_qk**-0.5

    def _rotary(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        place = like.device, like.dtype
        if self._tables is None or len(cos := self._tables[0]) < length or (cos.device, cos.dtype) != place:
            self._tables = ops.rotary_tables(self.config.rotary, length, *place)
        return self._tables[0][:length], self._tables[1][:length]

    def queries_keys(self, x: Tensor, groups: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, x [batch, length, d_model] to two [batch, n_groups, length, d_qk]."""
        cos, sin = self._rotary(x.shape[1], self.W_Q)
        sides = []
        for weight, bias, norm in ((self.W_Q, self.b_Q, "q_norm"), (self.W_K, self.b_K, "k_norm")):
            w = weight[groups]
            rows = torch.nn.functional.linear(x, w.transpose(1, 2).reshape(-1, w.shape[1]), bias[groups].flatten())
            side = rows.view(*x.shape[:2], w.shape[0], w.shape[2]).transpose(1, 2)
            if self.config.qk_norm:
                side = ops.rms_norm(side, getattr(self, norm)[groups][:, None], self.config.qk_norm_eps)
            sides.append(ops.apply_rotary(side, cos, sin, self.config.rotary.adjacent_pairs, self.backend))
        return sides[0], sides[1]

    def values(self, x: Tensor) -> Tensor:
        """v of every head, [batch, length, n_ov]."""
        return torch.nn.functional.linear(x, self.W_V, self.b_V)

    def attention_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, keys, and values by QK group, each [batch, n_qk, length, width]."""
        v = self.values(x).view(*x.shape[:2], self.config.n_qk_heads, self.config.group_size).transpose(1, 2)
        return *self.queries_keys(x), v

    @override
    def keep(self, x: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0) -> ops.KeptHeads:
        q, keys, v = self.attention_inputs(x)
        return ops.sparse_attention(q, keys, v, self.attn_scale, self.selection(k), dead, aux_k, self.backend)

    @override
    def pre_activations(self, x: Tensor, backend: str = "torch") -> Tensor:
        q, k, v = self.attention_inputs(x)
        z = ops.causal_attention(q, k, v, self.attn_scale, backend)
        return z.transpose(1, 2).reshape(*x.shape[:2], self.config.n_ov_heads)

    def attention_pattern(self, x: Tensor, group: int) -> Tensor:
        """A of one QK group, [batch, length, length]; rows are queries and sum to 1."""
        self._check_index(group, self.config.n_qk_heads, "QK group")
        q, k = self.queries_keys(x, slice(group, group + 1))
        return ops.attention_pattern(q, k, self.attn_scale)[:, 0]

    def z_pattern(self, x: Tensor, head: int) -> Tensor:
        """A_ij v_j of a head, [batch, length, length]: row i sums to z_i."""
        self._check_index(head, self.config.n_ov_heads, "head")
        v = x @ self.W_V[head] + self.b_V[head]
        return self.attention_pattern(x, head // self.config.group_size) * v[:, None, :]

    @staticmethod
    def _check_index(index: int, count: int, what: str) -> None:
        if not 0 <= index < count:
            raise UserError(f"There is no {what} {index}; choose one from 0 to {count - 1}.")

    @override
    def readers(self) -> tuple[Tensor, Tensor]:
        return self.W_V, self.b_V

    @override
    @torch.no_grad()
    def shift_inputs(self, mean: Tensor) -> None:
        for weight, bias in ((self.W_Q, self.b_Q), (self.W_K, self.b_K)):
            bias.sub_(torch.einsum("d,gdk->gk", mean, weight))
        self.b_V.sub_(self.W_V @ mean)

    @override
    @torch.no_grad()
    def scale_inputs(self, factor: float) -> None:
        for weight in (self.W_Q, self.W_K, self.W_V):
            weight.mul_(factor)


class SAE(SparseModule):
    """Top-K SAE or transcoder."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config: SAEConfig = config
        self.W_E = nn.Parameter(torch.zeros(config.n_features, config.d_model))
        self.b_E = nn.Parameter(torch.zeros(config.n_features))
        self.W_O = nn.Parameter(torch.zeros(config.n_features, config.d_model))
        self.b_O = nn.Parameter(torch.zeros(config.d_model))

    @override
    def pre_activations(self, x: Tensor, backend: str = "torch") -> Tensor:
        return torch.nn.functional.linear(x, self.W_E, self.b_E)

    @override
    def keep(self, x: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0) -> ops.KeptHeads:
        rows = x.reshape(-1, x.shape[-1])
        return ops.sparse_encode(rows, self.W_E, self.b_E, self.selection(k), dead, aux_k, self.backend)

    @override
    def readers(self) -> tuple[Tensor, Tensor]:
        return self.W_E, self.b_E

    @override
    @torch.no_grad()
    def shift_inputs(self, mean: Tensor) -> None:
        self.b_E.sub_(self.W_E @ mean)

    @override
    @torch.no_grad()
    def scale_inputs(self, factor: float) -> None:
        self.W_E.mul_(factor)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Lorsa | SAE:
    """A saved module, frozen, for raw activations; UserError if `folder` is not a run folder or is damaged."""
    settings = read_module_settings(folder)
    kind = settings["kind"]
    if kind not in KINDS:
        raise UserError(f"{folder} holds a module of kind {kind!r}; this version reads {', '.join(KINDS)}.")
    if kind == "lorsa":
        module: Lorsa | SAE = Lorsa(LorsaConfig.from_dict({k: v for k, v in settings.items() if k != "kind"}))
    else:
        module = SAE(SAEConfig.from_dict(settings))
    module.load_weights(folder)
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
    if config.get("schema_version") != SCHEMA_VERSION:
        version = config.get("schema_version")
        raise UserError(f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}; train again.")
    return dict(config["module"])
