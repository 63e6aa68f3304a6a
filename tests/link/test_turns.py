"""Turns of the cores: what comes together is stored together, what cannot leave is not sealed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from linkcores import WALL_S, CorePair, as_messages
from linklab import FAST

from tidegate.link.device import DeviceLink
from tidegate.link.effects import (
    Delivered,
    Ended,
    GatewayEffect,
    InboundRequest,
    Publish,
    Release,
    RunId,
    SomebodyCame,
    Start,
)
from tidegate.link.envelope import MessageType, new_request_id
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.gateway_output import Finished, Outputs, Produced
from tidegate.link.identity import load_device
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.messages import Status
from tidegate.link.prekeys import ModelOffer
from tidegate.link.sending import PAUSE_BYTES
from tidegate.link.timing import Timing
from tidegate.link.topics import GONE, HERE
from tidegate.link.transport import Message


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[CorePair]:
    ends = CorePair(tmp_path, Timing(pacing="off"))
    yield ends
    ends.close()


def test_outputs_of_many_requests_in_one_turn_are_one_write(ends: CorePair) -> None:
    runs = ends.begin(8)
    before = ends.gateway_disk.writes
    batch = [Produced(run, b"%d" % number) for run in runs for number in range(5)]
    messages = as_messages(ends.gateway.turn(0.2, [], batch))
    assert ends.gateway_disk.writes == before + 1
    assert len(messages) == len(runs), "what a request has to say is one message"


def test_acknowledgements_of_many_requests_in_one_turn_are_one_write(ends: CorePair) -> None:
    runs = ends.begin(8)
    batch = [Produced(run, bytes(60)) for run in runs]
    answers = as_messages(ends.gateway.turn(0.2, [], batch))
    before = ends.device_disk.writes
    said = ends.device.turn(0.2, answers)
    assert [type(effect) for effect in said] == [Delivered] * 8
    said = ends.device.turn(0.2 + ends.timing.ack_delay_s, [])
    assert [message.payload[0] for message in as_messages(said)] == [MessageType.CONTROL] * 8
    assert ends.device_disk.writes == before + 1


def test_a_disk_that_refuses_acknowledges_none_of_a_turn(ends: CorePair) -> None:
    runs = ends.begin(3)
    answers = as_messages(ends.gateway.turn(0.2, [], [Produced(run, b"x") for run in runs]))
    ends.device.turn(0.2, answers)
    ends.device_disk.refuse = True
    assert as_messages(ends.device.turn(1.0, [])) == []
    assert ends.device.tally.snapshot().store_failures == 1


def test_a_turn_says_what_single_calls_say(tmp_path: Path) -> None:
    """The obvious twin: message by message, output by output."""
    said: list[list[bytes]] = []
    for name in ("turns", "calls"):
        root = tmp_path / name
        root.mkdir()
        ends = CorePair(root, Timing(pacing="off"))
        runs = ends.begin(4)
        outputs: list[Produced] = [Produced(run, b"%d" % run) for run in runs]
        outputs += [Produced(run, Finished(Status.COMPLETE)) for run in runs]
        effects: list[GatewayEffect] = []
        if name == "turns":
            effects = ends.gateway.turn(0.2, [], outputs)
        else:
            for output in outputs:
                effects += ends.gateway.produced(0.2, [output])
        got: dict[bytes, list[bytes]] = {}
        for effect in ends.device.turn(0.2, as_messages(effects)):
            if isinstance(effect, Delivered):
                got.setdefault(effect.request_id, []).extend(effect.payloads)
            assert not isinstance(effect, Ended) or effect.code == ""
        said.append(sorted(b"".join(payloads) for payloads in got.values()))
        ends.close()
    assert said[0] == said[1] == [b"1", b"2", b"3", b"4"]


def test_no_more_is_sealed_than_there_is_room_for_and_the_first_to_wait_goes_first(
    ends: CorePair,
) -> None:
    runs = ends.begin(8)
    batch = [Produced(run, bytes(1000)) for run in runs]
    first = as_messages(ends.gateway.turn(0.2, [], batch, room_bytes=3000))
    assert len(first) == 3
    assert ends.gateway.next_wakeup_s() <= 0.2, "the others wait for room, not for time"
    # More for everyone: it joins what waits, and does not overtake it.
    more = [Produced(run, bytes(1000)) for run in runs]
    second = as_messages(ends.gateway.turn(0.2, [], more, room_bytes=5 * 2100))
    assert len(second) == 5
    delivered = [
        effect for effect in ends.device.turn(0.2, first + second) if isinstance(effect, Delivered)
    ]
    assert [len(effect.payloads) for effect in delivered] == [1, 1, 1, 2, 2, 2, 2, 2]
    rest = as_messages(ends.gateway.turn(0.2, [], []))
    assert len(rest) == 3


def test_without_room_nothing_is_sealed_whatever_devices_ask_again(ends: CorePair) -> None:
    asked, names = ends.ask(4)
    started = ends.gateway.turn(0.1, asked, [])
    runs = [effect.run for effect in started if isinstance(effect, Start)]
    ends.gateway.turn(0.1, [], [Produced(run, bytes(1000)) for run in runs], room_bytes=0)
    before, now_s = ends.gateway.tally.snapshot(), 0.1
    for _ in range(15):
        now_s += 3.0
        again = as_messages(ends.device.poll(now_s))
        effects = ends.gateway.turn(now_s, again, [], room_bytes=0)
        assert not [one for one in effects if isinstance(one, Publish | Release)]
        assert ends.gateway.next_wakeup_s() > now_s, "no turns for nothing"
    after = ends.gateway.tally.snapshot()
    assert after.sent == before.sent
    assert after.resends > before.resends
    answers = as_messages(ends.gateway.turn(now_s, [], []))
    assert len(answers) == len(names), "each once, for its newest attempt"


def test_leases_end_while_nothing_leaves(ends: CorePair) -> None:
    ends.begin(2)
    ends.gateway.turn(1.0, [], [], room_bytes=0)
    assert ends.gateway.load > 0
    end_s = 1.0 + ends.timing.lease_s
    while (now_s := ends.gateway.next_wakeup_s()) <= end_s:
        ends.gateway.turn(now_s, [], [], room_bytes=0)
    assert ends.gateway.load == 0


def test_what_was_sent_before_has_to_leave_before_a_request_is_sent_again(ends: CorePair) -> None:
    first, _ = ends.ask(1)
    assert len(first) == 1
    assert as_messages(ends.device.turn(30.0, [], may_send=False)) == []
    assert ends.device.next_wakeup_s() > 30.0, "no turns for nothing"
    assert len(as_messages(ends.device.turn(31.0, []))) == 1


def test_who_has_known_a_gateway_waits_for_one_until_the_deadline(ends: CorePair) -> None:
    gone_s = 2 * ends.timing.advert_valid_s
    assert ends.device.gateways(gone_s) == []
    name = new_request_id(int(WALL_S * 1000))
    ends.device.submit(gone_s, b"prompt", request_id=name, deadline_s=600.0, model=None)
    now_s, said = gone_s, list[object]()
    while now_s < gone_s + 599.0:
        now_s = ends.device.next_wakeup_s()
        said += ends.device.turn(now_s, [])
        if now_s > gone_s + 300.0 and not as_messages(said):
            advert = ends.gateway.advert((ModelOffer(id="m", context_tokens=2048),), None)
            said += ends.device.turn(now_s, [Message(advert.topic, advert.payload)])
            said += ends.device.turn(now_s + 0.1, [])
            break
    (sent,) = as_messages(said)
    assert sent.payload[0] == MessageType.REQUEST
    for model in ("m", "unknown"):
        other = new_request_id(int(WALL_S * 1000))
        ends.device.submit(now_s, b"x", request_id=other, deadline_s=600.0, model=model)
    later = now_s + ends.timing.connect_timeout_s + 1.0
    ended = [one for one in ends.device.turn(later, []) if isinstance(one, Ended)]
    assert [one.code for one in ended] == ["no_gateway"], "nobody has ever had that model"


def test_a_device_that_comes_makes_its_gateway_say_who_it_is(ends: CorePair) -> None:
    topic = "tidegate/1/home/s/" + load_device(ends.root / "device").handle
    assert ends.gateway.turn(0.1, [Message(topic, HERE + bytes(16))], []) == [SomebodyCame()]
    assert ends.gateway.turn(0.1, [Message(topic, GONE + bytes(16))], []) == []


def test_outputs_are_due_at_once_or_shortly_before_their_beat() -> None:
    one = Produced(RunId(1), b"x")
    at_once = Outputs(Timing(pacing="off"))
    assert at_once.take(0.0) == []
    assert at_once.due_s == math.inf
    assert at_once.put(5.0, one)
    assert at_once.take(5.0) == [one]
    paced = Outputs(Timing(pacing="tick", tick_s=0.04))
    assert paced.put(1.001, one)
    assert not paced.put(1.002, one), "they go with the first"
    assert paced.due_s == pytest.approx(1.03)
    assert paced.take(1.02) == []
    assert paced.take(paced.due_s) == [one, one]
    # Too late for the beat at 1.08: the disk would not be done by then.
    paced.put(1.075, one)
    assert paced.due_s == pytest.approx(1.11)


class Closable(MemoryTransport):
    """Takes a message only while `flowing`."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self.flowing = asyncio.Event()
        self.flowing.set()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        await self.flowing.wait()
        await super().publish(topic, payload, retain=retain)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.005)


