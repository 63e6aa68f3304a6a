"""The man in the middle does what its seed says, and nothing that MQTT would not survive."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from chaosplan import HELD_FRAMES, Deeds, Direction, Exchange, Faults, Plan
from chaosproxy import ChaosProxy
from hypothesis import given
from hypothesis import strategies as st
from mqttframes import (
    FrameError,
    FrameKind,
    FrameReader,
    acknowledgement,
    parse_publish,
    publish,
    write_varint,
)

UP, DOWN = Direction.UP, Direction.DOWN
CONNECT_V4 = bytes((0x10, 12)) + b"\0\4MQTT\4\2\0\36\0\0"
CONNECT_V5 = bytes((0x10, 13)) + b"\0\4MQTT\5\2\0\36\0\0\0"
NEVER = Faults()


def exchange(faults: Faults = NEVER, seed: int = 0) -> Exchange:
    return Exchange(Plan(seed, faults), Deeds())


def numbered(number: int, qos: int = 1) -> bytes:
    return publish("t/1", b"payload %d" % number, qos=qos, packet_id=number if qos else 0)


messages = st.lists(
    st.tuples(st.binary(max_size=300), st.integers(0, 2), st.sampled_from(["a", "b/c", "é"])),
    max_size=8,
)


@given(messages, st.lists(st.integers(1, 40), min_size=1))
def test_frames_come_out_whole_however_they_are_split(
    given_messages: list[tuple[bytes, int, str]], steps: list[int]
) -> None:
    frames = [
        publish(topic, payload, qos=qos, packet_id=number + 1)
        for number, (payload, qos, topic) in enumerate(given_messages)
    ]
    stream, reader = b"".join(frames), FrameReader()
    got: list[bytes] = []
    sizes = itertools.cycle(steps)
    while stream:
        size = next(sizes)
        got += reader.feed(stream[:size])
        stream = stream[size:]
    assert got == frames
    assert reader.held_bytes == 0


@given(st.binary(max_size=2000), st.integers(0, 2), st.sampled_from([4, 5]))
def test_a_publish_is_taken_apart_as_it_was_put_together(
    payload: bytes, qos: int, level: int
) -> None:
    frame = publish("a/b", payload, qos=qos, packet_id=7, level=level)
    parsed = parse_publish(frame, level)
    assert (parsed.topic, parsed.qos, parsed.payload) == ("a/b", qos, payload)
    assert parsed.packet_id == (7 if qos else 0)


@given(st.binary(max_size=60), st.sampled_from([4, 5]))
def test_nothing_but_a_frame_error_comes_of_what_is_not_mqtt(data: bytes, level: int) -> None:
    try:
        for frame in FrameReader(largest_bytes=1000).feed(b"\x32" + data):
            parse_publish(frame, level)
    except FrameError:
        pass


def test_a_frame_beyond_the_largest_is_refused_before_it_is_held() -> None:
    reader = FrameReader(largest_bytes=1000)
    with pytest.raises(FrameError, match="at most 1000"):
        reader.feed(b"\x30" + write_varint(1001))


def test_the_same_seed_decides_the_same_and_another_one_otherwise() -> None:
    faults = Faults(drop=0.2, duplicate=0.2, reorder=0.2, corrupt=0.2, delay=0.2, cut=0.1)

    def fates(seed: int) -> list[object]:
        plan = Plan(seed, faults)
        return [plan.fate(way, number) for way in Direction for number in range(200)]

    assert fates(1) == fates(1)
    assert fates(1) != fates(2)


def test_accidents_happen_as_often_as_asked() -> None:
    plan = Plan(3, Faults(drop=0.02, duplicate=0.05, reorder=0.5))
    fates = [plan.fate(UP, number) for number in range(20_000)]
    assert sum(fate.drop for fate in fates) == pytest.approx(400, abs=80)
    assert sum(fate.duplicate for fate in fates) == pytest.approx(1000, abs=130)
    assert sum(fate.reorder for fate in fates) == pytest.approx(10_000, abs=300)


def test_without_faults_every_frame_passes_untouched() -> None:
    line = exchange()
    for frame in (CONNECT_V4, numbered(1), b"\xc0\0", acknowledgement(FrameKind.PUBACK, 1)):
        assert line.receive(UP, frame).forward == (frame,)


def test_a_dropped_qos_1_message_is_acknowledged_as_a_dying_broker_does() -> None:
    step = exchange(Faults(drop=1.0)).receive(UP, numbered(5))
    assert step.forward == ()
    assert step.back == (acknowledgement(FrameKind.PUBACK, 5),)


def test_a_dropped_qos_2_message_gets_its_whole_handshake_and_nobody_else_hears_of_it() -> None:
    line = exchange(Faults(drop=1.0))
    step = line.receive(DOWN, numbered(5, qos=2))
    assert (step.forward, step.back) == ((), (acknowledgement(FrameKind.PUBREC, 5),))
    step = line.receive(DOWN, acknowledgement(FrameKind.PUBREL, 5))
    assert (step.forward, step.back) == ((), (acknowledgement(FrameKind.PUBCOMP, 5),))


@pytest.mark.parametrize(("qos", "kind"), [(1, FrameKind.PUBACK), (2, FrameKind.PUBREC)])
def test_of_two_acknowledgements_for_a_repeated_message_one_arrives(
    qos: int, kind: FrameKind
) -> None:
    line = exchange(Faults(duplicate=1.0))
    first, second = line.receive(UP, numbered(9, qos)).forward
    assert first == numbered(9, qos)
    assert second[0] == first[0] | 0x08, "a repetition says so"
    assert second[1:] == first[1:]
    got = [line.receive(DOWN, acknowledgement(kind, 9)).forward for _ in range(2)]
    assert got == [(), (acknowledgement(kind, 9),)]


def test_an_acknowledgement_the_other_way_is_not_mistaken_for_ours() -> None:
    line = exchange(Faults(duplicate=1.0))
    line.receive(UP, numbered(9))
    theirs = acknowledgement(FrameKind.PUBACK, 9)
    assert line.receive(UP, theirs).forward == (theirs,)


def test_an_overtaken_message_comes_after_the_next_one_with_its_own_id() -> None:
    plan = Plan(0, Faults(reorder=0.5))
    late = [number for number in range(1, 40) if plan.fate(UP, number).reorder]
    line = exchange(Faults(reorder=0.5))
    out: list[bytes] = []
    for number in range(1, 40):
        out += line.receive(UP, numbered(number)).forward
    out += line.release(UP)
    assert out != [numbered(number) for number in range(1, 40)]
    assert sorted(out) == sorted(numbered(number) for number in range(1, 40))
    assert out.index(numbered(late[0])) > late[0] - 1


def test_no_more_than_so_many_messages_wait_to_be_overtaken() -> None:
    line = exchange(Faults(reorder=1.0, duplicate=1.0))
    for number in range(1, 200):
        line.receive(DOWN, numbered(number))
        assert line.holds(DOWN) <= HELD_FRAMES


def test_a_goodbye_overtakes_nothing() -> None:
    line = exchange(Faults(reorder=1.0))
    assert line.receive(UP, numbered(1)).forward == ()
    assert line.receive(UP, b"\xe0\0").forward == (numbered(1), b"\xe0\0")


def test_one_bit_of_the_payload_is_damaged_and_nothing_else() -> None:
    for number in range(1, 50):
        (frame,) = exchange(Faults(corrupt=1.0), seed=number).receive(UP, numbered(7)).forward
        whole = numbered(7)
        at = parse_publish(whole, 4).payload_at
        assert frame[:at] == whole[:at]
        changed = [a ^ b for a, b in zip(frame, whole, strict=True) if a != b]
        assert len(changed) == 1
        assert changed[0].bit_count() == 1


def test_a_message_that_sets_a_topic_alias_is_never_lost() -> None:
    line = exchange(Faults(drop=1.0))
    line.receive(UP, CONNECT_V5)
    plain = publish("t", b"x", qos=1, packet_id=1, level=5)
    assert line.receive(UP, plain).forward == ()
    body = b"\0\1t" + b"\0\2" + b"\3" + b"\x23\0\1" + b"x"
    alias = b"\x32" + write_varint(len(body)) + body
    assert line.receive(UP, alias).forward == (alias,)


@dataclass
class RawBroker:
    """Listens, keeps what it gets, and says what it is told to."""

    got: bytearray = field(default_factory=bytearray)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while data := await reader.read(1 << 16):
                self.got += data
        except ConnectionResetError:
            pass
        finally:
            writer.close()

    async def until(self, size_bytes: int) -> bytes:
        while len(self.got) < size_bytes:
            await asyncio.sleep(0.005)
        return bytes(self.got)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A client's connection through a proxy, and who is at the other end."""

    proxy: ChaosProxy
    broker: RawBroker
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def through(faults: Faults, main: Callable[[Wire], Coroutine[None, None, None]]) -> None:
    """Run `main` with one client connected through a proxy."""
    broker = RawBroker()
    server = await asyncio.start_server(broker.serve, "127.0.0.1", 0)
    broker_port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(20), ChaosProxy(broker_port, seed=1).running() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(CONNECT_V4)
        await broker.until(len(CONNECT_V4))
        broker.got.clear()
        proxy.set_faults(faults)
        try:
            await main(Wire(proxy=proxy, broker=broker, reader=reader, writer=writer))
        finally:
            writer.close()
    server.close()
    for one in broker.writers:
        one.close()
    await server.wait_closed()


