"""Whole histories on a virtual clock: whatever is lost, repeated or killed, one answer each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from linkworld import Weather, World

from tidegate.link.fleet import pair

SEEDS = 25
"""Histories of four requests per kind of weather here; the reliability bench runs thousands."""

CALM = Weather()
LOSSY = Weather(drop=0.2, duplicate=0.1, reorder=0.1, corrupt=0.05)
OUTAGES = Weather(drop=0.02, outage_every_s=8.0)
DEVICE_DIES = Weather(drop=0.02, device_crash_every_s=4.0)
GATEWAY_DIES = Weather(drop=0.02, gateway_crash_every_s=4.0)
EVERYTHING = Weather(
    drop=0.1,
    duplicate=0.1,
    reorder=0.1,
    corrupt=0.05,
    outage_every_s=15.0,
    device_crash_every_s=10.0,
    gateway_crash_every_s=10.0,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fleet")
    pair(root / "device", root / "gateway")
    return root


def play(seed: int, weather: Weather, fleet: Path, scratch: Path) -> World:
    """One history of four requests; checks that each is answered exactly once and whole."""
    world = World(seed, weather, fleet, scratch)
    try:
        for payloads in (0, 1, 12, 60):
            world.after(world.rng.uniform(0.0, 20.0), partial(world.ask, payloads))
        world.run(4, until_s=900.0)
        assert len(world.expected) == 4
        assert world.results == world.expected, f"seed {seed}"
    finally:
        world.close()
    return world


def test_in_calm_weather_everything_runs_and_is_sent_once(fleet: Path, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        world = play(seed, CALM, fleet, tmp_path)
        assert set(world.runs.values()) == {1}
        assert world.device is not None
        counters = world.device.tally.snapshot()
        assert (counters.resends, counters.duplicates, counters.dropped) == (0, 0, 0)


@pytest.mark.parametrize(
    "weather",
    [LOSSY, OUTAGES, DEVICE_DIES, GATEWAY_DIES, EVERYTHING],
    ids=["lossy", "outages", "device-dies", "gateway-dies", "everything"],
)
def test_every_request_is_answered_exactly_once(
    weather: Weather, fleet: Path, tmp_path: Path
) -> None:
    for seed in range(SEEDS):
        play(seed, weather, fleet, tmp_path)


def test_a_request_runs_once_while_the_gateway_lives(fleet: Path, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        world = play(seed, LOSSY, fleet, tmp_path)
        assert set(world.runs.values()) == {1}


def test_two_runs_that_differ_are_never_spliced(fleet: Path, tmp_path: Path) -> None:
    codes: list[str] = []
    for seed in range(SEEDS):
        world = World(seed, GATEWAY_DIES, fleet, tmp_path, diverging=True)
        try:
            for payloads in (0, 1, 12, 60):
                world.after(world.rng.uniform(0.0, 20.0), partial(world.ask, payloads))
            world.run(4, until_s=900.0)
        finally:
            world.close()
        assert len(world.results) + len(world.failures) == 4
        for request_id, result in world.results.items():
            # The last payload of a run may differ, and then that of another run stands for it.
            runs = [said[: len(result)] for said in world.said[request_id]]
            assert any(said == result or said[:-1] == result[:-1] for said in runs), f"seed {seed}"
        codes += world.failures.values()
    assert set(codes) == {"answer_diverged"}
