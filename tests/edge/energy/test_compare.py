"""Side by side: pairs are of one seed, and an interval that holds the ratio."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.simulate.boards import ASSUMED, GPU_CLOUD, WIFI, costs_of
from tidegate.edge.energy.simulate.compare import Cell, Scene, missed_more, paired, rows_of
from tidegate.edge.energy.simulate.families import FAMILIES
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


def test_misses_are_compared_by_their_difference() -> None:
    later = [
        replace(cell, missed=cell.missed + 2) if cell.policy == "edf" else cell for cell in CELLS
    ]
    found = missed_more(later, "edf", "pace")
    assert found.ratio == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2)
    assert found.high == pytest.approx(0.2)
    assert missed_more(later, "pace", "edf").ratio == pytest.approx(-0.2)


SCENE = Scene(
    costs=costs_of(read_library().profile("raspberry-pi-5"), ASSUMED["raspberry-pi-5"]),
    assumed=ASSUMED["raspberry-pi-5"],
    radio=WIFI,
    cloud=GPU_CLOUD,
    kind="home",
    requests=20,
    utilisation=None,
)


def test_a_trace_keeps_its_own_times_or_is_stretched_to_a_load() -> None:
    recorded = SCENE.jobs(1)
    own = FAMILIES["home"](20, 1)
    gaps = [one.at_s - own[0].at_s for one in own]
    assert [job.arrives_s for job in recorded] == pytest.approx(gaps)
    loaded = replace(SCENE, utilisation=0.5).jobs(1)
    assert loaded[-1].arrives_s < recorded[-1].arrives_s
    assert SCENE.pace_told == "at the times of the trace"


def test_the_network_is_gone_for_the_share_that_a_scene_says() -> None:
    jobs = SCENE.jobs(1)
    assert SCENE.setup(jobs).outages == []
    spans = replace(SCENE, offline_share=0.2).setup(jobs).outages
    assert sum(end - start for start, end in spans) == pytest.approx(0.2 * jobs[-1].arrives_s)
    assert all(end < start for (_, end), (start, _) in pairwise(spans))
    with pytest.raises(ConfigError, match=r"offline_share = 1"):
        replace(SCENE, offline_share=1.0).setup(jobs)


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
