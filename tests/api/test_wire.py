"""Events as bytes: a round trip for ours, a LinkError for everybody else's."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.tools import ToolDelta
from tidegate.api.wire import EVENT_BYTES, parse_json, read_event, write_event
from tidegate.engine.events import (
    Cancelled,
    EnergyUse,
    Failed,
    Finished,
    TextDelta,
    Timing,
    Usage,
)
from tidegate.errors import LinkError

names = st.text(max_size=40)
counts = st.integers(0, 2**53 - 1)
seconds = st.floats(0, allow_infinity=False)
usages = st.builds(
    Usage,
    prompt_tokens=counts,
    completion_tokens=counts,
    cached_tokens=counts,
    accepted_draft_tokens=counts,
    rejected_draft_tokens=counts,
)
timings = st.builds(
    Timing,
    first_scheduled_s=seconds,
    first_token_s=seconds,
    total_s=seconds,
    decode_s=seconds,
)
energies = st.builds(
    EnergyUse,
    joules=seconds,
    scope=names,
    source=st.sampled_from(["measured", "calibrated", "estimated"]),
)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
events = st.one_of(
    st.builds(
        Routed,
        route=st.sampled_from(["edge", "cloud", "cache"]),
        reason=names,
        model=names,
        request_id=names,
        dropped_messages=counts,
        dropped_tokens=counts,
    ),
    st.builds(TextDelta, text=names, tokens=tokens),
    st.builds(
        ToolDelta,
        index=st.integers(0, 4096),
        id=st.none() | names,
        name=st.none() | names,
        arguments=names,
    ),
    st.builds(
        Finished,
        reason=st.sampled_from(["stop", "length", "tool_calls", "content_filter"]),
        usage=usages,
        timing=timings,
        energy=st.none() | energies,
    ),
    st.builds(Failed, code=names, message=names, retryable=st.booleans()),
    st.builds(Cancelled, usage=usages),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=5,
)


@given(events)
@settings(deadline=None, max_examples=200)
def test_an_event_survives_the_wire(event: AnswerEvent) -> None:
    assert read_event(write_event(event)) == event


def test_an_endless_message_is_cut_and_arrives() -> None:
    told = read_event(write_event(Failed(code="x", message="m" * 10_000, retryable=True)))
    assert isinstance(told, Failed)
    assert told.message == "m" * 4096


def test_the_bytes_are_compact_and_readable() -> None:
    assert write_event(TextDelta(text="né", tokens=(5,))) == (
        '{"event":"text","text":"né","tokens":[5]}'.encode()
    )


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=200)
def test_bytes_that_are_no_event_are_a_link_error(payload: bytes) -> None:
    with pytest.raises(LinkError):
        read_event(payload)


@given(events, st.data())
@settings(deadline=None, max_examples=200)
def test_a_changed_event_is_read_or_refused_and_never_crashes(
    event: AnswerEvent, data: st.DataObject
) -> None:
    body = json.loads(write_event(event))
    body[data.draw(st.sampled_from([*body, "extra"]))] = data.draw(json_values)
    with suppress(LinkError):
        read_event(json.dumps(body).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b'{"event":"text","text":"\\ud800","tokens":[]}',
        b'{"event":"text","text":"x","tokens":[true]}',
        b'{"event":"text","text":"x","tokens":[-1]}',
        b'{"event":"text","text":"x","tokens":[],"more":1}',
        b'{"event":"text","text":"x"}',
        b'{"event":["text"]}',
        b'{"event":"routed","route":"edge","reason":"","model":"","request_id":"",'
        b'"dropped_tokens":-1}',
        b'{"event":"failed","code":"x","message":"y","retryable":1}',
        b'{"event":"cancelled","usage":{"prompt_tokens":1,"completion_tokens":1}}',
        b'{"event":"cancelled","usage":[]}',
        b"[" * 500_000,
        b'{"event":' + b"9" * 5000 + b"}",
        b" " * (EVENT_BYTES + 1),
        b"\xff",
        b"NaN",
        b"",
    ],
)
def test_damaged_and_hostile_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(LinkError):
        read_event(payload)


def test_times_must_be_finite() -> None:
    timing = Timing(first_scheduled_s=0, first_token_s=1, total_s=2, decode_s=1)
    good = write_event(
        Finished(reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1), timing=timing)
    )
    for bad in (b"1e999", b"-1", b"true", b"NaN", b'"2"', b"9" * 400):
        with pytest.raises(LinkError):
            read_event(good.replace(b'"total_s":2', b'"total_s":' + bad))


def end_with(energy: EnergyUse | None) -> bytes:
    timing = Timing(first_scheduled_s=0, first_token_s=1, total_s=2, decode_s=1)
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return write_event(Finished(reason="stop", usage=usage, timing=timing, energy=energy))


def test_an_end_of_which_nobody_kept_account_is_as_it_was_before_there_was_energy() -> None:
    assert b"energy" not in end_with(None)


def test_joules_without_a_scope_a_known_source_or_a_finite_number_are_refused() -> None:
    good = end_with(EnergyUse(joules=1.5, scope="board", source="measured"))
    told = b'"energy":{"joules":1.5,"scope":"board","source":"measured"}'
    assert told in good
    for bad in (
        b'"energy":null',
        b'"energy":1.5',
        b'"energy":{"joules":1.5,"scope":"board"}',
        b'"energy":{"joules":1.5,"source":"measured"}',
        b'"energy":{"joules":1.5,"scope":"board","source":"guessed"}',
        b'"energy":{"joules":1.5,"scope":7,"source":"measured"}',
        b'"energy":{"joules":-1,"scope":"board","source":"measured"}',
        b'"energy":{"joules":true,"scope":"board","source":"measured"}',
        b'"energy":{"joules":1e999,"scope":"board","source":"measured"}',
        b'"energy":{"joules":1.5,"scope":"board","source":"measured","watts":3}',
        b'"energy":{"joules":1.5,"scope":"%b","source":"measured"}' % (b"x" * 257),
    ):
        with pytest.raises(LinkError, match=r"event\.energy|unknown keys"):
            read_event(good.replace(told, bad))


def test_a_refused_payload_is_not_quoted() -> None:
    with pytest.raises(LinkError) as caught:
        read_event(b'{"event":"text","text":"secret words","tokens":"secret"}')
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"{", b"\xc3(", b"[" * 100_000, b"NaN", b"[-Infinity]", b""])
def test_parse_json_says_what_is_wrong_as_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(is|holds) "):
        parse_json(body)
