"""`Team`: processes that run one model together, each on a device of its own.

The first one has the engine; before each step it tells the others what they need, the step's shape
and staging, and all of them run the walk. What they exchange on the way are two sums a layer and
the logits, by `torch.distributed` (NCCL between GPUs, gloo between CPUs). A process that fails
takes the others with it: their next exchange times out, and the service has to be started again.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from datetime import timedelta
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the processes of a team meet."""

    host: str
    port: int


class Team:
    """One process's membership; `Group` for `PagedOps`, and the way steps are told."""

    def __init__(self, part: Part, address: Address, *, vocab: int, device: torch.device) -> None:
        """Join, and wait for all others.

        Args:
            part: which of them this one is.
            address: where the first one listens.
            vocab: tokens of the whole head.
            device: where this one computes.
        """
        self.part = part
        self._vocab = vocab
        on_gpu = device.type == "cuda"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"tcp://{address.host}:{address.port}",
            rank=part.rank,
            world_size=part.world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        self._steps = distributed.new_group(backend="gloo", timeout=_IDLE)
        """What steps are told by: nothing may come for days."""
        self._parts: Tensor | None = None
        self._device = device

    def sum(self, partial: Tensor) -> Tensor:
        """See `Group.sum`."""
        distributed.all_reduce(partial)
        return partial

    def gather(self, logits: Tensor) -> Tensor:
        """See `Group.gather`."""
        rows, each = logits.shape
        parts = self._room(rows, logits.dtype)
        distributed.all_gather_into_tensor(parts, logits)
        whole = parts.view(self.part.world, rows, each).transpose(0, 1).reshape(rows, -1)
        return whole[:, : self._vocab]

    def _room(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[world * rows, part of the vocabulary], of one buffer that grows to the worst case's."""
        each = padded_head(self._vocab, self.part.world)
        values = self.part.world * rows * each
        if self._parts is None or self._parts.numel() < values:
            self._parts = torch.empty(values, dtype=dtype, device=self._device)
        return self._parts[:values].view(self.part.world * rows, each)

    def share(self, tokens: Tensor) -> None:
        """Give everybody what the first process has."""
        distributed.broadcast(tokens, 0)

    def least(self, number: int) -> int:
        """The smallest of what all processes say."""
        said = torch.tensor([number])
        distributed.all_reduce(said, op=distributed.ReduceOp.MIN)
        return int(said)

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
