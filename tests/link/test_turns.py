"""Turns of the two cores: what comes together is stored together, what cannot leave is not sealed.

And what a power cut takes of it: payloads that were not synced yet, and no promise.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from linklab import FAST, Crash, CrashingDatabase

from tidegate.link import gateway_store, outbox
from tidegate.link.at_rest import Database
from tidegate.link.device import DeviceLink
from tidegate.link.device_core import DeviceCore
from tidegate.link.effects import (
    Delivered,
    Ended,
    GatewayEffect,
    InboundRequest,
    Publish,
    Release,
    RunId,
    Start,
)
from tidegate.link.envelope import DeviceId, MessageType, RequestId, new_request_id
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_output import Finished, Outputs, Produced
from tidegate.link.gateway_store import GatewayStore, Progress, RequestKey
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.messages import Status
from tidegate.link.outbox import Outbox
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.sending import PAUSE_BYTES
from tidegate.link.timing import Timing
from tidegate.link.transport import Message

WALL_S = 1_800_000_000.0
NEVER = 2**62


class Pair:
    """Both cores, and disks that say how often they were written."""

    def __init__(self, root: Path, timing: Timing) -> None:
        pair(root / "device", root / "gateway")
        self.root, self.timing = root, timing
        self.registry = DeviceRegistry(root / "gateway" / "devices.sqlite")
        self.device_disk = CrashingDatabase(root / "o.sqlite", outbox.SCHEMA)
        self.gateway_disk = CrashingDatabase(root / "g.sqlite", gateway_store.SCHEMA)
        self.device = DeviceCore(
            identity=load_device(root / "device"),
            outbox=Outbox(self.device_disk),
            timing=timing,
            rng=random.Random(0),
            wall_s=lambda: WALL_S,
            now_s=0.0,
        )
        self.start_gateway()

    def start_gateway(self) -> None:
        self.gateway = GatewayCore(
            keys=GatewayKeys(
                identity=load_gateway(self.root / "gateway"),
                prekeys=PrekeyStore(self.root / "prekeys.json"),
                registry=self.registry,
                wall_s=lambda: WALL_S,
            ),
            store=GatewayStore(self.gateway_disk),
            timing=self.timing,
            max_requests=64,
            wall_s=lambda: WALL_S,
            now_s=0.0,
        )
        advert = self.gateway.advert((ModelOffer(id="m", context_tokens=2048),), None)
        self.device.receive(0.0, advert.topic, advert.payload)
        self.device.on_connected(0.0)

    def ask(self, count: int, now_s: float = 0.1) -> tuple[list[Message], list[RequestId]]:
        names = [new_request_id(int(WALL_S * 1000)) for _ in range(count)]
        for name in names:
            self.device.submit(0.0, b"prompt", request_id=name, deadline_s=600.0, model=None)
        return as_messages(self.device.poll(now_s)), names

    def begin(self, count: int) -> list[RunId]:
        effects = self.gateway.turn(0.1, self.ask(count)[0], [])
        self.device.turn(0.1, as_messages(effects))
        return [effect.run for effect in effects if isinstance(effect, Start)]

    def close(self) -> None:
        self.device_disk.close()
        self.gateway_disk.close()
        self.registry.close()


def as_messages(effects: object) -> list[Message]:
    assert isinstance(effects, list)
    return [Message(one.topic, one.payload) for one in effects if isinstance(one, Publish)]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Pair]:
    ends = Pair(tmp_path, Timing(pacing="off"))
    yield ends
    ends.close()


def test_outputs_of_many_requests_in_one_turn_are_one_write(ends: Pair) -> None:
    runs = ends.begin(8)
    before = ends.gateway_disk.writes
    batch = [Produced(run, b"%d" % number) for run in runs for number in range(5)]
    messages = as_messages(ends.gateway.turn(0.2, [], batch))
    assert ends.gateway_disk.writes == before + 1
    assert len(messages) == len(runs), "what a request has to say is one message"


def test_acknowledgements_of_many_requests_in_one_turn_are_one_write(ends: Pair) -> None:
    runs = ends.begin(8)
    batch = [Produced(run, bytes(60)) for run in runs]
    answers = as_messages(ends.gateway.turn(0.2, [], batch))
    before = ends.device_disk.writes
    said = ends.device.turn(0.2, answers)
    assert [type(effect) for effect in said] == [Delivered] * 8
    said = ends.device.turn(0.2 + ends.timing.ack_delay_s, [])
    assert [message.payload[0] for message in as_messages(said)] == [MessageType.CONTROL] * 8
    assert ends.device_disk.writes == before + 1


def test_a_disk_that_refuses_acknowledges_none_of_a_turn(ends: Pair) -> None:
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
        ends = Pair(root, Timing(pacing="off"))
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
    ends: Pair,
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


def test_without_room_nothing_is_sealed_whatever_devices_ask_again(ends: Pair) -> None:
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


def test_leases_end_while_nothing_leaves(ends: Pair) -> None:
    ends.begin(2)
    ends.gateway.turn(1.0, [], [], room_bytes=0)
    assert ends.gateway.load > 0
    end_s = 1.0 + ends.timing.lease_s
    while (now_s := ends.gateway.next_wakeup_s()) <= end_s:
        ends.gateway.turn(now_s, [], [], room_bytes=0)
    assert ends.gateway.load == 0


def test_what_was_sent_before_has_to_leave_before_a_request_is_sent_again(ends: Pair) -> None:
    first, _ = ends.ask(1)
    assert len(first) == 1
    assert as_messages(ends.device.turn(30.0, [], may_send=False)) == []
    assert ends.device.next_wakeup_s() > 30.0, "no turns for nothing"
    assert len(as_messages(ends.device.turn(31.0, []))) == 1


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


# Power cuts.


def test_a_power_cut_takes_payloads_but_no_row_no_attempt_and_no_ending(tmp_path: Path) -> None:
    disk = CrashingDatabase(tmp_path / "g.sqlite", gateway_store.SCHEMA)
    store = GatewayStore(disk)
    key = RequestKey(DeviceId(b"d" * 16), new_request_id(int(WALL_S * 1000)))

    def cut_power() -> GatewayStore:
        disk.fuse, disk.after_commit, disk.power_cut = 0, False, True
        with pytest.raises(Crash):
            store.use_attempt(key, 99)
        return GatewayStore(disk)

    store.begin(key, 0, expires_ms=NEVER)
    store.append([Progress(key=key, first=0, payloads=[b"a", b"b"])])
    store.append([Progress(key=key, first=2, payloads=[b"c"])])
    store = cut_power()
    assert disk.lost_writes == 2
    assert store.payloads(key) == []
    row = store.find(key)
    assert row is not None
    assert row.attempt == 0

    store.append([Progress(key=key, first=0, payloads=[b"a"])])
    store.use_attempt(key, 7)
    store.append([Progress(key=key, first=1, payloads=[b"b"])])
    store = cut_power()
    assert store.payloads(key) == [b"a"], "what is synced puts all before it on the disk"
    row = store.find(key)
    assert row is not None
    assert row.attempt == 7

    store.append([Progress(key=key, first=1, payloads=[b"b"])])
    store.append([Progress(key=key, first=2, payloads=[], status=Status.COMPLETE)])
    store = cut_power()
    assert store.payloads(key) == [b"a", b"b"]
    row = store.find(key)
    assert row is not None
    assert row.status is Status.COMPLETE
    disk.close()


def test_only_writes_that_may_be_lost_go_without_a_sync(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.sqlite", gateway_store.SCHEMA)
    normal, full = 1, 2
    for synced, level in ((False, normal), (True, full), (True, full), (False, normal)):
        with database.write(synced=synced) as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (level,)
    with database.write() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (full,)
    database.close()


def test_values_of_one_row_are_sealed_apart_and_open_in_their_place_only(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.sqlite", gateway_store.SCHEMA)
    values = [(b"row%d" % (number % 2), f"chunk {number}", b"same") for number in range(6)]
    sealed = database.cipher.seal_all(values)
    assert len(set(sealed)) == len(sealed)
    for (row, column, data), value in zip(values, sealed, strict=True):
        assert database.cipher.open(row, column, value) == data
    # More rows than it keeps ciphers of.
    many = [(b"%d" % number, "c", b"x") for number in range(3000)]
    for (row, column, data), value in zip(many, database.cipher.seal_all(many), strict=True):
        assert database.cipher.open(row, column, value) == data
    database.close()


@pytest.mark.parametrize("repeats", [True, False], ids=["deterministic", "diverging"])
def test_after_a_power_cut_an_answer_goes_on_only_if_the_new_run_says_the_same(
    ends: Pair, repeats: bool
) -> None:
    (run,) = ends.begin(1)
    sent = as_messages(ends.gateway.turn(0.2, [], [Produced(run, b"a"), Produced(run, b"b")]))
    (delivered,) = ends.device.turn(0.2, sent)
    assert isinstance(delivered, Delivered)
    acknowledged = as_messages(ends.device.turn(1.0, []))
    ends.gateway.turn(1.0, acknowledged, [])
    ends.gateway_disk.fuse, ends.gateway_disk.power_cut = 0, True
    with pytest.raises(Crash):
        ends.gateway.advert((), None)
    assert ends.gateway_disk.lost_writes > 0
    ends.start_gateway()

    again = as_messages(ends.device.turn(20.0, []))
    effects = ends.gateway.turn(20.0, again, [])
    (start,) = [effect for effect in effects if isinstance(effect, Start)]
    answer = [b"a", b"b", b"c", b"d"] if repeats else [b"a", b"x", b"c", b"d"]
    outputs = [Produced(start.run, payload) for payload in answer]
    finish = Produced(start.run, Finished(Status.COMPLETE))
    effects += ends.gateway.turn(20.1, [], [*outputs, finish])
    said = ends.device.turn(20.1, as_messages(effects))
    payloads = [p for one in said if isinstance(one, Delivered) for p in one.payloads]
    (ended,) = [effect for effect in said if isinstance(effect, Ended)]
    assert (payloads, ended.code) == (([b"c", b"d"], "") if repeats else ([], "answer_diverged"))


# The shells.


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
