"""`Scratch`: the buffers that a step's results lie in, one for each purpose, reused by every layer.

A worst-case step makes them as large as they will ever be; sealed afterwards, a step takes views
and allocates nothing, so what it writes to stays where a captured graph expects it. Results that
live until the next one of their kind is made have two buffers, in turn.
"""

from __future__ import annotations

import math

import torch

from tidegate.errors import ExecutionError

Tensor = torch.Tensor

_IN_TURN = frozenset({"normed", "gathered"})
"""What one norm gives is read by the next: behind attention, by the sum that the MLP's begins
with. The last rows are gathered from both terms of a sum."""


class Scratch:
    """Buffers by purpose on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Begin with none."""
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        self._turns: dict[str, int] = {}
        self._sealed = False

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(one.nbytes for group in self._buffers.values() for one in group)

    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie, for tests that they stay there."""
        return tuple(one.data_ptr() for group in self._buffers.values() for one in group)

    def seal(self) -> None:
        """Allocate nothing from now on."""
        self._sealed = True

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of `shape` whose content is undefined, valid until its purpose comes again.

        Raises:
            ExecutionError: it is sealed and the buffer is too small or does not exist.
        """
        values, key = math.prod(shape), (purpose, dtype)
        group = self._buffers.get(key)
        if group is None or group[0].numel() < values:
            group = self._buffers[key] = self._allocate(purpose, values, dtype)
        turn = 0
        if len(group) > 1:
            turn = self._turns[purpose] = 1 - self._turns.get(purpose, 0)
        return group[turn][:values].view(shape)

    def _allocate(self, purpose: str, values: int, dtype: torch.dtype) -> list[Tensor]:
        if self._sealed:
            raise ExecutionError(
                f"a step needs {values} values for {purpose!r}: more than the worst case had"
            )
        count = 2 if purpose in _IN_TURN else 1
        return [torch.empty(values, dtype=dtype, device=self._device) for _ in range(count)]
