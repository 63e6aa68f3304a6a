"""What a gateway's handlers yield, checked against the limits and turned into what to store."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tidegate.errors import CapacityError
from tidegate.link.effects import RunId
from tidegate.link.gateway_live import Live
from tidegate.link.gateway_pacing import next_beat_s
from tidegate.link.gateway_session import DIVERGED
from tidegate.link.gateway_store import Progress
from tidegate.link.messages import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, Status
from tidegate.link.timing import Timing


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


_LEAD_S = 0.01
"""Before a beat: time to store what leaves on it, so that the disk does not shift the beat."""


class Outputs:
    """What the handlers have yielded since the core last took it."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._waiting: list[Produced] = []
        self.due_s = math.inf
        """When the core should take it: at once, or shortly before the beat it may leave on."""

    def put(self, now_s: float, output: Produced) -> bool:
        """One more; True when it is the first."""
        self._waiting.append(output)
        if len(self._waiting) > 1:
            return False
        self.due_s = now_s
        if self._timing.is_paced:
            lead_s = min(_LEAD_S, self._timing.tick_s / 4)
            self.due_s = next_beat_s(now_s + lead_s, self._timing) - lead_s
        return True

    def take(self, now_s: float) -> list[Produced]:
        """All of it, if it is due."""
        if now_s < self.due_s:
            return []
        self.due_s = math.inf
        batch, self._waiting = self._waiting, []
        return batch


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
