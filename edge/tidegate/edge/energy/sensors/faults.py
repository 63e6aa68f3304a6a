"""`Faults`: one line for what cannot be read, the same one for as long as it cannot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_LONGEST_LINE: Final = 400
_NUMBER: Final = re.compile(r"(?<![\w/:.-])-?[0-9]+(\.[0-9]+)?")
"""That stands by itself; those in the names of files say which fault it is."""


class Faults:
    """Keeps the words in which a fault was first told, though the numbers in it change."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def lines(self, faults: Iterable[str]) -> tuple[str, ...]:
        """The faults of one look, each once; what is no fault any more is forgotten."""
        now: dict[str, str] = {}
        for fault in faults:
            shape = _NUMBER.sub("#", fault)
            now.setdefault(shape, self._told.get(shape) or _line(fault))
        self._told = now
        return tuple(dict.fromkeys(now.values()))


def _line(fault: str) -> str:
    """One line for people, whatever stood in the files that it quotes."""
    shown = "".join(one if one.isprintable() else "?" for one in fault)
    return shown if len(shown) <= _LONGEST_LINE else shown[: _LONGEST_LINE - 3] + "..."
