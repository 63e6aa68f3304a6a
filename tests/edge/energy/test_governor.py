"""The governor on a small board in virtual time: it does what PACE says."""

from __future__ import annotations

import asyncio
import logging

import pytest
from energyboard import CLOUD, RADIO
from governedboard import KnownCosts, ToyBoard, World, asked, beside, energy_settings
from virtualtime import run_virtually, virtual_now_s

from tidegate.edge.energy.governor_line import Placement
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.engine.request import RequestId


def test_a_lone_request_begins_at_once_and_is_told_what_it_took() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings())

        async def script() -> None:
            await asyncio.sleep(15)
            use = await board.ask(asked("a"), 20)
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
            await board.ask(asked("a"), 20)
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
            waits = asyncio.create_task(board.ask(asked("a", may_wait=True), 20))
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
            callers = [asyncio.create_task(board.ask(asked(f"r{n}"), 100)) for n in range(4)]
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
            late = asyncio.create_task(board.ask(asked("late", may_wait=True), 20))
            await asyncio.sleep(100)
            assert board.held == 1
            await board.ask(asked("now"), 20)
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
                asyncio.create_task(board.ask(asked(f"b{number}", may_wait=True), 20))
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


def test_a_night_of_quiet_hours_holds_background_work_and_keeps_nothing_awake() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings(quiet=("23:00", "08:00")))

        async def script() -> None:
            callers = [
                asyncio.create_task(board.ask(asked(f"b{number}", may_wait=True), 20))
                for number in range(4)
            ]
            await asyncio.sleep(3600)
            decided, looked = board.governor.view().decisions, board.panel.samples
            await asyncio.sleep(3600)
            assert board.held == 4
            assert board.governor.view().decisions - decided <= 70  # one a minute
            assert board.panel.samples - looked <= 3700  # one a second, as when idle
            await asyncio.gather(*callers)
            placed = board.placed.values()
            assert all(one is not None and one.place == "edge" for one in placed)
            assert min(board.ended_s.values()) >= 8 * 3600
            assert max(board.ended_s.values()) < 8 * 3600 + 120

        await beside(board, script())

    run_virtually(main())


def test_what_leaves_after_it_was_begun_here_tells_the_two_parts_apart() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings(), cloud=CLOUD, books=True)
        assert board.device.cloud is not None
        board.device.cloud.radio = RADIO

        async def script() -> None:
            await asyncio.sleep(15)
            accounts, one = board.governor.accounts, asked("a", most_tokens=30)
            told = board.device.ledger.use_of
            running = asyncio.create_task(board.ask(one, 30))
            await asyncio.sleep(1)
            here = told(RequestId("a"))
            away = accounts.ended_away(one, 10, took_s=1.0, decode_s=0.5)
            assert here is not None
            assert away is not None
            assert (here.scope, away.scope) == ("board", "radio")
            assert away.joules == board.device.ledger.totals()["radio", "estimated", "cloud"]
            await running

        await beside(board, script())

    run_virtually(main())


def test_every_step_is_told_to_the_costs_and_the_ledger_knows_who_runs() -> None:
    async def main() -> None:
        world = World()
        board = ToyBoard(world, settings=energy_settings(), books=True)
        costs, ledger = board.device.costs, board.device.ledger
        assert isinstance(costs, KnownCosts)

        async def script() -> None:
            await asyncio.sleep(15)
            running = asyncio.create_task(board.ask(asked("a"), 40))
            await asyncio.sleep(0.5)
            assert ledger.working()
            world.celsius = 84.6
            await running
            assert not ledger.working()
            # The step in which the slowest mode was taken, for the heat, was in no one mode.
            assert costs.skipped >= 1
            assert costs.observed + costs.skipped == 40

        await beside(board, script())

    run_virtually(main())


def test_private_requests_never_leave_and_a_debt_sends_the_others_away() -> None:
    async def main() -> None:
        world = World(battery=BatteryState(share=0.3, plugged=False, full_j=100_000.0))
        settings = energy_settings(until="23:59")
        board = ToyBoard(world, settings=settings, cloud=CLOUD)

        async def script() -> None:
            for number in range(40):
                await board.ask(asked(f"p{number}"), 100)
            assert board.governor.view().debt_j > 100
            await board.ask(asked("private"), 20)
            await board.ask(asked("open", may_leave=True), 20)
            placed = board.placed
            assert isinstance(placed["private"], Placement)
            assert placed["private"].place == "edge"
            assert isinstance(placed["open"], Placement)
            assert placed["open"].place == "cloud"
            assert " J owed" in placed["open"].reason
            world.link_up = False
            await asyncio.sleep(5)
            await board.ask(asked("offline", may_leave=True), 20)
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
            running = asyncio.create_task(board.ask(asked("a", most_tokens=2000), 1000))
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
            hurried = asked("a", deadline_s=virtual_now_s() + 1.0)
            await board.ask(hurried, 50)
            assert world.mode == "slow"
            world.celsius = 45.0
            await asyncio.sleep(30)
            await board.ask(asked("b", deadline_s=virtual_now_s() + 1.0), 50)
            assert "fast" in [mode for _, mode in world.taken]

        await beside(board, script())

    run_virtually(main())


def test_explaining_changes_nothing_and_names_the_terms() -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings(), cloud=CLOUD)

        async def script() -> None:
            await asyncio.sleep(2)
            before = board.governor.view()
            told = board.governor.explain(
                asked("x", may_leave=True, deadline_s=virtual_now_s() + 9)
            )
            assert told is not None
            terms = told["terms"]
            assert isinstance(terms, dict)
            assert set(terms) == {"local_j", "cloud_j", "late_local_s", "late_cloud_s"}
            assert terms["local_j"] < terms["cloud_j"]
            assert told["route"] == "edge"
            closed = board.governor.explain(asked("y"))
            assert closed is not None
            assert isinstance(closed["terms"], dict)
            assert closed["terms"]["cloud_j"] is None
            after = board.governor.view()
            assert (after.decisions, after.held) == (before.decisions, 0)

        await beside(board, script())

    run_virtually(main())
