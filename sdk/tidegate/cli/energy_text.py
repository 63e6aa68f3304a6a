"""Joules for people: never without what they cover and how they are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tidegate.engine.events import EnergyUse

_PREFIXES: Final = ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"))


def joules_text(joules: float) -> str:
    """Three digits and a unit that fits, as `1.25 J` or `310 mJ`; below 1 mJ in uJ."""
    for one, unit in _PREFIXES:
        if abs(joules) >= 0.9995 * one:
            return f"{_three_digits(joules / one)} {unit}"
    return f"{_three_digits(joules * 1e6)} uJ" if joules else "0 J"


def energy_text(use: EnergyUse | None) -> str:
    """`1.25 J (board, measured)`; `-` where nobody knows."""
    return "-" if use is None else f"{joules_text(use.joules)} ({use.scope}, {use.source})"


def energy_lines(use: EnergyUse | None) -> str:
    """The same in two lines, for a narrow column."""
    return "-" if use is None else f"{joules_text(use.joules)}\n{use.scope}, {use.source}"


def _three_digits(value: float) -> str:
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{decimals}f}"
