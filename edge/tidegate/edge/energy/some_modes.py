"""`some_modes`: a switch of fewer power modes, where not all of a board's are worth taking.

A board that is in another mode than these is in none of ours, and is taken out of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.edge.energy.actuate import ModeSwitch


class SomeModes:
    """`ModeSwitch` over some of the modes of another, in their order."""

    def __init__(self, whole: ModeSwitch, modes: Sequence[str]) -> None:
        """Offer `modes` of `whole`."""
        assert set(modes) <= set(whole.modes), "costs are of modes that there are"
        self.tool, self.modes = whole.tool, tuple(modes)
        self._whole = whole

    def current(self) -> str | None:
        """See `ModeSwitch.current`."""
        name = self._whole.current()
        return name if name in self.modes else None

    def switch(self, mode: str) -> None:
        """See `ModeSwitch.switch`."""
        assert mode in self.modes, "costs and switch have the same modes"
        self._whole.switch(mode)

    def close(self) -> None:
        """See `ModeSwitch.close`."""
        self._whole.close()


def some_modes(switch: ModeSwitch, modes: Sequence[str]) -> ModeSwitch:
    """`switch` if it has these modes and no others, else one that has."""
    return switch if tuple(modes) == switch.modes else SomeModes(switch, modes)
