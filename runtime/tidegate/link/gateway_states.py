"""The states of a request at the gateway, as a table: the mirror of `device_states`.

docs/link-sessions.md shows the same table to people; a test holds the two equal. An event that a
state has no row for is refused: it changes nothing and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class State(Enum):
    """Where a request is."""

    ACCEPTED = "accepted"
    STREAMING = "streaming"
    FINISHED = "finished"
    CLOSED = "closed"
    CANCELLED = "cancelled"
    PARKED = "parked"


class Event(Enum):
    """What can happen to it."""

    ATTACH = "attach"
    """The device asked again, under a new attempt."""
    ACK = "ack"
    """The device said how much it has."""
    PRODUCE = "produce"
    """The handler yielded a payload that is new."""
    FINISH = "finish"
    """The handler ended, or the run contradicted an earlier one."""
    DONE = "done"
    """The device has the whole answer."""
    CANCEL = "cancel"
    """The device gave up."""
    LEASE_END = "lease end"
    """The device has said nothing for a lease, or its deadline passed."""


class Effect(Enum):
    """What a step may ask for."""

    STORE = "store"
    """Write it down before anything is sent."""
    CHUNKS = "chunks"
    """Seal what there is, as far as the window and the beat allow."""
    STOP = "stop"
    """Stop the handler."""
    CLOSE = "close"
    """Drop the answer and keep the row, so that it never runs again."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where an event leads, and what it may cause."""

    to: State
    effects: frozenset[Effect]


TERMINAL = frozenset((State.CLOSED, State.CANCELLED, State.PARKED))
_STOP, _CHUNKS = frozenset((Effect.STOP,)), frozenset((Effect.CHUNKS,))
_STORED = frozenset((Effect.STORE, Effect.CHUNKS))
_ENDS = {
    Event.DONE: Step(State.CLOSED, frozenset((Effect.CLOSE, Effect.STOP))),
    Event.CANCEL: Step(State.CANCELLED, frozenset((Effect.CLOSE, Effect.STOP))),
    Event.LEASE_END: Step(State.PARKED, _STOP),
}
_FINISH = Step(State.FINISHED, _STORED | _STOP)


def _alive(state: State) -> Mapping[Event, Step]:
    return {
        # What the device already has may contradict the run, and that ends the run.
        Event.ATTACH: Step(state, _CHUNKS | _STORED),
        Event.ACK: Step(state, _CHUNKS),
        Event.FINISH: _FINISH,
        **_ENDS,
    }


_PRODUCE = {Event.PRODUCE: Step(State.STREAMING, _STORED)}
STEPS: Mapping[State, Mapping[Event, Step]] = MappingProxyType(
    {
        State.ACCEPTED: {**_alive(State.ACCEPTED), **_PRODUCE},
        State.STREAMING: {**_alive(State.STREAMING), **_PRODUCE},
        State.FINISHED: _alive(State.FINISHED),
        State.CLOSED: {},
        State.CANCELLED: {},
        State.PARKED: {},
    }
)
