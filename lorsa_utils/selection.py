"""Which units of a token are kept: always K, those with the largest score; of equal scores the lower index wins.

    score = relu(z) ||w_o||   (`relu`: units act one way only)   or   |z| ||w_o||   (`abs`)

Everything that selects is handed a `Selection`, so another score is an entry of `SCORES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SCORES = {"relu": True, "abs": False}
"""By name, whether a score rectifies: z below zero then counts as zero, in the competition and in the output."""
FIXED_K = ("topk", "relu")
"""What published weights may call their selection: K units at every token, or all of them. What keeps another number at
every token (`jumprelu`, `batchtopk`) is refused by its name."""


class Selection(NamedTuple):
    """How many units are kept, and by what."""

    k: int
    norms: Tensor
    """Lengths of the write directions, [n]; no gradient flows to them."""
    score: str = "relu"

    @property
    def rectifies(self) -> bool:
        """See `SCORES`."""
        return SCORES[self.score]

    def scores(self, z: Tensor) -> Tensor:
        """Scores [..., n] of activations z [..., n]; those below zero count as zero."""
        return (z if self.rectifies else z.abs()) * self.norms

    def activations(self, z: Tensor) -> Tensor:
        """What units with activations z before the selection write with when they are kept."""
        return z.relu() if self.rectifies else z

    def among(self, units: Tensor, k: int) -> Selection:
        """The same of some units only, [n_some], from which at most k are kept."""
        return Selection(min(k, len(units)), self.norms[units], self.score)
