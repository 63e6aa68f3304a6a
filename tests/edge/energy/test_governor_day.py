"""A scripted day: what the daemon does is what the pure function says, state for state."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from pathlib import Path

import pytest
from energyboard import BOARD, CLOUD
from governedboard import ToyBoard, World, asked, beside, energy_settings
from virtualtime import run_virtually, virtual_now_s

from tidegate.edge.energy.governor_trace import DecisionLog, read_decisions
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import Decision, PaceState, Weights
from tidegate.edge.energy.sensors.sample import BatteryState

DWELL_S = Weights().dwell_s


async def _day(board: ToyBoard) -> None:
    """Battery draining, heat rising, the plug pulled and put back, the link gone for a while."""
    world = board.world
    callers = []
    for second in range(0, 900, 3):
        plugged = not 100 <= second < 700
        share = 0.30 - second / 10_000
        world.battery = BatteryState(share=share, plugged=plugged, full_j=100_000.0)
        world.celsius = 45 + 40 * max(0.0, 1 - abs(second - 450) / 200)
        world.link_up = not 300 <= second < 400
        number = second // 3
        deadline_s = virtual_now_s() + 12 if number % 4 == 0 else float("inf")
        one = asked(
            f"r{number}",
            may_leave=number % 3 != 0,
            may_wait=number % 5 == 4,
            deadline_s=deadline_s,
            prompt_tokens=20 + number % 7 * 40,
        )
        callers.append(asyncio.create_task(board.ask(one, 20 + number % 11 * 12)))
        await asyncio.sleep(3)
    await asyncio.gather(*callers)
    await asyncio.sleep(30)


def test_through_a_scripted_day_the_daemon_does_what_the_pure_function_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "decisions.jsonl"
    board_of: list[ToyBoard] = []

    async def main() -> None:
        settings = energy_settings(until="00:20", quiet=("00:11", "00:13"))
        log = DecisionLog(path)
        board = ToyBoard(World(), settings=settings, cloud=CLOUD, record=log)
        board_of.append(board)
        await beside(board, _day(board))
        log.close()

    run_virtually(main())
    (board,) = board_of
    decided = list(read_decisions(path))
    assert len(decided) > 300
    # The same function on the same states, read back from the file, decides the same.
    for pace, state, decision in decided:
        assert pace.decide(state) == decision
    # What was decided is what was done: routes,
    starts = {name for _, _, one in decided for name in one.start}
    leaves = {name for _, _, one in decided for name in one.offload}
    places = {name: one.place for name, one in board.placed.items() if one is not None}
    assert starts == {name for name, place in places.items() if place == "edge"}
    assert leaves == {name for name, place in places.items() if place == "cloud"}
    assert starts | leaves == set(board.placed)
    assert starts
    assert leaves
    # modes, each as decided just before it was taken,
    names = [mode.name for mode in BOARD.modes]
    for at_s, mode in board.world.taken:
        last = [one for _, state, one in decided if state.now_s <= at_s][-1]
        assert names[last.mode] == mode
    # and the states were those of the script.
    assert {state.link_up for _, state, _ in decided} == {True, False}
    assert any(state.energy_debt_j > 0 for _, state, _ in decided)
    assert all(state.energy_debt_j == 0 for _, state, _ in decided if state.now_s < 99)
    assert any(state.fastest is not None for _, state, _ in decided)
    assert any(state.quiet_until_s > state.now_s for _, state, _ in decided)
    _no_flapping(board, decided)
    _each_change_is_logged_once(board, caplog.messages)


def _no_flapping(board: ToyBoard, decided: list[tuple[Pace, PaceState, Decision]]) -> None:
    """A slower mode never follows before the dwell, unless the limit of heat says so: seldom."""
    names = [mode.name for mode in BOARD.modes]
    taken = [(at_s, names.index(mode)) for at_s, mode in board.world.taken]
    assert len({mode for _, mode in taken}) == 3
    for (then_s, old), (now_s, new) in pairwise(taken):
        capped = any(
            state.fastest is not None and state.fastest < old
            for _, state, _ in decided
            if abs(state.now_s - now_s) < 0.5
        )
        assert new > old or now_s - then_s >= DWELL_S - 1e-6 or capped
    early = [
        now
        for then, now in pairwise(taken)
        if now[1] < then[1] and now[0] - then[0] < DWELL_S - 1e-6
    ]
    assert len(early) < len(names), "in one hot spell each mode is taken off early but once"
    # Nor does the limit itself flap: modes are taken off at once, and given back after the dwell.
    caps = [
        (state.now_s, BOARD.fastest if state.fastest is None else state.fastest)
        for _, state, _ in decided
    ]
    changes = [(*now, then[1]) for then, now in pairwise(caps) if then[1] != now[1]]
    assert 2 <= len(changes) <= 6
    for (then_s, _, _), (now_s, new, old) in pairwise(changes):
        assert new < old or now_s - then_s >= DWELL_S - 0.5


def _each_change_is_logged_once(board: ToyBoard, lines: list[str]) -> None:
    modes = [line for line in lines if "power mode" in line]
    assert len(modes) == len(board.world.taken)
    assert all(line.partition(": ")[2].count(": ") == 1 for line in modes)
    for name, placement in board.placed.items():
        assert placement is not None
        told = [line for line in lines if line.endswith(f"request {name}: {placement.reason}")]
        assert len(told) == 1
        assert len([line for line in lines if f"request {name} is held: " in line]) <= 1
    assert any("is held" in line for line in lines)
    assert any("batch 0 -> " in line for line in lines)
    assert sum("the cloud is out of reach" in line for line in lines) == 1
