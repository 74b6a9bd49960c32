"""Processes that train one network together, a thread each: they meet twice a step instead of in every matrix product.

On two quiet cores that is as fast as one process with two threads; on cores that others use as well it is several times faster.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # a member may be stopped for a while


class Team:
    """`size` processes of which this is number `rank`."""

    def __init__(self, rank: int, size: int, meeting_point: Path) -> None:
        """meeting_point: a path that does not exist yet, the same for all."""
        self.rank = rank
        self.size = size
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size, timeout=PATIENCE)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """In place, over the members; one message for all."""
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def owned(self, items: Sequence[T]) -> list[T]:
        """The part of the items this member works on."""
        return list(items[self.rank :: self.size])

    def exchange(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor as its owner has it, to everybody."""
        for index, tensor in enumerate(tensors):
            dist.broadcast(tensor, src=index % self.size)

    def close(self) -> None:
        dist.destroy_process_group()


def run_as_team(size: int, work: Path, act: Callable[[Team], None]) -> None:
    """Call `act` in `size` processes, this one among them; they end with it."""
    meeting_point = (work / "meeting-point").resolve()
    meeting_point.unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_act_as, args=(rank, size, meeting_point, act), daemon=True) for rank in range(1, size)]
    for process in others:
        process.start()
    _act_as(0, size, meeting_point, act)
    for process in others:
        process.join()


def _act_as(rank: int, size: int, meeting_point: Path, act: Callable[[Team], None]) -> None:
    team = Team(rank, size, meeting_point)
    act(team)
    team.close()
