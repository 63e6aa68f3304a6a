"""A seeded, MQTT-aware proxy on loopback that loses, repeats, reorders, delays, damages and cuts.

`chaosplan` decides; this file moves bytes. Nothing is read while a side cannot take more, so what
is held is bounded by one frame and `HELD_FRAMES` messages a direction and the socket buffers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace

from chaosplan import Deeds, Direction, Exchange, Faults, Plan, Step
from mqttframes import FrameError, FrameReader

READ_BYTES = 64 * 1024
_HOST = "127.0.0.1"


class _Pipe:
    """One connection: a client, the broker, and what is done between them."""

    def __init__(self, proxy: ChaosProxy, exchange: Exchange) -> None:
        self._proxy = proxy
        self._exchange = exchange
        self._writers: dict[Direction, asyncio.StreamWriter] = {}
        self._timers: dict[Direction, asyncio.TimerHandle] = {}

    async def run(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        broker: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Until one side is gone, then neither is left."""
        self._writers = {Direction.UP: broker[1], Direction.DOWN: client[1]}
        pumps = [
            asyncio.create_task(self._pump(Direction.UP, client[0])),
            asyncio.create_task(self._pump(Direction.DOWN, broker[0])),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for timer in self._timers.values():
                timer.cancel()

    def cut(self) -> None:
        """Reset both connections; what was buffered is lost."""
        for writer in self._writers.values():
            writer.transport.abort()

    async def _pump(self, direction: Direction, source: asyncio.StreamReader) -> None:
        frames = FrameReader()
        with suppress(OSError):
            while True:
                await self._proxy.passable.wait()
                data = await source.read(READ_BYTES)
                # A partition that began while we waited holds this back too.
                await self._proxy.passable.wait()
                if not data:
                    break
                try:
                    for frame in frames.feed(data):
                        await self._act(direction, self._exchange.receive(direction, frame))
                except FrameError:
                    self._proxy.deeds.malformed += 1
                    self.cut()
                    return
            self._release(direction)
            await self._writers[direction].drain()

    async def _act(self, direction: Direction, step: Step) -> None:
        if step.partition:
            self._proxy.partition(self._proxy.plan.faults.partition_s)
            await self._proxy.passable.wait()
        if step.delay_s:
            await asyncio.sleep(step.delay_s)
        if step.cut:
            self.cut()
            raise ConnectionResetError
        for way, frames in ((direction, step.forward), (direction.other, step.back)):
            if frames:
                writer = self._writers[way]
                writer.write(b"".join(frames))
                await writer.drain()
        self._hold(direction)

    def _hold(self, direction: Direction) -> None:
        """See that what waits to be overtaken does not wait for ever."""
        if self._exchange.holds(direction) and direction not in self._timers:
            loop = asyncio.get_running_loop()
            hold_s = self._proxy.plan.faults.hold_s
            self._timers[direction] = loop.call_later(hold_s, self._release, direction)

    def _release(self, direction: Direction) -> None:
        timer = self._timers.pop(direction, None)
        if timer is not None:
            timer.cancel()
        frames = self._exchange.release(direction)
        if frames and not self._writers[direction].is_closing():
            self._writers[direction].write(b"".join(frames))


class ChaosProxy:
    """In front of a broker on `broker_port`. `deeds` counts what it did.

    Args:
        broker_port: on loopback; need not be there yet, or still.
        seed: of all decisions.
        faults: how often what happens; `set_faults` changes it in mid-run.
    """

    def __init__(self, broker_port: int, *, seed: int, faults: Faults | None = None) -> None:
        self.plan = Plan(seed, faults or Faults())
        self.deeds = Deeds()
        self.passable = asyncio.Event()
        self.passable.set()
        self.port = 0
        self._broker_port = broker_port
        self._pipes: set[_Pipe] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._healing: asyncio.TimerHandle | None = None

    @property
    def url(self) -> str:
        return f"mqtt://{_HOST}:{self.port}"

    def set_faults(self, faults: Faults) -> None:
        self.plan.faults = faults

    def snapshot(self) -> Deeds:
        """The counts now."""
        return replace(self.deeds)

    def cut_all(self) -> None:
        """Reset every connection."""
        for pipe in self._pipes:
            self.deeds.cut += 1
            pipe.cut()

    def partition(self, seconds: float) -> None:
        """Let nothing pass for a while; senders notice only that nothing comes."""
        if self._healing is not None:
            return
        self.deeds.partitioned += 1
        self.passable.clear()
        self._healing = asyncio.get_running_loop().call_later(seconds, self._heal)

    def _heal(self) -> None:
        self._healing = None
        self.passable.set()

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[ChaosProxy]:
        """Listen on loopback, on a free port by default, while the block runs."""
        server = await asyncio.start_server(self._accept, _HOST, port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            if self._healing is not None:
                self._healing.cancel()
            await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = _Pipe(self, Exchange(self.plan, self.deeds))
        broker_writer: asyncio.StreamWriter | None = None
        try:
            broker = await asyncio.open_connection(_HOST, self._broker_port)
            broker_writer = broker[1]
            self.deeds.connections += 1
            self._pipes.add(pipe)
            await pipe.run((reader, writer), broker)
        except OSError:
            # No broker: the client finds its connection closed, as it would at a dead one.
            return
        finally:
            self._pipes.discard(pipe)
            for one in (writer, broker_writer):
                if one is not None:
                    one.close()


@contextmanager
def chaos(broker_port: int, *, seed: int, faults: Faults) -> Iterator[ChaosProxy]:
    """A proxy in its own thread while the block runs, for tests that are not asyncio."""
    proxy = ChaosProxy(broker_port, seed=seed, faults=faults)
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with proxy.running():
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert ready.wait(10), "the proxy does not listen"
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
