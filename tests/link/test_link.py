"""A device and a gateway over the in-memory broker: the asyncio ends as neighbours use them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from linklab import FAST

from tidegate.errors import (
    CapacityError,
    ExecutionError,
    LinkError,
    TidegateError,
    UnavailableError,
)
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.envelope import new_request_id
from tidegate.link.fleet import add_device, add_gateway, create_fleet, pair
from tidegate.link.gateway import UNSENT_PAYLOADS, Gateway, Handler
from tidegate.link.identity import load_device
from tidegate.link.memory import Faults, MemoryBroker, MemoryTransport
from tidegate.link.outbox import Outcome
from tidegate.link.prekeys import ModelOffer
from tidegate.link.transport import QUEUE_BYTES, EventQueue, Message
from tidegate.link.wire import MAX_MESSAGE_BYTES

ANSWER = [b"token %d " % i for i in range(60)]
TIME_LIMIT_S = 30.0


async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
    for token in ANSWER:
        yield token
        await asyncio.sleep(0.002)


@asynccontextmanager
async def running_gateway(
    root: Path,
    broker: MemoryBroker,
    handler: Handler,
    *,
    max_requests: int = 64,
    name: str = "gateway",
    load: float = 0.0,
) -> AsyncIterator[Gateway]:
    gateway = Gateway(
        root / name,
        MemoryTransport(broker),
        handler,
        models=lambda: (ModelOffer(id="m", context_tokens=2048),),
        load=lambda: load,
        timing=FAST,
        max_requests=max_requests,
    )
    task = asyncio.create_task(gateway.run())
    try:
        yield gateway
    finally:
        task.cancel()
        await asyncio.wait([task])
        await gateway.close()


@asynccontextmanager
async def running_device(root: Path, broker: MemoryBroker) -> AsyncIterator[DeviceLink]:
    device = DeviceLink(root / "device", MemoryTransport(broker), timing=FAST)
    task = asyncio.create_task(device.run())
    try:
        yield device
    finally:
        task.cancel()
        await asyncio.wait([task])
        await device.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pair(tmp_path / "device", tmp_path / "gateway")
    return tmp_path


async def ask(device: DeviceLink, body: bytes = b"prompt", deadline_s: float = 20.0) -> list[bytes]:
    return [payload async for payload in device.request(body, deadline_s=deadline_s)]


def run(main: Callable[[], object]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIME_LIMIT_S):
            await main()  # type: ignore[misc]

    asyncio.run(limited())


def test_the_answer_arrives_as_the_handler_yielded_it(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, answer), running_device(root, broker) as device:
            assert await ask(device) == ANSWER
            assert await device.pending() == ()
            assert device.connected
            (view,) = await device.gateways()
            assert view.gateway_id == "gw0"
            assert view.models == (ModelOffer(id="m", context_tokens=2048),)
            assert 0.0 <= view.age_s < TIME_LIMIT_S
            assert device.counters.completed == 1

    run(main)


def test_a_handler_is_told_whose_request_it_is(root: Path) -> None:
    known = load_device(root / "device")

    async def main() -> None:
        async def noting(request: InboundRequest) -> AsyncIterator[bytes]:
            assert (request.device_id, request.handle) == (known.device_id, known.handle)
            yield b"known"

        broker = MemoryBroker()
        async with running_gateway(root, broker, noting), running_device(root, broker) as device:
            assert await ask(device) == [b"known"]

    run(main)


def test_the_broker_sees_none_of_it(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, answer), running_device(root, broker) as device:
            await ask(device, b"a very secret prompt")
        everything = b"".join(m.topic.encode() + m.payload for m in broker.seen)
        assert len(broker.seen) > 5
        assert b"secret" not in everything
        assert b"token" not in everything

    run(main)


def test_many_requests_at_once_keep_apart(root: Path) -> None:
    async def echo(request: InboundRequest) -> AsyncIterator[bytes]:
        for _ in range(20):
            yield request.body
            await asyncio.sleep(0)

    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, echo), running_device(root, broker) as device:
            bodies = [b"body %d" % i for i in range(12)]
            answers = await asyncio.gather(*(ask(device, body) for body in bodies))
            assert answers == [[body] * 20 for body in bodies]

    run(main)


def test_a_bad_network_changes_nothing_but_the_time(root: Path) -> None:
    async def main() -> None:
        faults = Faults(drop=0.1, duplicate=0.1, reorder=0.1, corrupt=0.2)
        broker = MemoryBroker(faults=faults)
        async with (
            running_gateway(root, broker, answer) as gateway,
            running_device(root, broker) as device,
        ):
            for _ in range(3):
                assert await ask(device) == ANSWER
            assert device.counters.dropped + gateway.counters.dropped > 0

    run(main)


def test_a_broker_that_dies_and_returns_changes_nothing_but_the_time(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, answer), running_device(root, broker) as device:
            got: list[bytes] = []
            async for payload in device.request(b"prompt", deadline_s=20.0):
                got.append(payload)
                if len(got) in (10, 30):
                    broker.stop()
                    asyncio.get_running_loop().call_later(0.1, broker.start)
            assert got == ANSWER

    run(main)


def test_a_gateway_that_restarts_goes_on_where_it_was(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_device(root, broker) as device:
            got: list[bytes] = []
            async with aclosing(device.request(b"prompt", deadline_s=20.0)) as payloads:
                async with running_gateway(root, broker, answer):
                    async for payload in payloads:
                        got.append(payload)
                        if len(got) == 10:
                            break
                async with running_gateway(root, broker, answer):
                    got += [payload async for payload in payloads]
            assert got == ANSWER

    run(main)


def test_when_a_gateway_goes_silent_another_one_finishes_its_answer(tmp_path: Path) -> None:
    create_fleet(tmp_path / "fleet")
    for name in ("busy", "idle"):
        add_gateway(tmp_path / "fleet", tmp_path / name, name)
    add_device(tmp_path / "fleet", tmp_path / "device", [tmp_path / "busy", tmp_path / "idle"])

    async def main() -> None:
        broker = MemoryBroker()
        got: list[bytes] = []
        async with (
            running_gateway(tmp_path, broker, answer, name="busy", load=0.9) as busy,
            running_device(tmp_path, broker) as device,
        ):
            async with running_gateway(tmp_path, broker, answer, name="idle", load=0.1) as idle:
                while len(await device.gateways()) < 2:
                    await asyncio.sleep(0.01)
                reading = device.request(b"prompt", deadline_s=20.0)
                while len(got) < 20:
                    got.append(await anext(reading))
                assert (busy.counters.opened, idle.counters.opened > 0) == (0, True)
            got += [payload async for payload in reading]
            assert got == ANSWER
            assert busy.counters.completed == 1

    run(main)


def test_a_device_that_restarts_finds_its_answer(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, answer):
            async with running_device(root, broker) as device:
                # The link stops while the application reads: that cancels nothing.
                reading = device.request(b"prompt", deadline_s=20.0)
                assert await anext(reading) == ANSWER[0]
            async with running_device(root, broker) as device:
                (pending,) = await device.pending()
                again = device.request(b"", request_id=pending.request_id, deadline_s=20.0)
                assert [payload async for payload in again] == ANSWER
                assert await device.pending() == ()
            await reading.aclose()

    run(main)


def test_an_answer_nobody_waited_for_can_be_taken_later(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_device(root, broker) as device:
            reading = device.request(b"prompt", deadline_s=20.0)
            waiting = asyncio.ensure_future(anext(reading))
            await asyncio.sleep(0.05)
            (pending,) = await device.pending()
            assert pending.outcome is Outcome.OPEN
            with pytest.raises(LinkError, match="no whole answer"):
                await device.take(pending.request_id)
        with pytest.raises(UnavailableError, match="stays in the outbox"):
            await waiting
        async with running_gateway(root, broker, answer), running_device(root, broker) as device:
            while (await device.pending())[0].outcome is Outcome.OPEN:
                await asyncio.sleep(0.02)
            assert await device.take(pending.request_id) == ANSWER
            assert await device.pending() == ()

    run(main)


def test_closing_the_iterator_stops_the_handler(root: Path) -> None:
    async def main() -> None:
        stopped = asyncio.Event()

        async def endless(request: InboundRequest) -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"more"
                    await asyncio.sleep(0.001)
            finally:
                stopped.set()

        broker = MemoryBroker()
        async with (
            running_gateway(root, broker, endless) as gateway,
            running_device(root, broker) as device,
        ):
            async with aclosing(device.request(b"prompt", deadline_s=20.0)) as payloads:
                assert await anext(payloads) == b"more"
            await stopped.wait()
            assert gateway.counters.cancelled == 1
            assert device.counters.cancelled == 1
            assert await device.pending() == ()

    run(main)


def test_a_handler_cannot_run_ahead_of_what_was_sent(root: Path) -> None:
    async def main() -> None:
        produced = 0

        async def eager(request: InboundRequest) -> AsyncIterator[bytes]:
            nonlocal produced
            while True:
                produced += 1
                yield b"x"

        broker = MemoryBroker()
        async with running_gateway(root, broker, eager), running_device(root, broker) as device:
            payloads = device.request(b"prompt", deadline_s=20.0)
            await anext(payloads)
            broker.stop()
            before = -1
            while produced != before:
                before = produced
                await asyncio.sleep(0.5)
            assert produced <= (FAST.credit + 8) * UNSENT_PAYLOADS
            await payloads.aclose()

    run(main)


@pytest.mark.parametrize(
    ("raised", "expected", "said"),
    [
        (CapacityError("secret"), CapacityError, "no room"),
        (UnavailableError("secret"), UnavailableError, "engine"),
        (ExecutionError("secret"), ExecutionError, "could not answer"),
        (RuntimeError("secret"), ExecutionError, "could not answer"),
        (asyncio.CancelledError("secret"), ExecutionError, "could not answer"),
        (LinkError("secret"), LinkError, "link_error"),
    ],
)
def test_a_handler_that_fails_ends_its_request_with_a_named_error(
    root: Path,
    caplog: pytest.LogCaptureFixture,
    raised: BaseException,
    expected: type[TidegateError],
    said: str,
) -> None:
    async def failing(request: InboundRequest) -> AsyncIterator[bytes]:
        if request.body == b"good":
            yield b"fine"
            return
        yield b"so far"
        raise raised

    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, failing), running_device(root, broker) as device:
            failed = device.request(b"prompt", deadline_s=20.0)
            assert await anext(failed) == b"so far"
            with pytest.raises(expected, match=said):
                await anext(failed)
            assert await ask(device, b"good") == [b"fine"]

    with caplog.at_level(logging.DEBUG, logger="tidegate"):
        run(main)
    assert "secret" not in caplog.text


def test_without_a_gateway_the_caller_hears_so_in_time(root: Path) -> None:
    async def main() -> None:
        async with running_device(root, MemoryBroker()) as device:
            with pytest.raises(UnavailableError, match="no gateway is known after 1 s"):
                await ask(device)
            assert await device.pending() == ()

    run(main)


def test_a_certificate_of_another_time_is_named_with_the_clock(tmp_path: Path) -> None:
    create_fleet(tmp_path / "fleet")
    add_gateway(tmp_path / "fleet", tmp_path / "gateway", "gw0", now_s=1_000_000_000)
    add_device(tmp_path / "fleet", tmp_path / "device", [tmp_path / "gateway"])

    async def main() -> None:
        broker = MemoryBroker()
        async with (
            running_gateway(tmp_path, broker, answer),
            running_device(tmp_path, broker) as device,
        ):
            with pytest.raises(
                UnavailableError, match=r"certificate: not valid any more.*this machine's clock"
            ):
                await ask(device)

    run(main)


def test_a_silent_gateway_costs_the_caller_no_more_than_the_deadline(root: Path) -> None:
    async def silent(request: InboundRequest) -> AsyncIterator[bytes]:
        await asyncio.sleep(3600)
        yield b""

    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, silent), running_device(root, broker) as device:
            with pytest.raises(UnavailableError, match="deadline"):
                await ask(device, deadline_s=0.5)

    run(main)


def test_too_many_requests_are_refused_by_name(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with (
            running_gateway(root, broker, answer, max_requests=1),
            running_device(root, broker) as device,
        ):
            results = await asyncio.gather(*(ask(device) for _ in range(3)), return_exceptions=True)
            assert sorted(map(type, results), key=str) == sorted(
                [list, CapacityError, CapacityError], key=str
            )

    run(main)


def test_one_request_has_one_reader(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        name = new_request_id(time.time_ns() // 1_000_000)
        async with running_device(root, broker) as device:
            first = device.request(b"prompt", request_id=name, deadline_s=5.0)
            waiting = asyncio.ensure_future(anext(first))
            await asyncio.sleep(0)
            with pytest.raises(LinkError, match="someone is reading"):
                await anext(device.request(b"prompt", request_id=name, deadline_s=5.0))
            waiting.cancel()
            await asyncio.wait([waiting])

    run(main)


def test_a_link_that_does_not_run_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.link.device._GRACE_S", 0.1)

    async def main() -> None:
        device = DeviceLink(root / "device", MemoryTransport(MemoryBroker()), timing=FAST)
        with pytest.raises(UnavailableError, match=r"DeviceLink\.run"):
            await ask(device, deadline_s=0.1)
        await device.close()

    run(main)


def test_a_second_process_on_the_same_keys_is_refused_by_name(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, answer), running_device(root, broker):
            with pytest.raises(LinkError, match=f"{root / 'gateway'}: another process"):
                Gateway(root / "gateway", MemoryTransport(broker), answer)
            with pytest.raises(LinkError, match=f"{root / 'device'}: another process"):
                DeviceLink(root / "device", MemoryTransport(broker))
        async with running_gateway(root, broker, answer), running_device(root, broker) as device:
            assert await ask(device) == ANSWER

    run(main)


def test_keys_that_cannot_be_used_are_not_kept_locked(root: Path) -> None:
    (root / "gateway" / "requests.sqlite").mkdir()
    for _ in range(2):
        with pytest.raises(LinkError, match=r"requests\.sqlite"):
            Gateway(root / "gateway", MemoryTransport(MemoryBroker()), answer)


def test_waiting_in_vain_for_a_stored_request_leaves_it_stored(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.link.device._GRACE_S", 0.05)

    async def main() -> None:
        device = DeviceLink(root / "device", MemoryTransport(MemoryBroker()), timing=FAST)
        name = new_request_id(time.time_ns() // 1_000_000)
        for deadline_s in (0.3, 0.01):
            with pytest.raises(UnavailableError, match="not running"):
                _ = [
                    part
                    async for part in device.request(b"", deadline_s=deadline_s, request_id=name)
                ]
        (pending,) = await device.pending()
        assert (pending.request_id, pending.outcome) == (name, Outcome.OPEN)
        await device.close()

    run(main)


def test_a_shorter_deadline_does_not_cut_a_stored_request_short(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.link.device._GRACE_S", 0.05)

    async def main() -> None:
        broker = MemoryBroker()
        name = new_request_id(time.time_ns() // 1_000_000)
        async with running_device(root, broker) as device:
            first = asyncio.ensure_future(
                anext(device.request(b"", deadline_s=20.0, request_id=name))
            )
            while not await device.pending():
                await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError):
            await first
        async with running_device(root, broker) as device:
            again = device.request(b"", deadline_s=0.01, request_id=name)
            waiting = asyncio.ensure_future(anext(again))
            await asyncio.sleep(0.3)
            async with running_gateway(root, broker, answer):
                got = [await waiting, *[part async for part in again]]
            assert got == ANSWER

    run(main)


def test_what_the_transport_threw_away_is_counted(root: Path) -> None:
    async def main() -> None:
        broker = MemoryBroker()
        async with running_gateway(root, broker, answer) as gateway:
            while not gateway.connected:
                await asyncio.sleep(0.01)
            junk = Message("tidegate/1/home/gw/gw0/q/x", bytes(MAX_MESSAGE_BYTES + 1))
            broker.publish(junk, retain=False)
            assert (gateway.counters.overflowed, gateway.counters.dropped) == (1, 0)

    run(main)


def test_waiting_messages_are_bounded_in_bytes() -> None:
    async def main() -> None:
        queue = EventQueue()
        big = Message("a", bytes(MAX_MESSAGE_BYTES))
        fit = QUEUE_BYTES // MAX_MESSAGE_BYTES
        for _ in range(fit + 2):
            queue.put(big)
        assert queue.dropped == 2
        events = queue.events()
        for _ in range(fit):
            await anext(events)
        queue.put(big)
        assert queue.dropped == 2

    run(main)
