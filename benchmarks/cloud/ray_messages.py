"""What a streamed message costs on Ray Serve: CPU of its replica, CPU of its caller, time.

A replica yields small messages as fast as it can, to one and to eight streams of one caller.

    python benchmarks/cloud/ray_messages.py
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve

from tidegate.cloud.ray.application import cluster

MESSAGES, TURNS, PAYLOAD = 1000, 3, b"x" * 60


class Talker:
    """Yields; knows what CPU it used."""

    async def talk(self, messages: int) -> AsyncGenerator[tuple[bytes, ...], None]:
        """So many messages of one payload each."""
        for _ in range(messages):
            yield (PAYLOAD,)
            await asyncio.sleep(0)

    async def cpu_s(self) -> float:
        """Since the process began."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime


async def turn(handle: Any, streams: int) -> tuple[float, float, float]:
    """Seconds a message: the replica's CPU, the caller's, and on the clock."""
    talking = handle.options(stream=True)

    async def one() -> int:
        return sum([1 async for _ in talking.talk.remote(MESSAGES)])

    replica_s, caller_s, began_s = (
        await handle.cpu_s.remote(),
        time.process_time(),
        time.monotonic(),
    )
    got = sum(await asyncio.gather(*(one() for _ in range(streams))))
    took_s, caller_s = time.monotonic() - began_s, time.process_time() - caller_s
    return (await handle.cpu_s.remote() - replica_s) / got, caller_s / got, took_s / got


async def measure(handle: Any) -> None:
    """Print medians."""
    await turn(handle, 1)
    for streams in (1, 8):
        turns = [await turn(handle, streams) for _ in range(TURNS)]
        replica, caller, clock = (
            1e6 * statistics.median(column) for column in zip(*turns, strict=True)
        )
        print(
            f"{streams} streams: replica {replica:.0f} us, caller {caller:.0f} us,"
            f" clock {clock:.0f} us"
        )


def main() -> int:
    """Measure and print."""
    with cluster(cpus=2):
        serve.start(http_options={"location": "NoServer"})
        made = serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})(
            Talker
        )
        asyncio.run(measure(serve.run(made.bind(), name="talk", route_prefix=None)))
        serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
