"""The two cores against what a hostile or broken network can bring them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from coreends import OFFERS, Ends, published, started
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.errors import RequestError
from tidegate.link.device_states import State
from tidegate.link.effects import (
    Delivered,
    DeviceEffect,
    Ended,
    Publish,
    Stop,
)
from tidegate.link.envelope import (
    MessageType,
    RequestId,
    new_request_id,
    route,
    seal_request,
)
from tidegate.link.gateway_output import Produced
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.messages import Call
from tidegate.link.timing import Timing


def test_a_request_reaches_the_handler_and_its_answer_the_application(ends: Ends) -> None:
    request_id = ends.ask(b"prompt")
    start = started(ends.to_gateway(ends.request()))
    assert start.request.body == b"prompt"
    assert start.request.request_id == request_id
    (answer,) = ends.finish(start.run, b"one", b"two")
    delivered, done, ended = ends.to_device(answer)
    assert delivered == Delivered(request_id=request_id, first=0, payloads=(b"one", b"two"))
    assert ended == Ended(request_id=request_id, state=State.DONE, code="")
    assert isinstance(done, Publish)
    ends.to_gateway(done)
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert standing.payloads == [b"one", b"two"]
    assert ends.gateway.tally.snapshot().completed == 1


def flips(message: Publish) -> Iterator[Publish]:
    for at in range(len(message.payload)):
        damaged = bytearray(message.payload)
        damaged[at] ^= 1 << (at % 8)
        yield Publish(topic=message.topic, payload=bytes(damaged))


def test_every_flipped_byte_of_every_message_is_dropped_and_counted(ends: Ends) -> None:
    ends.ask(b"prompt")
    request = ends.request()
    for damaged in flips(request):
        assert ends.to_gateway(damaged) == []
    assert ends.gateway.tally.snapshot().dropped == len(request.payload)
    start = started(ends.to_gateway(request))
    (answer,) = ends.finish(start.run, b"one")
    for damaged in flips(answer):
        assert ends.to_device(damaged) == []
    assert ends.device.tally.snapshot().dropped == len(answer.payload)
    done = ends.to_device(answer)[1]
    assert isinstance(done, Publish)
    before = ends.gateway.tally.snapshot().dropped
    for damaged in flips(done):
        assert ends.to_gateway(damaged) == []
    assert ends.gateway.tally.snapshot().dropped == before + len(done.payload)


def test_every_flipped_byte_of_an_advert_is_counted(ends: Ends) -> None:
    advert = ends.gateway.advert(OFFERS, 0.5)
    for damaged in flips(advert):
        ends.to_device(damaged)
    assert ends.device.tally.snapshot().adverts_rejected == len(advert.payload)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.sampled_from(["advert", "q/x", "r/x", ""]))
def test_junk_never_raises(ends: Ends, payload: bytes, end: str) -> None:
    topic = f"tidegate/1/home/gw/gw0/{end}"
    assert ends.device.receive(0.0, topic, payload) == []
    assert ends.gateway.receive(0.0, topic, payload) == []


def test_junk_behind_a_good_head_never_raises(ends: Ends) -> None:
    ends.ask()
    request = ends.request()
    (life,) = published(ends.to_gateway(request))
    ends.to_device(life)
    (ack,) = ends.device.poll(1.0)
    assert isinstance(ack, Publish)
    rng = random.Random(0)
    for message, cuts in ((request, (1, 31, 111)), (life, (1, 19, 60)), (ack, (1, 19, 27))):
        for _ in range(200):
            junk = message.payload[: rng.choice(cuts)] + rng.randbytes(rng.randrange(600))
            assert ends.gateway.receive(0.0, request.topic, junk) == []
            assert ends.device.receive(0.0, life.topic, junk) == []
    ends.to_gateway(ack)
    assert ends.gateway.tally.snapshot().dropped == 600
    assert ends.device.tally.snapshot().dropped == 600


def test_a_replayed_request_never_runs_again(ends: Ends) -> None:
    ends.ask()
    request = ends.request()
    start = started(ends.to_gateway(request))
    assert ends.to_gateway(request) == []
    (answer,) = ends.finish(start.run, b"one")
    done = ends.to_device(answer)[1]
    assert isinstance(done, Publish)
    ends.to_gateway(done)
    assert ends.to_gateway(request) == []
    ends.start_gateway()
    assert ends.to_gateway(request) == []
    assert ends.gateway.tally.snapshot().duplicates == 1


@pytest.mark.parametrize("shift_s", [-73 * 3600, 25 * 3600])
def test_a_request_made_too_long_ago_or_ahead_is_dropped(ends: Ends, shift_s: int) -> None:
    device, prekey = load_device(ends.root / "device"), ends.prekeys.public(ends.wall_s())[0]
    (message,), _ = seal_request(
        Call(have=0, credit=1, ttl_ms=1000, body=b"").encode(),
        request_id=new_request_id(int((ends.wall_s() + shift_s) * 1000)),
        attempt=0,
        prekey_id=prekey.prekey_id,
        prekey=prekey.public,
        gateway_key=load_gateway(ends.root / "gateway").key.public_key(),
        device_id=device.device_id,
        device_key=device.key,
        handle=device.handle,
    )
    topic = f"tidegate/1/home/gw/gw0/q/{device.handle}"
    assert ends.gateway.receive(0.0, topic, message) == []
    assert ends.gateway.tally.snapshot().dropped == 1


@pytest.mark.parametrize(
    "name",
    [b"", bytes(16), b"\xff" * 16, new_request_id(1)],
    ids=["empty", "zeros", "ones", "too old"],
)
def test_an_id_that_a_gateway_would_drop_is_refused_at_once(ends: Ends, name: bytes) -> None:
    with pytest.raises(RequestError, match="request_id"):
        ends.device.submit(0.0, b"", request_id=RequestId(name), deadline_s=600.0, model=None)


def test_a_late_refusal_of_an_old_attempt_ends_nothing(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=1)
    ends.meet()
    busy = started(
        ends.to_gateway(ends.seal_as("device", Call(have=0, credit=1, ttl_ms=9, body=b"")))
    )
    ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    ends.finish(busy.run)
    ends.now_s = 30.0
    effects = ends.to_gateway(ends.request())
    start = started(effects)
    for life in published(effects):
        ends.to_device(life)
    assert ends.to_device(refusal) == []
    (answer,) = ends.finish(start.run, b"one")
    ended = ends.to_device(answer)[-1]
    assert isinstance(ended, Ended)
    assert ended.state is State.DONE
    ends.close()


def test_a_cancel_stops_the_handler_and_a_later_attempt_is_told(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    cancel, ended = ends.device.cancel(0.0, request_id)
    assert ended == Ended(request_id=request_id, state=State.CANCELLED, code="")
    assert isinstance(cancel, Publish)
    assert ends.to_gateway(cancel) == [Stop(start.run)]
    assert ends.outbox.ids() == []
    assert ends.gateway.tally.snapshot().cancelled == 1
    assert ends.gateway.produced(0.0, [Produced(start.run, b"late")]) == []


def test_a_lost_cancel_is_repeated_when_the_gateway_goes_on(ends: Ends) -> None:
    request_id = ends.ask()
    effects = ends.to_gateway(ends.request())
    start = started(effects)
    ends.device.cancel(0.0, request_id)
    (life,) = published(effects)
    ends.now_s = 1.0
    (again,) = ends.to_device(life)
    assert isinstance(again, Publish)
    assert ends.to_gateway(again) == [Stop(start.run)]


def test_a_lost_end_is_confirmed_when_the_gateway_repeats_it(ends: Ends) -> None:
    ends.ask()
    start = started(ends.to_gateway(ends.request()))
    (answer,) = ends.finish(start.run, b"one")
    ends.to_device(answer)
    ends.now_s = 3.0
    (repeated,) = published(ends.gateway.poll(ends.now_s))
    (done,) = ends.to_device(repeated)
    assert isinstance(done, Publish)
    ends.to_gateway(done)
    ends.now_s = 30.0
    assert ends.gateway.poll(ends.now_s) == []


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, math.nan, math.inf, 73 * 3600.0])
def test_a_deadline_out_of_range_is_refused_with_the_limits(ends: Ends, deadline_s: float) -> None:
    with pytest.raises(RequestError, match=r"deadline_s: .*above 0 and at most 259200"):
        ends.device.submit(
            0.0, b"", request_id=new_request_id(0), deadline_s=deadline_s, model=None
        )


def test_nothing_is_sent_while_disconnected(ends: Ends) -> None:
    ends.device.on_disconnected()
    ends.ask()
    assert ends.device.poll(0.1) == []
    ends.device.on_connected(5.0)
    assert len(ends.device.poll(5.1)) == 1


def asked(effects: list[DeviceEffect]) -> list[RequestId]:
    """The requests that were sent, in order."""
    sent = [effect.payload for effect in effects if isinstance(effect, Publish)]
    return [route(payload).request_id for payload in sent if payload[0] == MessageType.REQUEST]


def test_urgent_requests_leave_the_outbox_before_others_and_older_ones_first(ends: Ends) -> None:
    ends.device.on_disconnected()
    names = [ends.ask(priority=priority) for priority in (2, 1, 0, 1, 0)]
    ends.device.poll(0.0)
    ends.device.on_connected(1.0)
    first, second, third, fourth, fifth = names
    assert asked(ends.device.poll(1.1)) == [third, fifth, second, fourth, first]


def test_a_full_window_keeps_the_others_waiting_and_a_quarter_free_of_bulk(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=16, timing=Timing(pacing="off", window=4, resend_min_s=20.0))
    ends.meet()
    bulk = [ends.ask(priority=2) for _ in range(5)]
    assert asked(ends.device.poll(0.1)) == bulk[:3]
    urgent = [ends.ask(priority=0) for _ in range(2)]
    assert asked(ends.device.poll(0.2)) == urgent[:1]
    assert asked(ends.device.poll(0.8)) == []
    ends.device.cancel(0.9, bulk[0])
    assert asked(ends.device.poll(0.98)) == urgent[1:]
    assert ends.device.poll(11.0), "waiting for the window is not waiting for a gateway"
    assert ends.device.remaining_s(11.0, bulk[4]) is not None
    ends.close()
