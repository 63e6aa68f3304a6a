"""What breaks around the governor: modes, sensors, decisions, its own end. Nobody waits for it."""

from __future__ import annotations

import asyncio
import logging

import pytest
from governedboard import ToyBoard, World, asked, beside, energy_settings
from virtualtime import run_virtually

from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import Decision, PaceState, Weights


def test_a_refused_mode_is_a_fault_and_not_a_storm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        world = World(refused=frozenset({"knee"}))
        board = ToyBoard(world, settings=energy_settings())

        async def script() -> None:
            for number in range(20):
                await board.ask(asked(f"a{number}"), 50)
            view = board.governor.view()
            assert (world.mode, view.mode) == ("fast", "fast")
            assert 1 <= view.failed_switches < 5
            assert "knee is refused" in view.faults[0]
            world.refused = frozenset()
            await asyncio.sleep(31)
            await board.ask(asked("b"), 20)
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


def test_a_broken_scheduler_gives_back_who_may_not_wait_and_keeps_background_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        def record(pace: Pace, state: PaceState, decision: Decision) -> None:
            if any(one.id == "poison" for one in state.waiting):
                raise RuntimeError(state.waiting[-1].id)

        board = ToyBoard(World(), settings=energy_settings(), record=record)

        async def script() -> None:
            waits = asyncio.create_task(board.ask(asked("w", may_wait=True), 20))
            await asyncio.sleep(1)
            await board.ask(asked("poison"), 20)
            assert (board.placed, board.held) == ({"poison": None}, 1)
            await board.ask(asked("soon"), 20)
            assert board.placed["soon"] is None
            await asyncio.sleep(40)
            assert board.held == 1
            await board.ask(asked("later"), 20)
            await waits
            assert board.placed["later"] is not None
            assert board.placed["w"] is not None, "it rode along with the next"
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
        waits = asyncio.create_task(board.ask(asked("w", may_wait=True), 20))
        await asyncio.sleep(1)
        running.cancel()
        await asyncio.wait({running})
        await waits
        await board.ask(asked("late"), 20)
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
            await board.ask(asked("a"), 20)
            placement = board.placed["a"]
            assert placement is not None
            assert placement.place == "edge"
            assert board.governor.view().failures > 50
            world.broken = False
            await asyncio.sleep(5)
            assert board.governor.view().celsius == 45.0
            told = [line for line in caplog.messages if "looking at the board" in line]
            assert len(told) == 1
            world.broken = True
            await asyncio.sleep(5)
            told = [line for line in caplog.messages if "looking at the board" in line]
            assert len(told) == 2, "it was well in between"

        await beside(board, script())

    run_virtually(main())


def test_nobody_waits_for_ever_whatever_pace_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Pace, state: PaceState, *, explain: bool = False) -> Decision:
        return Decision(mode=state.mode)

    monkeypatch.setattr(Pace, "decide", silent)

    async def main() -> None:
        weights = Weights(longest_hold_s=100.0)
        board = ToyBoard(World(), settings=energy_settings(weights=weights))

        async def script() -> None:
            await asyncio.gather(
                board.ask(asked("a"), 20), board.ask(asked("b", may_wait=True), 20)
            )
            assert board.placed == {"a": None, "b": None}
            assert 60 <= board.ended_s["a"] < 70
            assert 160 <= board.ended_s["b"] < 170

        await beside(board, script())

    run_virtually(main())


def test_quiet_hours_of_a_whole_night_are_no_overdue_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silent(self: Pace, state: PaceState, *, explain: bool = False) -> Decision:
        return Decision(mode=state.mode)

    monkeypatch.setattr(Pace, "decide", silent)

    async def main() -> None:
        settings = energy_settings(quiet=("00:30", "08:00"))
        board = ToyBoard(World(), settings=settings)

        async def script() -> None:
            early = asyncio.create_task(board.ask(asked("early", may_wait=True), 20))
            await asyncio.sleep(4 * 3600)
            late = asyncio.create_task(board.ask(asked("late", may_wait=True), 20))
            await asyncio.gather(early, late)
            # To the end of the quiet hours, which began while one was held, and a minute.
            assert min(board.ended_s.values()) >= 8 * 3600 + 60
            assert max(board.ended_s.values()) < 8 * 3600 + 120

        await beside(board, script())

    run_virtually(main())
