"""The governor on a small board in virtual time: it does what PACE says, and survives the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from itertools import pairwise
from pathlib import Path

import pytest
from energyboard import BOARD, CLOUD
from governedboard import ToyBoard, World, energy_settings, going
from virtualtime import run_virtually, virtual_now_s

from tidegate.edge.energy.governor import Placement
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.governor_trace import DecisionLog, read_decisions
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import Decision, PaceState, Weights
from tidegate.edge.energy.sensors.sample import BatteryState

DWELL_S = Weights().dwell_s


def ask(name: str, **changed: object) -> Ask:
    fields: dict[str, object] = {
        "id": name,
        "kind": "chat",
        "prompt_tokens": 50,
        "most_tokens": 200,
    }
    return Ask(**(fields | changed))  # type: ignore[arg-type]


async def beside(board: ToyBoard, script: Awaitable[None]) -> None:
    with going(board.governor.run(), board.engine()):
        await asyncio.sleep(0.01)
        await script


def test_a_lone_request_begins_at_once_and_is_told_what_it_took() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings())

        async def script() -> None:
            await asyncio.sleep(15)
            use = await board.ask(ask("a"), 20)
            placement = board.placed["a"]
            assert placement is not None
            assert placement.place == "edge"
            assert placement.reason.startswith("here: ")
            assert " J predicted in mode knee, no deadline" in placement.reason
            assert use is not None
            assert (use.scope, use.source) == ("board", "estimated")
            assert use.joules > 0
            assert board.ledger.forgotten == ["a"]
            assert board.governor.view().running == 0

        await beside(board, script())

    run_virtually(main())


def test_the_mode_goes_to_the_knee_for_work_and_to_the_idlest_after_it() -> None:
    async def main() -> None:
        world = World()
        board = ToyBoard(world, settings=energy_settings())

        async def script() -> None:
            await asyncio.sleep(15)
            await board.ask(ask("a"), 20)
            await asyncio.sleep(60)
            assert [mode for _, mode in world.taken] == ["slow", "knee", "slow"]
            assert board.governor.view().mode == "slow"
            assert board.governor.view().mode_reason.startswith("idle for")

        await beside(board, script())

    run_virtually(main())


def test_a_cancelled_caller_is_out_of_line_at_once() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings())

        async def script() -> None:
            waits = asyncio.create_task(board.ask(ask("a", may_wait=True), 20))
            await asyncio.sleep(1)
            assert board.held == 1
            waits.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert board.held == 0
            assert board.governor.view().running == 0

        await beside(board, script())

    run_virtually(main())


def test_the_next_prompt_begins_as_soon_as_the_one_before_it_is_computed() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings())

        async def script() -> None:
            callers = [asyncio.create_task(board.ask(ask(f"r{n}"), 100)) for n in range(4)]
            await asyncio.sleep(0.03)
            assert board.held == 3
            # Four prompts of 0.07 s each in the mode it begins in, and few tokens between them.
            await asyncio.sleep(0.47)
            assert (board.held, board.governor.view().running) == (0, 4)
            await asyncio.gather(*callers)

        await beside(board, script())

    run_virtually(main())


def test_background_work_waits_for_company_and_rides_along() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings())

        async def script() -> None:
            late = asyncio.create_task(board.ask(ask("late", may_wait=True), 20))
            await asyncio.sleep(100)
            assert board.held == 1
            await board.ask(ask("now"), 20)
            await late
            assert board.ended_s["late"] < 110

        await beside(board, script())

    run_virtually(main())


def test_background_work_is_held_in_quiet_hours_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        settings = energy_settings(quiet=("23:00", "00:10"))
        board = ToyBoard(World(), settings=settings)

        async def script() -> None:
            callers = [
                asyncio.create_task(board.ask(ask(f"b{number}", may_wait=True), 20))
                for number in range(5)
            ]
            await asyncio.sleep(300)
            assert board.held == 5
            assert board.governor.view().quiet
            await asyncio.gather(*callers)
            assert min(board.ended_s.values()) > 600

        await beside(board, script())

    run_virtually(main())
    told = [line for line in caplog.messages if "is held: quiet hours" in line]
    assert len(told) == 5


def test_private_requests_never_leave_and_a_debt_sends_the_others_away() -> None:
    async def main() -> None:
        world = World(battery=BatteryState(share=0.3, plugged=False, full_j=100_000.0))
        settings = energy_settings(until="23:59")
        board = ToyBoard(world, settings=settings, cloud=CLOUD)

        async def script() -> None:
            for number in range(40):
                await board.ask(ask(f"p{number}"), 100)
            assert board.governor.view().debt_j > 100
            await board.ask(ask("private"), 20)
            await board.ask(ask("open", may_leave=True), 20)
            placed = board.placed
            assert isinstance(placed["private"], Placement)
            assert placed["private"].place == "edge"
            assert isinstance(placed["open"], Placement)
            assert placed["open"].place == "cloud"
            assert " J owed" in placed["open"].reason
            world.link_up = False
            await asyncio.sleep(5)
            await board.ask(ask("offline", may_leave=True), 20)
            assert isinstance(placed["offline"], Placement)
            assert placed["offline"].place == "edge"
            world.battery = BatteryState(share=0.3, plugged=True)
            await asyncio.sleep(5)
            assert board.governor.view().debt_j == 0
            assert board.governor.view().plan is None

        await beside(board, script())

    run_virtually(main())


def test_unplugging_makes_a_plan_at_once() -> None:
    async def main() -> None:
        world = World(battery=BatteryState(share=0.9, plugged=True, full_j=100_000.0))
        board = ToyBoard(world, settings=energy_settings(until="06:00"))

        async def script() -> None:
            running = asyncio.create_task(board.ask(ask("a", most_tokens=2000), 1000))
            await asyncio.sleep(10)
            assert board.governor.view().plan is None
            world.battery = BatteryState(share=0.9, plugged=False, full_j=100_000.0)
            await asyncio.sleep(0.5)
            plan = board.governor.view().plan
            assert plan is not None
            assert plan.reserve_j == pytest.approx(20_000)
            running.cancel()

        await beside(board, script())

    run_virtually(main())


def test_heat_caps_the_modes() -> None:
    async def main() -> None:
        world = World(celsius=84.6)
        board = ToyBoard(world, settings=energy_settings())

        async def script() -> None:
            await asyncio.sleep(3)
            hurried = ask("a", deadline_s=virtual_now_s() + 1.0)
            await board.ask(hurried, 50)
            assert world.mode == "slow"
            world.celsius = 45.0
            await asyncio.sleep(30)
            await board.ask(ask("b", deadline_s=virtual_now_s() + 1.0), 50)
            assert "fast" in [mode for _, mode in world.taken]

        await beside(board, script())

    run_virtually(main())


def test_a_refused_mode_is_a_fault_and_not_a_storm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        world = World(refused=frozenset({"knee"}))
        board = ToyBoard(world, settings=energy_settings())

        async def script() -> None:
            for number in range(20):
                await board.ask(ask(f"a{number}"), 50)
            view = board.governor.view()
            assert (world.mode, view.mode) == ("fast", "fast")
            assert 1 <= view.failed_switches < 5
            assert "knee is refused" in view.faults[0]
            world.refused = frozenset()
            await asyncio.sleep(31)
            await board.ask(ask("b"), 20)
            assert board.governor.view().faults == ()

        await beside(board, script())

    run_virtually(main())


def test_a_mode_that_another_has_set_is_seen() -> None:
    async def main() -> None:
        world = World()
        board = ToyBoard(world, settings=energy_settings())

        async def script() -> None:
            await asyncio.sleep(60)
            assert board.governor.view().mode == "slow"
            world.mode = "fast"
            await asyncio.sleep(61)
            # It was seen, and the idlest mode taken again after the dwell.
            await asyncio.sleep(20)
            assert world.taken[-1][1] == "slow"
            assert len(world.taken) == 2

        await beside(board, script())

    run_virtually(main())


def test_a_broken_scheduler_gives_everybody_back_to_the_clock(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        def record(pace: Pace, state: PaceState, decision: Decision) -> None:
            if any(one.id == "poison" for one in state.waiting):
                raise RuntimeError(state.waiting[-1].id)

        board = ToyBoard(World(), settings=energy_settings(), record=record)

        async def script() -> None:
            waits = asyncio.create_task(board.ask(ask("w", may_wait=True), 20))
            await asyncio.sleep(1)
            await board.ask(ask("poison"), 20)
            await waits
            assert board.placed == {"poison": None, "w": None}
            await board.ask(ask("soon"), 20)
            assert board.placed["soon"] is None
            await asyncio.sleep(40)
            await board.ask(ask("later"), 20)
            assert board.placed["later"] is not None
            assert board.governor.view().failures == 1

        await beside(board, script())

    run_virtually(main())
    assert len([line for line in caplog.messages if "RuntimeError" in line]) == 1
    assert "poison" not in " ".join(caplog.messages[:1])


def test_nobody_is_held_and_no_mode_taken_once_it_has_ended() -> None:
    async def main() -> None:
        world = World()
        board = ToyBoard(world, settings=energy_settings())
        running = asyncio.create_task(board.governor.run())
        engine = asyncio.create_task(board.engine())
        await asyncio.sleep(1)
        waits = asyncio.create_task(board.ask(ask("w", may_wait=True), 20))
        await asyncio.sleep(1)
        running.cancel()
        await asyncio.wait({running})
        await waits
        await board.ask(ask("late"), 20)
        assert board.placed == {"w": None, "late": None}
        await asyncio.sleep(60)
        assert world.taken == []
        engine.cancel()

    run_virtually(main())


def test_a_panel_that_raises_is_said_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        world = World(broken=True)
        board = ToyBoard(world, settings=energy_settings())

        async def script() -> None:
            await asyncio.sleep(100)
            assert await board.ask(ask("a"), 20) is None or board.placed["a"] is not None
            assert board.governor.view().failures > 50
            world.broken = False
            await asyncio.sleep(5)
            assert board.governor.view().celsius == 45.0

        await beside(board, script())

    run_virtually(main())
    assert len([line for line in caplog.messages if "looking at the board" in line]) == 1


def test_nobody_waits_for_ever_whatever_pace_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Pace, state: PaceState, *, explain: bool = False) -> Decision:
        return Decision(mode=state.mode)

    monkeypatch.setattr(Pace, "decide", silent)

    async def main() -> None:
        weights = Weights(longest_hold_s=100.0)
        board = ToyBoard(World(), settings=energy_settings(weights=weights))

        async def script() -> None:
            await asyncio.gather(board.ask(ask("a"), 20), board.ask(ask("b", may_wait=True), 20))
            assert board.placed == {"a": None, "b": None}
            assert 60 <= board.ended_s["a"] < 70
            assert 160 <= board.ended_s["b"] < 170

        await beside(board, script())

    run_virtually(main())


def test_explaining_changes_nothing_and_names_the_terms() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings(), cloud=CLOUD)

        async def script() -> None:
            await asyncio.sleep(2)
            before = board.governor.view()
            told = board.governor.explain(ask("x", may_leave=True, deadline_s=virtual_now_s() + 9))
            assert told is not None
            terms = told["terms"]
            assert isinstance(terms, dict)
            assert set(terms) == {"local_j", "cloud_j", "late_local_s", "late_cloud_s"}
            assert terms["local_j"] < terms["cloud_j"]
            assert told["route"] == "edge"
            closed = board.governor.explain(ask("y"))
            assert closed is not None
            assert isinstance(closed["terms"], dict)
            assert closed["terms"]["cloud_j"] is None
            after = board.governor.view()
            assert (after.decisions, after.held) == (before.decisions, 0)

        await beside(board, script())

    run_virtually(main())


# A scripted day


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
        one = ask(
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
    """A slower mode never follows before the dwell, unless the limit of heat says so."""
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
