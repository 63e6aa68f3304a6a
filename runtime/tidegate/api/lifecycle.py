"""Runs the parts of a service together and ends them in order.

On the stop event the engine refuses new requests and those that wait first (so readiness flips),
lets those that run finish, then the HTTP server and other front doors drain, then everything else
is cancelled. A part that fails ends all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from tidegate.api.server import BoundServer

_log = logging.getLogger(__name__)

Part = Callable[[], Coroutine[Any, Any, None]]
"""Runs until cancelled."""

_LONGEST_WAIT_S = 30.0

STUCK_STATUS = 70
"""Exit status of a service that made no progress: EX_SOFTWARE of sysexits.h."""


class Serving(Protocol):
    """An engine, or several as one."""

    async def run(self) -> None:
        """Serve until cancelled."""

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and let what runs end; False when it had to be ended."""


class Healthy(Protocol):
    """A snapshot of something that may be stuck."""

    @property
    def healthy(self) -> bool:
        """Whether work makes progress."""


class Watched(Protocol):
    """What a watchdog looks at."""

    def snapshot(self) -> Healthy:
        """Its state now; cheap."""


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
    engine: Serving,
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
        rest = [tasks.create_task(part()) for part in (engine.run, *parts)]
        serving = tasks.create_task(server.run())
        await stop.wait()
        await engine.drain(drain_s)
        server.drain()
        settling = [] if settle is None else [tasks.create_task(settle())]
        await asyncio.wait([serving, *settling], timeout=drain_s)
        for task in (serving, *settling, *rest):
            task.cancel()


async def exit_when_stuck(
    engine: Watched, *, every_s: float = 5.0, leave: Callable[[int], object] = os._exit
) -> None:
    """End the process when the engine is unhealthy at two looks in a row.

    At once, without unwinding: a step that never returns holds a thread that Python would wait for.

    Args:
        engine: whose health it is.
        every_s: between two looks.
        leave: ends the process with a status.
    """
    unhealthy = 0
    while unhealthy < 2:
        await asyncio.sleep(every_s)
        unhealthy = 0 if engine.snapshot().healthy else unhealthy + 1
    _log.critical("the engine makes no progress: the process ends, to be started again")
    leave(STUCK_STATUS)


def kept_alive(name: str, part: Part, *, first_wait_s: float = 1.0) -> Part:
    """`part`, started again whenever it fails, after a wait that doubles up to half a minute.

    For a part that the service can do without for a while: its failure is logged by type only,
    since an exception's message may quote the data it tripped over.
    """

    async def run() -> None:
        wait_s = first_wait_s
        while True:
            try:
                await part()
                return
            except Exception as error:  # the boundary of a part
                _log.error("%s failed with %s; starting it again", name, type(error).__qualname__)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    return run