def test_bytes_pass_both_ways_and_are_counted() -> None:
    async def main(wire: Wire) -> None:
        sent = [publish("t", bytes(90_000), qos=1, packet_id=1), numbered(2)]
        for piece in (sent[0][:70_000], sent[0][70_000:] + sent[1][:3], sent[1][3:]):
            wire.writer.write(piece)
            await wire.writer.drain()
        assert await wire.broker.until(len(b"".join(sent))) == b"".join(sent)
        wire.broker.writers[0].write(numbered(3, qos=0))
        assert await wire.reader.readexactly(len(numbered(3, qos=0))) == numbered(3, qos=0)
        deeds = wire.proxy.snapshot()
        assert (deeds.messages_up, deeds.messages_down, deeds.connections) == (2, 1, 1)
        assert deeds.bytes_up == len(b"".join(sent))

    asyncio.run(through(NEVER, main))


def test_a_message_that_nothing_overtakes_goes_on_by_itself() -> None:
    async def main(wire: Wire) -> None:
        wire.writer.write(numbered(1))
        assert await wire.broker.until(1) == numbered(1)
        assert wire.proxy.deeds.reordered == 1

    asyncio.run(through(Faults(reorder=1.0, hold_s=0.02), main))


def test_a_cut_ends_the_connection_for_both() -> None:
    async def main(wire: Wire) -> None:
        wire.writer.write(numbered(1))
        with suppress(ConnectionResetError):
            assert await wire.reader.read() == b""
        assert bytes(wire.broker.got) == b""
        assert wire.proxy.deeds.cut == 1

    asyncio.run(through(Faults(cut=1.0), main))


