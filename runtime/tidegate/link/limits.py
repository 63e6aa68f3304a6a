"""What a device accepts to send. A gateway would drop anything else without a word."""

from __future__ import annotations

from tidegate.errors import RequestError
from tidegate.link.envelope import REQUEST_ID_BYTES, request_time_ms
from tidegate.link.messages import CALL_BYTES
from tidegate.link.prekeys import VALID_FOR_S
from tidegate.link.wire import MAX_BODY_BYTES

MAX_REQUEST_BODY_BYTES = MAX_BODY_BYTES - CALL_BYTES
MAX_DEADLINE_S = VALID_FOR_S
"""A gateway refuses ids older than its prekeys live."""


MAX_AHEAD_S = 24 * 3600
"""How far ahead of a clock an id may be: it only keeps its row at the gateway that much longer,
and a request that was made while a clock was wrong is still answered."""


def check_request(body: bytes, request_id: bytes, deadline_s: float, *, now_ms: int) -> None:
    """Check a request before it enters the outbox; `now_ms` is Unix time.

    Raises:
        RequestError: names the field and what is allowed.
    """
    if not 0 < deadline_s <= MAX_DEADLINE_S:
        problem = f"{deadline_s:g} s: must be above 0 and at most {MAX_DEADLINE_S}"
        raise RequestError("deadline_s", problem)
    if len(body) > MAX_REQUEST_BODY_BYTES:
        problem = f"{len(body)} bytes: must be at most {MAX_REQUEST_BODY_BYTES}"
        raise RequestError("body", problem, status=413)
    age_s = (now_ms - request_time_ms(request_id)) / 1000
    if len(request_id) != REQUEST_ID_BYTES or not -MAX_AHEAD_S < age_s < VALID_FOR_S:
        raise RequestError("request_id", "must be a fresh one from envelope.new_request_id")
