"""A part that a service can do without for a while is started again, and the service lives."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tidegate.api.lifecycle import kept_alive
from tidegate.errors import CapacityError


def test_a_failing_part_is_started_again_and_its_message_stays_out_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    starts = 0

    async def part() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise CapacityError("disk full of secrets")

    with caplog.at_level(logging.ERROR):
        asyncio.run(asyncio.wait_for(kept_alive("it", part, first_wait_s=0.01)(), 10))
    assert starts == 3
    assert "CapacityError" in caplog.text
    assert "secrets" not in caplog.text


def test_cancelling_ends_it() -> None:
    async def main() -> None:
        async def part() -> None:
            await asyncio.Event().wait()

        task = asyncio.create_task(kept_alive("it", part)())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
