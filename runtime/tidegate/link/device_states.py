"""The states of a request at the device, as a table: what each event leads to and may cause.

docs/link-sessions.md shows the same table to people; a test holds the two equal, and another one
walks the session at random and finds every step in it. An event that a state has no row for is
refused: it changes nothing and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class State(Enum):
    """Where a request is."""

    QUEUED = "queued"
    SENT = "sent"
    ACCEPTED = "accepted"
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Event(Enum):
    """What can happen to it."""

    SEND = "send"
    """There is a gateway for it, and it is due."""
    LIFE = "life"
    """A chunk opened that had nothing new."""
    PAYLOAD = "payload"
    """A chunk opened, and payloads follow what was delivered before."""
    COMPLETE = "complete"
    """The whole answer has been delivered."""
    FAIL = "fail"
    """The gateway said so, or the deadline passed, or no attempt, gateway or room is left."""
    CANCEL = "cancel"
    """The application gave up."""


class Effect(Enum):
    """What a step may ask for."""

    REQUEST = "request"
    """Seal it under a new attempt, once that number is on the disk."""
    DELIVER = "deliver"
    """Payloads for the application."""
    ACK = "ack"
    """Save what was delivered, then acknowledge it."""
    STOP = "stop"
    """Tell the gateway that no more is wanted."""
    END = "end"
    """Tell the application how it ended."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where an event leads, and what it may cause."""

    to: State
    effects: frozenset[Effect]


TERMINAL = frozenset((State.DONE, State.FAILED, State.CANCELLED))
_FAIL = Step(State.FAILED, frozenset((Effect.ACK, Effect.STOP, Effect.END)))
_CANCEL = Step(State.CANCELLED, frozenset((Effect.STOP, Effect.END)))
_SEND = Step(State.SENT, frozenset((Effect.REQUEST,)))
_HEARD = {
    Event.SEND: _SEND,
    Event.LIFE: Step(State.ACCEPTED, frozenset((Effect.ACK,))),
    Event.PAYLOAD: Step(State.STREAMING, frozenset((Effect.DELIVER, Effect.ACK))),
    Event.COMPLETE: Step(State.DONE, frozenset((Effect.ACK, Effect.END))),
    Event.FAIL: _FAIL,
    Event.CANCEL: _CANCEL,
}
STEPS: Mapping[State, Mapping[Event, Step]] = MappingProxyType(
    {
        State.QUEUED: {Event.SEND: _SEND, Event.FAIL: _FAIL, Event.CANCEL: _CANCEL},
        # An answer to an earlier attempt may arrive while the next one is on its way.
        State.SENT: _HEARD,
        State.ACCEPTED: _HEARD,
        State.STREAMING: {**_HEARD, Event.LIFE: Step(State.STREAMING, frozenset((Effect.ACK,)))},
        State.DONE: {},
        State.FAILED: {},
        State.CANCELLED: {},
    }
)