def test_resending_is_bounded_by_what_leaves(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    payloads = [b"%d" % number + bytes(50_000) for number in range(40)]

    async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
        for payload in payloads:
            yield payload

    async def main() -> None:
        broker = MemoryBroker()
        closable = Closable(broker)
        # A device that asks again and again, and always from the start.
        impatient = replace(FAST, heartbeat_s=0.05, silence_s=0.1, resend_max_s=0.1)
        gateway = Gateway(tmp_path / "gateway", closable, answer, timing=FAST)
        device = DeviceLink(tmp_path / "device", MemoryTransport(broker), timing=impatient)
        tasks = [asyncio.create_task(gateway.run()), asyncio.create_task(device.run())]
        await until(lambda: device.counters.adverts > 0)
        closable.flowing.clear()
        answers = [device.request(b"prompt", deadline_s=30) for _ in range(4)]

        async def read(source: AsyncIterator[bytes]) -> list[bytes]:
            return [payload async for payload in source]

        reading = [asyncio.create_task(read(source)) for source in answers]
        await until(lambda: gateway._outgoing.room_bytes == 0)
        sent = gateway.counters.sent
        await until(lambda: gateway.counters.resends > 20)
        assert gateway.counters.sent == sent, "nothing leaves, so nothing is sealed again"
        assert gateway._outgoing.waiting_bytes < PAUSE_BYTES + 4 * 100_000
        closable.flowing.set()
        assert await asyncio.gather(*reading) == [payloads] * 4
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await gateway.close()
        await device.close()

    asyncio.run(asyncio.wait_for(main(), 40))
