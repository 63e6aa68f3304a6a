"""Payloads by the handful: one message between processes costs as much as several tokens in it.

The first payload of an answer leaves at once. From then on a message carries whatever came during a
gap, which grows with the streams that a replica has: few streams have no delay, many share the CPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Final

MESSAGE_S: Final = 0.0007
"""CPU seconds that a message costs whoever reads it; its replica takes half of that.

Measured on two Zen 4 cores with Ray 2.60, benchmarks/cloud/ray_messages.py."""
LONGEST_GAP_S: Final = 0.04
"""The beat of the sealed link, which nobody perceives."""


def gap_s(streams: int) -> float:
    """Between two messages of one stream, so that reading them all takes about half a core."""
    return 0.0 if streams < 2 else min(LONGEST_GAP_S, 2 * MESSAGE_S * streams)


async def gathered(
    payloads: AsyncGenerator[bytes, None], gap: Callable[[], float]
) -> AsyncGenerator[tuple[bytes, ...], None]:
    """Messages of one or more payloads, in order; an error comes after what came before it.

    Args:
        payloads: closed when this generator is.
        gap: seconds to wait between messages, asked for each time.
    """
    waiting: list[bytes] = []
    more = asyncio.Event()

    async def collect() -> None:
        async with aclosing(payloads) as stream:
            async for payload in stream:
                waiting.append(payload)
                more.set()

    collecting = asyncio.create_task(collect())
    collecting.add_done_callback(lambda _: more.set())
    try:
        while True:
            await more.wait()
            more.clear()
            if waiting:
                message, waiting[:] = tuple(waiting), []
                yield message
            if not collecting.done():
                await asyncio.wait([collecting], timeout=gap())
            elif not waiting:
                break
        await collecting
    finally:
        collecting.cancel()
        with suppress(BaseException):
            await collecting
