"""Whom a gateway refuses: revoked and expired devices, and those for which there is no place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from coreends import Ends, published, started

from tidegate.errors import ConfigError
from tidegate.link.device_states import State
from tidegate.link.effects import (
    Delivered,
    Ended,
    Publish,
    Start,
    Stop,
)
from tidegate.link.fleet import add_device
from tidegate.link.gateway_output import Produced
from tidegate.link.identity import load_device
from tidegate.link.messages import Call


def test_a_revoked_device_is_refused_by_name_from_the_next_request_on(ends: Ends) -> None:
    name = ends.ask()
    request = ends.request()
    ends.registry.revoke(load_device(ends.root / "device").device_id)
    (refusal,) = published(ends.to_gateway(request))
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=name, state=State.FAILED, code="device_revoked")
    assert ends.gateway.load == 0.0


def test_a_revocation_ends_what_runs_with_the_devices_next_message(ends: Ends) -> None:
    name = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.registry.revoke(load_device(ends.root / "device").device_id)
    cancel, _ = ends.device.cancel(0.0, name)
    assert isinstance(cancel, Publish)
    effects = ends.to_gateway(cancel)
    assert Stop(start.run) in effects
    assert ends.gateway.load == 0.0
    assert ends.gateway.tally.snapshot().refused == 1


def test_a_stream_ends_with_the_reason_when_its_device_is_revoked_in_its_middle(
    ends: Ends,
) -> None:
    name = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.now_s += 0.1
    (chunk,) = published(ends.gateway.produced(ends.now_s, [Produced(start.run, b"half")]))
    (delivered,) = ends.to_device(chunk)
    assert isinstance(delivered, Delivered)
    ends.registry.revoke(load_device(ends.root / "device").device_id)
    ends.now_s += 1.0
    (acknowledgement,) = ends.device.poll(ends.now_s)
    assert isinstance(acknowledgement, Publish)
    effects = ends.to_gateway(acknowledgement)
    assert Stop(start.run) in effects
    (refusal,) = published(effects)
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=name, state=State.FAILED, code="device_revoked")


@pytest.mark.parametrize(("late_s", "taken"), [(-1, True), (599, True), (600, False)])
def test_a_device_whose_certificate_ended_is_refused_ten_minutes_later(
    ends: Ends, late_s: int, taken: bool
) -> None:
    device = load_device(ends.root / "device")
    record = ends.registry.find(device.device_id)
    assert record is not None
    ends.registry.add(dataclasses.replace(record, expires_s=int(ends.wall_s()) - late_s))
    name = ends.ask()
    effects = ends.to_gateway(ends.request())
    assert any(isinstance(one, Start) for one in effects) == taken
    if not taken:
        (refusal,) = published(effects)
        ended = ends.to_device(refusal)[-1]
        assert ended == Ended(request_id=name, state=State.FAILED, code="device_expired")


def test_a_request_beyond_the_places_is_refused_and_runs_when_asked_again(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=1)
    ends.meet()
    ends.ask()
    start = started(ends.to_gateway(ends.request()))
    second = ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=second, state=State.FAILED, code="over_capacity")
    ends.device.release(second)
    ends.finish(start.run, b"one")
    assert ends.gateway.load == 0.0
    ends.device.submit(0.0, b"", request_id=second, deadline_s=600.0, model=None)
    assert started(ends.to_gateway(ends.request())).request.request_id == second
    ends.close()


def test_answers_nobody_fetches_cannot_pile_up(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=4)
    ends.meet()
    for _ in range(8):
        ends.ask()
        ends.finish(started(ends.to_gateway(ends.request())).run, b"one")
    ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    assert isinstance(ends.to_device(refusal)[-1], Ended)
    assert ends.gateway.tally.snapshot().refused == 1
    ends.close()


def test_one_device_gets_half_of_the_places_at_most(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=4)
    add_device(tmp_path / "gateway" / "fleet", tmp_path / "other", [tmp_path / "gateway"])
    ends.meet()
    for _ in range(2):
        ends.ask()
        started(ends.to_gateway(ends.request()))
    third = ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=third, state=State.FAILED, code="over_capacity")
    message = ends.seal_as("other", Call(have=0, credit=0, ttl_ms=2**32 - 1, body=b""))
    started(ends.to_gateway(message))
    ends.close()


def test_a_gateway_needs_at_least_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_requests = 0"):
        Ends(tmp_path, max_requests=0)