def test_nothing_passes_a_partition_and_everything_does_after_it() -> None:
    async def main(wire: Wire) -> None:
        wire.proxy.partition(0.3)
        for number in (1, 2):
            wire.writer.write(numbered(number))
        await asyncio.sleep(0.15)
        assert bytes(wire.broker.got) == b""
        sent = numbered(1) + numbered(2)
        assert await wire.broker.until(len(sent)) == sent
        assert wire.proxy.deeds.partitioned == 1

    asyncio.run(through(NEVER, main))


def test_a_side_that_reads_nothing_does_not_fill_our_memory() -> None:
    async def main(wire: Wire) -> None:
        wire.broker.writers[0].transport.pause_reading()  # type: ignore[attr-defined]
        frame = publish("t", bytes(200_000), qos=0)
        passed = 0
        try:
            async with asyncio.timeout(1.0):
                for _ in range(400):
                    wire.writer.write(frame)
                    await wire.writer.drain()
                    passed += 1
        except TimeoutError:
            pass
        assert passed < 400, "80 MB went somewhere"

    asyncio.run(through(NEVER, main))


def test_a_client_that_speaks_no_mqtt_is_cut_off_and_counted() -> None:
    async def main(wire: Wire) -> None:
        wire.writer.write(b"\x30\xff\xff\xff\xff\xff")
        while not wire.proxy.deeds.malformed:
            await asyncio.sleep(0.005)

    asyncio.run(through(NEVER, main))


def test_without_a_broker_a_client_is_turned_away() -> None:
    async def main() -> None:
        probe = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = probe.sockets[0].getsockname()[1]
        probe.close()
        await probe.wait_closed()
        async with asyncio.timeout(10), ChaosProxy(port, seed=1).running() as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(main())
