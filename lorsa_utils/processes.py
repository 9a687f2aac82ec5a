"""The processes that train together: those started by `torchrun`, or this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lorsa_utils.exceptions import UserError


class World(NamedTuple):
    """Rank and number of the processes, each on its own sequences of every batch."""

    rank: int = 0
    """0 writes the files."""
    size: int = 1

    def gather(self, answers: dict[str, Any]) -> dict[str, Any]:
        """The answers of all processes, merged."""
        every: list[dict[str, Any]] = [answers] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(every, answers)
        return {name: answer for each in every for name, answer in each.items()}


ALONE = World()


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """Connect the processes of `torchrun` within the block; one process alone without it.

    Raises:
        UserError: they do not find each other.
    """
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if world.size > 1 and not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"The {world.size} processes of torchrun did not find each other ({error}); start them again."
            ) from error
    yield world
    if world.size > 1:
        torch.distributed.destroy_process_group()
