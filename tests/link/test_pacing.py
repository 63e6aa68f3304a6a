"""When chunks leave the gateway and how large they are: neither follows the text."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linklab import FAST, new_peers
from linkpair import linked

from tidegate.link.effects import InboundRequest
from tidegate.link.gateway_pacing import at_least_bytes, next_beat_s, usable_bytes
from tidegate.link.gateway_session import GatewaySession
from tidegate.link.messages import Bundle, Control, ControlKind, Status
from tidegate.link.timing import Timing

TICK_S = 0.04
TICK = Timing(pacing="tick", tick_s=TICK_S, credit=8)
CONSTANT = Timing(pacing="constant", tick_s=TICK_S, credit=8, chunk_bytes=512)
PEERS = new_peers()


def beats(session: GatewaySession, until_s: float) -> list[tuple[float, list[Bundle]]]:
    """Poll whenever the session says so; what left when."""
    left, now_s = [], 0.0
    while (now_s := max(now_s, session.next_wakeup_s())) <= until_s:
        bundles = session.poll(now_s)
        if bundles:
            left.append((now_s, bundles))
        assert session.next_wakeup_s() > now_s, "it would spin"
    return left


@given(st.floats(0.0, 1e6), st.sampled_from([0.001, 0.02, 0.04, 1.0]))
def test_a_beat_is_a_multiple_of_the_tick_and_less_than_two_away(now_s: float, tick: float) -> None:
    at_s = next_beat_s(now_s, Timing(tick_s=tick))
    assert now_s < at_s <= now_s + tick * 1.001
    assert math.isclose(at_s / tick, round(at_s / tick), rel_tol=1e-9)
    assert next_beat_s(at_s, Timing(tick_s=tick)) > at_s


def test_payloads_wait_for_the_beat_and_leave_on_it_together() -> None:
    session = GatewaySession(timing=TICK, now_s=0.0, stored=[])
    assert session.poll(0.0) == [Bundle(first=0)], "the sign of life does not wait"
    session.produce(b"a")
    assert session.poll(0.013) == []
    session.produce(b"b")
    assert session.poll(0.031) == []
    assert session.next_wakeup_s() == TICK_S
    assert session.poll(TICK_S) == [Bundle(first=0, payloads=(b"a", b"b"))]
    session.produce(b"c")
    assert session.poll(TICK_S) == []
    assert session.poll(2 * TICK_S) == [Bundle(first=2, payloads=(b"c",))]


def test_with_nothing_to_send_there_is_no_beat_to_wake_up_for() -> None:
    session = GatewaySession(timing=TICK, now_s=0.0, stored=[])
    session.poll(0.0)
    session.produce(b"a")
    session.poll(0.01)
    session.on_request(0.02, have=1, credit=8, ttl_s=60.0)
    session.poll(0.02)
    assert session.next_wakeup_s() == 0.02 + TICK.heartbeat_s


def test_without_a_tick_there_is_no_beat() -> None:
    session = GatewaySession(timing=Timing(pacing="constant", tick_s=0.0), now_s=0.0, stored=[])
    session.produce(b"a")
    assert session.poll(0.0) == [Bundle(first=0, payloads=(b"a",))]


payload_times = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 300)), min_size=1, max_size=60
).map(sorted)


@given(payload_times, st.integers(0, 10))
@settings(max_examples=40, deadline=None)  # a hundred sealed chunks each
def test_at_a_constant_rate_every_beat_has_one_chunk_of_one_size_until_the_end(
    payloads: list[tuple[int, int]], pause: int
) -> None:
    message, _ = PEERS.seal(b"prompt")
    keys = PEERS.open(message)
    session = GatewaySession(timing=CONSTANT, now_s=0.0, stored=[])
    session.poll(0.0)
    left = list(payloads)
    ends_at = payloads[-1][0] + pause
    chunks: dict[int, list[Bundle]] = {}
    sizes = set()
    got: list[bytes] = []
    beat = 0
    while session.state.value != "finished" or not session._final_sent:
        while left and left[0][0] <= beat:
            session.produce(bytes(left.pop(0)[1]))
        if beat == ends_at:
            session.finish(Status.COMPLETE, "")
        session.poll((beat + 0.5) * TICK_S)
        beat += 1
        now_s = session.next_wakeup_s()
        assert math.isclose(now_s, beat * TICK_S)
        chunks[beat] = session.poll(now_s)
        for bundle in chunks[beat]:
            data = bundle.encode()
            padded = at_least_bytes(len(data), CONSTANT)
            final = bundle.status is not Status.MORE
            sizes.add(len(keys.seal_response(data, final=final, at_least_bytes=padded)))
            got += bundle.payloads
            have, seen = bundle.end, beat
            ack = Control(kind=ControlKind.ACK, have=have, credit=8, seen=seen)
            session.on_ack(now_s, ack)
        assert beat < 10_000
    assert [len(bundles) for bundles in chunks.values()] == [1] * beat
    assert len(sizes) == 1
    assert [len(payload) for payload in got] == [size for _, size in payloads]
    total_bytes = sum(size + 4 for _, size in payloads)
    assert beat <= ends_at + 1 + 2 * total_bytes / usable_bytes(CONSTANT) + 2


def test_at_a_constant_rate_a_closed_window_sends_fillers() -> None:
    session = GatewaySession(timing=CONSTANT, now_s=0.0, stored=[])
    for _ in range(30):
        session.produce(bytes(400))
    left = beats(session, 1.0)
    assert sum(len(bundles) for _, bundles in left) == len(left) >= 25
    carried = [bundle for _, (bundle,) in left if bundle.payloads]
    assert len(carried) == CONSTANT.credit


@pytest.mark.parametrize(("payload_bytes", "chunks"), [(300, 1), (497, 1), (498, 2), (60_000, 118)])
def test_a_payload_too_large_for_a_chunk_travels_alone_in_a_multiple_of_it(
    payload_bytes: int, chunks: int
) -> None:
    bundle = Bundle(first=0, payloads=(bytes(payload_bytes),))
    padded = at_least_bytes(len(bundle.encode()), CONSTANT)
    assert padded % CONSTANT.chunk_bytes == 0
    session = GatewaySession(timing=CONSTANT, now_s=0.0, stored=[])
    session.poll(0.0)
    session.produce(bytes(payload_bytes))
    session.produce(b"next")
    _, (first,) = beats(session, 0.05)[-1]
    assert first.payloads[0] == bytes(payload_bytes)
    assert len(first.payloads) == (1 if payload_bytes > 425 else 2)
    assert padded == CONSTANT.chunk_bytes * chunks


def test_an_answer_over_a_broker_is_chunks_of_one_size_whatever_it_says(tmp_path: Path) -> None:
    async def speaks(_: InboundRequest) -> AsyncIterator[bytes]:
        for number in range(6):
            await asyncio.sleep(0.03 if number == 3 else 0.001)
            yield bytes(number * 40)

    async def ask() -> set[int]:
        timing = replace(FAST, pacing="constant", tick_s=0.01, chunk_bytes=512)
        async with linked(tmp_path, speaks, timing=timing) as pair:
            answer = pair.device.request(b"prompt", deadline_s=10.0)
            assert [len(payload) async for payload in answer] == [0, 40, 80, 120, 160, 200]
            return {len(message.payload) for message in pair.broker.seen if "/r/" in message.topic}

    assert len(asyncio.run(ask())) == 1
