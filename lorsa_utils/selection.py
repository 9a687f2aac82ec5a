"""Which units are kept at each token: the K with the largest score; ties go to the lower index.

score = relu(z) ||w_o||   (`relu`: units act one way only)   or   |z| ||w_o||   (`abs`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SCORES = {"relu": True, "abs": False}
"""Whether z below zero counts as zero, in the score and in the output."""
FIXED_K = ("topk", "relu")
"""Names in published weights: K units at every token, or all. Those with a varying number (`jumprelu`, `batchtopk`) are
refused."""


class Selection(NamedTuple):
    """How many units are kept, and by which score."""

    k: int
    norms: Tensor
    """Of the write directions, [n], without gradient."""
    score: str = "relu"
    dead: Tensor | None = None
    """Mask [n] of the units from which AuxK chooses; None without AuxK."""
    aux_k: int = 0
    """Dead units that AuxK takes."""

    @property
    def rectifies(self) -> bool:
        """See `SCORES`."""
        return SCORES[self.score]

    def scores(self, z: Tensor) -> Tensor:
        """Scores of z, [..., n]; those below zero count as zero."""
        return (z if self.rectifies else z.abs()) * self.norms

    def activations(self, z: Tensor) -> Tensor:
        """What kept units multiply their write directions by."""
        return z.relu() if self.rectifies else z
