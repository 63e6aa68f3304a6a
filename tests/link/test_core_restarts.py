"""Ends that die and return, and clocks that jump: nothing runs twice, nothing is spliced."""

from __future__ import annotations

from pathlib import Path

import pytest
from coreends import WALL_S, Ends, published, started
from linklab import CrashingDatabase

from tidegate.link import gateway_store
from tidegate.link.device_states import State
from tidegate.link.effects import (
    Delivered,
    Ended,
    Stop,
)
from tidegate.link.envelope import (
    route,
)
from tidegate.link.gateway_output import Produced
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.limits import MAX_DEADLINE_S
from tidegate.link.outbox import Outcome
from tidegate.link.prekeys import VALID_FOR_S


@pytest.mark.parametrize(
    ("again", "code"),
    [
        ([b"one", b"TWO", b"three", b"four"], "answer_diverged"),
        ([b"one", b"two", b"THREE", b"four"], "answer_diverged"),
        ([b"one"], "answer_diverged"),
        ([b"failed"], "answer_diverged"),
        ([b"one", b"two", b"THREE"], ""),
        ([b"one", b"two", b"three", b"four"], ""),
    ],
)
def test_a_run_after_a_restart_must_repeat_what_was_stored(
    ends: Ends, again: list[bytes], code: str
) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    stored = [Produced(start.run, payload) for payload in (b"one", b"two", b"three")]
    (first,) = published(ends.gateway.produced(0.0, stored))
    ends.to_device(first)
    ends.start_gateway()
    ends.now_s = 30.0
    start = started(ends.to_gateway(ends.request()))
    effects = [
        effect for message in ends.finish(start.run, *again) for effect in ends.to_device(message)
    ]
    ended = effects[-1]
    assert isinstance(ended, Ended)
    assert ended.code == code
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert (
        standing.payloads
        == [b"one", b"two", b"three", *([b"four"] if code == "" else [])][: len(standing.payloads)]
    )
    assert len(standing.payloads) == (4 if code == "" and len(again) == 4 else 3)


@pytest.mark.parametrize(
    ("elsewhere", "code"),
    [
        ([b"ONE", b"two", b"three"], "answer_diverged"),
        ([b"one", b"TWO", b"three"], "answer_diverged"),
        ([b"one"], "answer_diverged"),
        ([b"one", b"TWO"], ""),
        ([b"one", b"two", b"three"], ""),
    ],
)
def test_another_gateway_goes_on_only_from_what_it_would_have_said_itself(
    ends: Ends, elsewhere: list[bytes], code: str
) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    outputs = [Produced(start.run, payload) for payload in (b"one", b"two")]
    (first,) = published(ends.gateway.produced(0.0, outputs))
    ends.to_device(first)
    ends.store.close()
    ends.store = GatewayStore(CrashingDatabase(ends.root / "other.sqlite", gateway_store.SCHEMA))
    ends.start_gateway()
    ends.now_s = 30.0
    start = started(ends.to_gateway(ends.request()))
    messages = ends.finish(start.run, *elsewhere)
    effects = [effect for message in messages for effect in ends.to_device(message)]
    assert isinstance(effects[-1], Ended)
    assert effects[-1].code == code
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert standing.payloads == [b"one", b"two", *(elsewhere[2:] if code == "" else [])]


def test_a_clock_that_jumps_ahead_deletes_no_open_request(ends: Ends) -> None:
    request_id = ends.ask()
    real, ends.wall_s = ends.wall_s, lambda: WALL_S + 90 * 86400  # type: ignore[method-assign]
    ends.start_device()
    (ended,) = ends.device.poll(0.0)
    assert ended == Ended(request_id=request_id, state=State.FAILED, code="deadline_exceeded")
    assert ends.outbox.ids() == [(request_id, Outcome.FAILED)]
    ends.wall_s = real  # type: ignore[method-assign]


def test_a_clock_that_jumps_back_keeps_no_request_for_ever(ends: Ends) -> None:
    request_id = ends.ask()
    ends.wall_s = lambda: 0.0  # type: ignore[method-assign]
    ends.start_device()
    assert ends.device.remaining_s(0.0, request_id) == MAX_DEADLINE_S


def test_prekeys_are_made_and_erased_without_a_connection(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    ends.gateway.poll(0.0)
    prekey = ends.prekeys.public(ends.wall_s())[0]
    ends.now_s = VALID_FOR_S + 1.0
    ends.gateway.poll(ends.now_s)
    assert prekey.prekey_id.hex() not in (tmp_path / "prekeys.json").read_text()
    ends.close()


def test_a_vanished_device_loses_its_generation_and_gets_a_new_one(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.gateway.produced(0.0, [Produced(start.run, b"one")])
    ends.now_s = ends.timing.lease_s
    assert Stop(start.run) in ends.gateway.poll(ends.now_s)
    assert ends.gateway.tally.snapshot().expired == 1
    effects = ends.to_gateway(ends.request())
    again = started(effects)
    assert again.run != start.run
    (stored,) = published(effects)
    (answer,) = ends.finish(again.run, b"one", b"two")
    assert ends.to_device(stored) == [Delivered(request_id=request_id, first=0, payloads=(b"one",))]
    assert ends.to_device(answer)[0] == Delivered(
        request_id=request_id, first=1, payloads=(b"two",)
    )


def test_an_attempt_number_is_not_used_again_after_a_crash(ends: Ends) -> None:
    ends.ask()
    used = [route(ends.request().payload).attempt]
    for _ in range(3):
        ends.start_device()
        ends.meet()
        used.append(route(ends.request().payload).attempt)
    assert used == [0, 1, 2, 3]


def test_a_restarted_gateway_sends_a_finished_answer_without_running_again(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.finish(start.run, b"one", b"two")
    ends.start_gateway()
    ends.now_s = 30.0
    effects = ends.to_gateway(ends.request())
    (answer,) = published(effects)
    assert effects == [answer]
    assert ends.to_device(answer)[0] == Delivered(
        request_id=request_id, first=0, payloads=(b"one", b"two")
    )
