"""Top-K sparse autoencoder and transcoder: the baselines, over the same selection and decode as Lorsa.

    f = relu(W_E (x - b_pre) + b_E),  keep the K features with the largest f * ||w_d||,  y = sum f w_d + b_O

The SAE reads the attention layer's output and rebuilds it; the transcoder reads the layer's input and predicts its
output. b_pre is folded into b_E, so that both are one affine map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from lorsa_utils import ops, store
from lorsa_utils.config import SAEConfig
from lorsa_utils.lorsa import Lorsa, SparseModule, read_module_settings


class SAE(SparseModule):
    """Top-K SAE or transcoder. Parameters: W_E, W_O [n_features, d_model]; b_E [n_features]; b_O [d_model]."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config: SAEConfig = config
        self.W_E = nn.Parameter(torch.zeros(config.n_features, config.d_model))
        self.b_E = nn.Parameter(torch.zeros(config.n_features))
        self.W_O = nn.Parameter(torch.zeros(config.n_features, config.d_model))
        self.b_O = nn.Parameter(torch.zeros(config.d_model))

    def pre_activations(self, x: Tensor, backend: str = "torch") -> Tensor:
        """Feature activations before the selection, [batch, length, d_model] to [batch, length, n_features]."""
        return torch.nn.functional.linear(x, self.W_E, self.b_E)

    def keep(self, x: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0) -> ops.KeptHeads:
        """See `SparseModule.keep`."""
        rows = x.reshape(-1, x.shape[-1])
        norms = self.W_O.detach().norm(dim=1)
        return ops.sparse_encode(rows, self.W_E, self.b_E, norms, k, self.score, dead, aux_k, self.backend)

    def readers(self) -> tuple[Tensor, Tensor]:
        """See `SparseModule.readers`."""
        return self.W_E, self.b_E

    @torch.no_grad()
    def shift_inputs(self, mean: Tensor) -> None:
        """See `SparseModule.shift_inputs`."""
        self.b_E.sub_(self.W_E @ mean)

    @torch.no_grad()
    def scale_inputs(self, factor: float) -> None:
        """See `SparseModule.scale_inputs`."""
        self.W_E.mul_(factor)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load a saved SAE or transcoder; it takes raw activations."""
        settings = read_module_settings(folder)
        if settings["kind"] not in ("sae", "transcoder"):
            raise store.UserError(
                f"{folder} holds a {settings['kind']}, not an SAE; load it with lorsa_utils.sae.load_module."
            )
        module = cls(SAEConfig.from_dict(settings))
        module.load_weights(folder)
        return module


def load_module(folder: str | Path) -> Lorsa | SAE:
    """Load whatever a run folder holds: Lorsa, SAE or transcoder.

    Raises:
        UserError: the folder is not a run folder or its files are damaged.
    """
    return Lorsa.load(folder) if read_module_settings(folder)["kind"] == "lorsa" else SAE.load(folder)
