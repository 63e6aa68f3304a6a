"""Side by side: pairs are of one seed, and an interval that holds the ratio."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tidegate.edge.energy.simulate.compare import Cell, paired, rows_of
from tidegate.errors import ConfigError

CELL = Cell(
    policy="pace",
    seed=1,
    requests=10,
    missed=1,
    unserved=0,
    offloaded=2,
    device_j=5.0,
    system_j=6.0,
    price=4.0,
    soft_s=0.0,
    hard_s=0.0,
    switches=3,
    hours=1.0,
)
CELLS = [
    replace(CELL, policy=policy, seed=seed, system_j=times * (6.0 + seed), price=times * 4.0)
    for seed in range(1, 21)
    for policy, times in (("pace", 1.0), ("edf", 1.5))
]


def test_a_ratio_that_every_seed_has_is_certain() -> None:
    found = paired(CELLS, "edf", "pace", lambda cell: cell.cost)
    assert found.ratio == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5)
    assert found.high == pytest.approx(1.5)


def test_seeds_that_differ_widen_the_interval_around_the_ratio() -> None:
    noisy = [
        replace(cell, system_j=cell.system_j * (1.3 if cell.seed % 2 else 0.8))
        if cell.policy == "edf"
        else cell
        for cell in CELLS
    ]
    found = paired(noisy, "edf", "pace", lambda cell: cell.cost)
    assert found.low < found.ratio < found.high
    assert found == paired(noisy, "edf", "pace", lambda cell: cell.cost)


def test_policies_that_ran_on_other_seeds_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="the same seeds"):
        paired(CELLS[:-1], "edf", "pace", lambda cell: cell.cost)


def test_rows_are_means_and_shares_and_stand_in_the_order_of_the_runs() -> None:
    first, second = rows_of(CELLS)
    assert (first.policy, second.policy) == ("pace", "edf")
    assert first.missed_share == pytest.approx(0.1)
    assert first.offloaded_share == pytest.approx(0.2)
    assert first.switches_per_h == pytest.approx(3.0)
    assert first.cost_over_pace is None
    assert second.cost_over_pace is not None
    assert first.lasted_share is None
    emptied = [replace(cell, battery_hours=0.5 if cell.seed == 1 else None) for cell in CELLS]
    assert rows_of(emptied)[0].lasted_share == pytest.approx(0.95)
