"""What `/route/explain` says of a call, beside what its answer then says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from energyboard import BOARD, CLOUD
from governedboard import ToyBoard, World, energy_settings, going
from virtualtime import run_virtually, virtual_now_s

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.governor_words import why_away, why_here
from tidegate.edge.energy.pace_state import Decision, PaceState, Waiting

NO_WATTS = replace(
    BOARD,
    scope="unknown",
    modes=tuple(replace(mode, prefill_w=0.0, decode_w=0.0, idle_w=0.0) for mode in BOARD.modes),
)


def ask(*, may_leave: bool = False, within_s: float = float("inf")) -> Ask:
    return Ask(
        id="a",
        kind="chat",
        prompt_tokens=50,
        most_tokens=200,
        may_leave=may_leave,
        deadline_s=virtual_now_s() + within_s,
    )


def on_a_board(costs: CostModel, script: Callable[[ToyBoard], Awaitable[None]]) -> None:
    async def main() -> None:
        board = ToyBoard(World(), settings=energy_settings(), costs=costs, cloud=CLOUD)
        with going(board.governor.run(), board.engine()):
            await asyncio.sleep(15)
            await script(board)

    run_virtually(main())


@pytest.mark.parametrize("costs", [BOARD, NO_WATTS], ids=["watts", "no watts"])
@pytest.mark.parametrize("within_s", [float("inf"), 20.0, 2.0])
@pytest.mark.parametrize("may_leave", [False, True])
def test_an_explanation_has_the_place_and_the_words_of_the_answer(
    costs: CostModel, within_s: float, may_leave: bool
) -> None:
    async def script(board: ToyBoard) -> None:
        one = ask(may_leave=may_leave, within_s=within_s)
        told = board.governor.explain(one)
        assert told is not None
        await board.ask(one, 20)
        placement = board.placed["a"]
        assert placement is not None
        assert (told["route"], told["reason"]) == (placement.place, placement.reason)

    on_a_board(costs, script)


@pytest.mark.parametrize("costs", [BOARD, NO_WATTS], ids=["watts", "no watts"])
def test_joules_of_the_device_are_named_only_where_watts_are_known(costs: CostModel) -> None:
    async def script(board: ToyBoard) -> None:
        told = board.governor.explain(ask())
        assert told is not None
        terms = told["terms"]
        assert isinstance(terms, dict)
        known = costs is BOARD
        assert (terms["local_j"] is not None) == known
        assert terms["cloud_j"] is None
        why = "least joules per token" if known else "the fastest: no watts are known"
        assert told["mode_reason"] == why

    on_a_board(costs, script)


def test_a_deadline_that_has_passed_is_said_to_have_passed() -> None:
    late = Waiting(
        id="a",
        prompt_tokens=50,
        output_mean=20.0,
        output_p90=40.0,
        output_most=60.0,
        arrived_s=5.0,
        deadline_s=9.75,
    )
    state = PaceState(now_s=10.0, mode=1, mode_since_s=0.0, waiting=[late], running=[])
    decision = Decision(mode=1, start=("a",), reason="only way")
    assert "predicted in mode knee, its deadline was 0.25 s ago, held 5.0 s" in why_here(
        late, decision, state, BOARD
    )
    assert why_away(late, state, BOARD, CLOUD, None).endswith("its deadline was 0.25 s ago")
