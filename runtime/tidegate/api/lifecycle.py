"""Runs the parts of a service together and ends them in order.

On the stop event the engine refuses new requests first (so readiness flips), lets those here
finish, then the HTTP server and other front doors drain, then everything else is cancelled. A part
that fails ends all.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence

from tidegate.api.server import BoundServer
from tidegate.engine.engine import Engine

Part = Callable[[], Awaitable[None]]
"""Runs until cancelled."""


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT; a second one has the default effect."""
    loop = asyncio.get_running_loop()

    def handle(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)


async def run_service(
    *,
    engine: Engine,
    server: BoundServer,
    stop: asyncio.Event,
    parts: Sequence[Part] = (),
    settle: Part | None = None,
    drain_s: float = 30.0,
) -> None:
    """Run until `stop` is set, then drain for at most about `drain_s` seconds.

    `settle` returns when the answers of a front door in `parts` have left it.

    Raises:
        ExceptionGroup: a part failed; the others were cancelled.
    """
    async with asyncio.TaskGroup() as tasks:
        rest = [tasks.create_task(_run(part)) for part in (engine.run, *parts)]
        serving = tasks.create_task(server.run())
        await stop.wait()
        await engine.drain(drain_s)
        server.drain()
        settling = [] if settle is None else [tasks.create_task(_run(settle))]
        await asyncio.wait([serving, *settling], timeout=drain_s)
        for task in (serving, *settling, *rest):
            task.cancel()


async def _run(part: Part) -> None:
    await part()
