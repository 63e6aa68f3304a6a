"""One thread beside the loop: in order, errors to who waits, and no end that hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest

from tidegate.engine.one_thread import OneThread


def test_pieces_run_in_order_in_one_other_thread() -> None:
    async def scenario() -> list[tuple[int, str]]:
        thread: OneThread[tuple[int, str]] = OneThread("beside")
        futures = [
            thread.submit(partial(lambda n: (n, threading.current_thread().name), n))
            for n in range(50)
        ]
        found = list(await asyncio.gather(*futures))
        thread.close()
        return found

    assert asyncio.run(scenario()) == [(n, "beside") for n in range(50)]


def test_an_error_reaches_who_waits_and_the_next_piece_runs() -> None:
    async def scenario() -> int:
        thread: OneThread[int] = OneThread("beside")
        with pytest.raises(ZeroDivisionError):
            await thread.submit(lambda: 1 // 0)
        found = await thread.submit(lambda: 7)
        thread.close()
        return found

    assert asyncio.run(scenario()) == 7


def test_a_future_that_was_cancelled_or_whose_loop_is_gone_hurts_nobody() -> None:
    gate = threading.Event()
    done: list[int] = []
    thread: OneThread[None] = OneThread("beside")

    def last() -> None:
        assert gate.wait(10)
        done.append(2)

    async def scenario() -> None:
        thread.submit(lambda: done.append(1)).cancel()
        thread.submit(last)
        await asyncio.sleep(0.01)

    asyncio.run(scenario())
    gate.set()
    thread.close()
    for _ in range(500):
        if not any(one.name == "beside" for one in threading.enumerate()):
            break
        time.sleep(0.01)
    assert done == [1, 2]
    assert not any(one.name == "beside" for one in threading.enumerate())
