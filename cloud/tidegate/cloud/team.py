"""`Team`: processes that run one model together, each on a device of its own.

The first one has the engine; before each step it tells the others what they need, the step's shape
and staging, and all of them run the walk. What they exchange on the way are two sums a layer and
the logits, by `torch.distributed` (NCCL between GPUs, gloo between CPUs), on one machine. They meet
in a file of a private folder and talk over loopback. Who starts them and ends them is `Crew`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
from torch import distributed

from tidegate.cloud.sharding import Part, padded_head
from tidegate.cloud.step_buffers import StepShape

Tensor = torch.Tensor

TIMEOUT_S: Final = 600.0
"""For an exchange: nobody waits longer than others need to load their part of a model."""
_IDLE: Final = timedelta(days=3650)
"""For the next step, which comes when somebody asks; who waits for one that is gone is told by the
connection."""
_STOP: Final = 0
LOOPBACK: Final = "lo"
"""The network interface that a team talks over, unless the environment says another."""


class Team:
    """One process's membership; `Group` for `PagedOps`, and the way steps are told."""

    def __init__(self, part: Part, meeting: Path, *, vocab: int, device: torch.device) -> None:
        """Join, and wait for all others.

        Args:
            part: which of them this one is.
            meeting: a file that none of them has made yet, in a folder of theirs alone.
            vocab: tokens of the whole head.
            device: where this one computes.
        """
        self.part = part
        self._vocab = vocab
        on_gpu = device.type == "cuda"
        if on_gpu:
            # Contexts and pinned memory belong to the thread's device, which is the first one.
            torch.cuda.set_device(device)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, LOOPBACK)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=meeting.resolve().as_uri(),
            rank=part.rank,
            world_size=part.world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        self._steps = distributed.new_group(backend="gloo", timeout=_IDLE)
        """What steps are told by: nothing may come for days."""
        # The first exchange makes what all others use: where that fails, or takes memory of the
        # device, it does before anybody measures how much is free.
        distributed.all_reduce(torch.zeros(1, device=device))
        self._parts = self._whole = torch.empty(0, device=device)
        self._device = device
        # The name that torch 2.13 has, and the one before.
        self._all_gather = getattr(distributed, "all_gather_single", None) or (
            distributed.all_gather_into_tensor
        )

    @property
    def nbytes(self) -> int:
        """Of the buffers that `reserve` made."""
        return self._parts.nbytes + self._whole.nbytes

    def reserve(self, rows: int, dtype: torch.dtype) -> None:
        """Make the buffers of `gather`, for at most `rows` rows; they stay where they are.

        For a further model in the same process again, whose recordings are its own.
        """
        values = rows * self.part.world * padded_head(self._vocab, self.part.world)
        self._parts = torch.empty(values, dtype=dtype, device=self._device)
        self._whole = torch.empty(values, dtype=dtype, device=self._device)

    def sum(self, partial: Tensor) -> Tensor:
        """See `Group.sum`."""
        distributed.all_reduce(partial)
        return partial

    def gather(self, logits: Tensor) -> Tensor:
        """See `Group.gather`; what it gives is overwritten by the next."""
        (rows, each), world = logits.shape, self.part.world
        values = rows * world * each
        if values > self._parts.numel():
            raise ValueError(f"{rows} rows of logits: room was reserved for fewer")
        parts = self._parts[:values].view(world * rows, each)
        self._all_gather(parts, logits)
        whole = self._whole[:values].view(rows, world, each)
        whole.copy_(parts.view(world, rows, each).transpose(0, 1))
        return whole.view(rows, world * each)[:, : self._vocab]

    def share(self, tokens: Tensor) -> None:
        """Give everybody what the first process has."""
        distributed.broadcast(tokens, 0)

    def least(self, number: int) -> int:
        """The smallest of what all processes say."""
        said = torch.tensor([number])
        distributed.all_reduce(said, op=distributed.ReduceOp.MIN)
        return int(said)

    def union(self, numbers: Iterable[int], most: int) -> list[int]:
        """Numbers of 0 to `most` that any process names, in order."""
        named = torch.zeros(most + 1, dtype=torch.int64)
        named[list(numbers)] = 1
        distributed.all_reduce(named, op=distributed.ReduceOp.MAX)
        return [int(one) for one in named.nonzero()]

    def tell(self, shape: StepShape, staging: Tensor, *, decode: bool) -> None:
        """Have the others run a step; only the first process may."""
        header = torch.tensor([1 + decode, *astuple(shape)])
        distributed.broadcast(header, 0, group=self._steps)
        distributed.broadcast(staging, 0, group=self._steps)

    def dismiss(self) -> None:
        """Let the others go; only the first process may."""
        distributed.broadcast(torch.tensor([_STOP] * 7), 0, group=self._steps)

    def listen(self) -> tuple[StepShape, bool] | None:
        """The shape of the next step and whether it decodes; None when there is none.

        What it brings has to be taken with `receive` right after.
        """
        header = torch.zeros(7, dtype=torch.int64)
        distributed.broadcast(header, 0, group=self._steps)
        kind, rows, tokens, width, logits, most_tokens, most_length = header.tolist()
        if kind == _STOP:
            return None
        shape = StepShape(
            rows=rows,
            tokens=tokens,
            width=width,
            logits=logits,
            most_tokens=most_tokens,
            most_length=most_length,
        )
        return shape, kind > 1

    def receive(self, staging: Tensor) -> None:
        """Fill the staging with what the first process has."""
        distributed.broadcast(staging, 0, group=self._steps)

    def leave(self) -> None:
        """End the membership."""
        distributed.destroy_process_group()


def abandon() -> None:
    """End this process's membership, if it has one, in a team that others have left."""
    if distributed.is_initialized():
        with suppress(RuntimeError):
            distributed.destroy_process_group()
