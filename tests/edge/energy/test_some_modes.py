"""A switch of some modes offers these alone, and leaves the board as the whole one does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from energyboard import BOARD
from timedboard import TimedBoard

from tidegate.edge.energy.governor_modes import ModeKeeper
from tidegate.edge.energy.some_modes import some_modes

T = TypeVar("T")


def at_once(work: Callable[[], T]) -> Awaitable[T]:
    """Run it here."""

    async def run() -> T:
        return work()

    return run()


def test_only_the_modes_that_are_kept_are_offered_and_taken() -> None:
    board = TimedBoard(costs=BOARD)
    assert some_modes(board, ["slow", "knee", "fast"]) is board
    some = some_modes(board, ["slow", "fast"])
    assert (some.modes, some.tool) == (("slow", "fast"), board.tool)
    board.switch("knee")
    assert some.current() is None
    some.switch("fast")
    assert some.current() == board.current() == "fast"
    with pytest.raises(AssertionError, match="same modes"):
        some.switch("knee")
    some.close()
    assert board.closed


def test_a_board_in_a_mode_that_was_left_out_is_taken_to_one_that_is_there() -> None:
    async def run() -> None:
        board = TimedBoard(costs=BOARD)
        board.switch("fast")
        some = some_modes(board, ["slow"])
        keeper = ModeKeeper(
            some,
            ["slow"],
            clock=board.clock,
            in_thread=at_once,
            changed=lambda: None,
        )
        await keeper.read()
        assert keeper.want(0, "the only one")
        await keeper.settled()
        assert board.current() == "slow"
        assert not keeper.want(0, "the only one")

    asyncio.run(run())
