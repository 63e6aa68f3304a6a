"""`ModeSwitch`: what takes a power mode, whichever tool does it.

The names of its modes are those of the cost model (`tidegate.edge.energy.cost.ModeCost.name`). A
mode that needs a reboot is not among them.
"""

from __future__ import annotations

from typing import Protocol


class ModeSwitch(Protocol):
    """Takes power modes, and reads back that they were taken."""

    tool: str
    """`nvpmodel`, `cpufreq`, `own` or `none`."""
    modes: tuple[str, ...]
    """That can be taken while the daemon runs, slowest first; at least one."""

    def current(self) -> str | None:
        """The mode that the board is in, read from it; None when it is none of `modes`.

        Raises:
            ActuationError: it cannot be read.
        """

    def switch(self, mode: str) -> None:
        """Take a mode and read it back; up to a second, not for an event loop.

        Raises:
            ActuationError: it was refused, or another mode is there afterwards.
        """

    def close(self) -> None:
        """Leave the board as it was found, as far as it lets itself; never raises."""


class OneMode:
    """Of a board that cannot be switched, or whose owner does not want it to be."""

    tool = "none"

    def __init__(self, name: str = "as it is") -> None:
        self.modes: tuple[str, ...] = (name,)

    def current(self) -> str | None:
        """See `ModeSwitch.current`."""
        return self.modes[0]

    def switch(self, mode: str) -> None:
        """See `ModeSwitch.switch`; there is nothing to do."""
        assert mode in self.modes, "costs and switch have the same modes"

    def close(self) -> None:
        """See `ModeSwitch.close`; there is nothing to do."""
