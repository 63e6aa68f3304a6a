"""Limits of heat over minutes: none passed, none flapping, and none lost with the thermometer."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from energyboard import BOARD
from governedboard import ToyBoard, World, energy_settings, going
from virtualtime import run_virtually, virtual_now_s

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.governor_heat import BLIND_S, HeatWatch, poles_of
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.heat import Heat, HeatPole
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.sensors.sample import Sample

WATTS = (8.0, 15.0, 24.0)
COSTS = CostModel(
    modes=tuple(
        replace(mode, prefill_w=watts, decode_w=watts, idle_w=5.0)
        for mode, watts in zip(BOARD.modes, WATTS, strict=True)
    ),
    rows=4,
    scope="module",
    source="calibrated",
)
POLES = (HeatPole(r_kw=1.0, tau_s=5.0), HeatPole(r_kw=2.0, tau_s=120.0))


def seen(
    celsius: float | None,
    at_s: float,
    *,
    watts: float = 10.0,
    soft_c: float | None = 80.0,
    hard_c: float | None = 95.0,
) -> Sample:
    return Sample(
        at_s=at_s,
        joules=0.0,
        watts=watts,
        scope="module",
        kind="measured",
        celsius=celsius,
        soft_c=soft_c,
        hard_c=hard_c,
    )


def test_a_heatsink_that_the_profile_does_not_know_is_neither_overheated_nor_flaps() -> None:
    profile = read_library().profile("jetson-orin-nano-8gb-super")
    poles = poles_of(profile.thermal)
    assert [pole.tau_s for pole in poles] == [5.0], "the profile knows the die alone"
    watch = HeatWatch(poles)
    heat = Heat.settled((*poles, HeatPole(r_kw=2.2, tau_s=150.0)), 35.0, 5.0)
    mode, changes, rests = 2, 0, []
    for quarter in range(4800):  # 20 minutes, in which nothing but the limit spares the board
        sample = seen(heat.now_c, quarter / 4, watts=WATTS[mode])
        outlook = watch.see(sample, COSTS)
        wanted = 2 if outlook.fastest is None else outlook.fastest
        changes += wanted != mode
        mode = wanted
        assert heat.now_c < 95
        if quarter > 400:
            rests.append(outlook.rest_k + 80 - heat.after(0.0, 20.0).now_c)
        heat = heat.after(WATTS[mode], 0.25)
    assert changes <= 20 * 60 / 10
    # What is predicted of the board let go is somewhat too warm: the heatsink cools as well.
    assert all(-1 < rest_k < 15 for rest_k in rests)


def test_noise_at_the_predicted_limit_switches_nothing() -> None:
    watch = HeatWatch(POLES)
    caps = []
    for quarter in range(400):
        celsius = 84.0 + (1.0 if quarter % 2 else -1.0)
        caps.append(watch.see(seen(celsius, quarter / 4, watts=15.0), COSTS).fastest)
    assert caps[-1] is not None
    assert sum(a != b for a, b in pairwise(caps)) <= 4


def test_what_the_poles_do_not_explain_is_not_predicted_to_be_gone() -> None:
    watch = HeatWatch((HeatPole(r_kw=0.66, tau_s=5.0),))
    for second in range(60):
        outlook = watch.see(seen(88.0, float(second), watts=10.0), COSTS)
    assert outlook.rest_k == pytest.approx(88 - 6.6 - 80, abs=0.2)


@pytest.mark.parametrize("celsius", [(94.2, 93.8), (94.2, 92.0)])
def test_a_hard_limit_alone_does_not_flap(celsius: tuple[float, float]) -> None:
    watch = HeatWatch(())
    caps = [
        watch.see(seen(celsius[half % 2], half / 2, soft_c=None), BOARD).fastest
        for half in range(40)
    ]
    assert caps == [0] * 40
    # Cooled down, modes come back one by one.
    caps = [watch.see(seen(80.0, 20.0 + s, soft_c=None), BOARD).fastest for s in range(30)]
    assert [cap for cap, before in zip(caps[1:], caps, strict=False) if cap != before] == [None]
    assert 1 in caps


@pytest.mark.parametrize("gone", [None, math.nan])
@pytest.mark.parametrize("poles", [POLES, ()])
def test_an_unreadable_thermometer_takes_no_limit_away(
    gone: float | None, poles: tuple[HeatPole, ...]
) -> None:
    watch = HeatWatch(poles)
    assert watch.see(seen(gone, 0.0), COSTS).fastest is None, "none was ever read"
    watch.see(seen(94.5, 1.0), COSTS)
    for second in range(2, 62):
        assert watch.see(seen(gone, float(second)), COSTS).fastest == 0
        assert watch.fault is None
    assert watch.see(seen(gone, 62.0), COSTS).fastest == 0
    assert watch.fault is not None
    assert "no temperature could be read for 60 s" in watch.fault
    assert "above slow is taken" in watch.fault
    watch.see(seen(40.0, 63.0), COSTS)
    assert watch.fault is None


def test_a_cool_board_that_is_not_read_any_more_goes_no_faster_than_its_knee() -> None:
    watch = HeatWatch(POLES)
    assert watch.see(seen(40.0, 0.0), BOARD).fastest is None
    assert watch.see(seen(None, BLIND_S), BOARD).fastest is None
    assert watch.see(seen(None, BLIND_S + 1), BOARD).fastest == BOARD.knee
    unlimited = HeatWatch(POLES)
    unlimited.see(seen(40.0, 0.0, soft_c=None, hard_c=None), BOARD)
    assert unlimited.see(seen(None, 90.0), BOARD).fastest is None


def test_modes_are_taken_seldom_at_the_limit_and_none_faster_while_the_sensor_is_gone() -> None:
    async def main() -> None:
        world = World(celsius=94.0, soft_c=None, hard_c=95.0)
        board = ToyBoard(world, settings=energy_settings(), poles=())

        def ask(name: str) -> Ask:
            deadline_s = virtual_now_s() + 12
            return Ask(
                id=name, kind="chat", prompt_tokens=50, most_tokens=900, deadline_s=deadline_s
            )

        async def callers() -> None:
            for number in range(8):
                await board.ask(ask(f"a{number}"), 200)

        with going(board.governor.run(), board.engine(), callers()):
            await asyncio.sleep(3)
            for half in range(40):
                world.celsius = 94.2 if half % 2 else 93.8
                await asyncio.sleep(0.5)
            assert len(world.taken) <= 3
            assert world.mode == "slow"
            world.celsius = None
            before = len(world.taken)
            await asyncio.sleep(20)
            assert world.taken[before:] == []
            await asyncio.sleep(60)
            assert any("no temperature" in fault for fault in board.governor.view().faults)

    run_virtually(main())
