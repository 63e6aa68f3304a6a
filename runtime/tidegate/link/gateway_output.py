"""What a gateway's handlers yield, checked against the limits and turned into what to store."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.errors import CapacityError
from tidegate.link.effects import RunId
from tidegate.link.gateway_live import Live
from tidegate.link.gateway_session import DIVERGED
from tidegate.link.gateway_store import Progress
from tidegate.link.messages import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, Status


@dataclass(frozen=True, slots=True)
class Finished:
    """The handler ended; `code` names the error when it failed."""

    status: Status
    code: str = ""


@dataclass(frozen=True, slots=True)
class Produced:
    """One output of a handler: a payload, or how it ended."""

    run: RunId
    output: bytes | Finished = field(repr=False)


def take_output(live: Live, output: bytes | Finished, *, room_bytes: int) -> Progress | None:
    """What to store of `output`; None when an earlier run has stored it already.

    A payload beyond the limits or the store's room, or one that an earlier run contradicts, is
    the answer's end.
    """
    if isinstance(output, Finished):
        return _take_ending(live, output)
    session = live.session
    if not session.repeating:
        live.answer_bytes += len(output)
        if len(output) > MAX_PAYLOAD_BYTES or live.answer_bytes > MAX_ANSWER_BYTES:
            return _take_ending(live, Finished(Status.FAILED, "answer_too_large"))
        if len(output) > room_bytes:
            return _take_ending(live, Finished(Status.FAILED, CapacityError.code))
    number = session.produce(output)
    if session.diverged:
        return _take_ending(live, Finished(Status.FAILED, DIVERGED))
    if number is None:
        return None
    return Progress(key=live.row, first=number, payloads=(output,))


def _take_ending(live: Live, ending: Finished) -> Progress:
    status, code = live.session.finish(ending.status, ending.code)
    first = len(live.session.payloads)
    return Progress(key=live.row, first=first, payloads=(), status=status, code=code)
