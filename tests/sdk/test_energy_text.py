"""Joules as people read them."""

from __future__ import annotations

import pytest

from tidegate.cli.energy_text import energy_text, joules_text
from tidegate.engine.events import EnergyUse


@pytest.mark.parametrize(
    ("joules", "told"),
    [
        (0, "0 J"),
        (4.2e-5, "42.0 uJ"),
        (0.0009999, "1.00 mJ"),
        (0.31, "310 mJ"),
        (0.99996, "1.00 J"),
        (1.254, "1.25 J"),
        (99.96, "100 J"),
        (999.6, "1.00 kJ"),
        (12_345, "12.3 kJ"),
        (3.6e6, "3.60 MJ"),
        (-2.5, "-2.50 J"),
    ],
)
def test_joules_have_three_digits_and_a_unit_that_fits(joules: float, told: str) -> None:
    assert joules_text(joules) == told


def test_joules_of_a_request_come_with_what_they_cover_and_how_they_are_known() -> None:
    use = EnergyUse(joules=1.25, scope="board", source="estimated")
    assert energy_text(use) == "1.25 J (board, estimated)"
    assert energy_text(None) == "-"
