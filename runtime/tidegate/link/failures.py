"""The stable names of what ends a request badly, as the exceptions that its caller gets."""

from __future__ import annotations

from tidegate.errors import (
    CapacityError,
    DeviceRefusedError,
    ExecutionError,
    LinkError,
    TidegateError,
    UnavailableError,
)
from tidegate.link import outbox, registry

LINK_STOPPED = "link_stopped"


def error_of(code: str, *, transport: str, hint: str, waited_s: float) -> TidegateError:
    """The exception for a failure.

    Args:
        code: its stable name.
        transport: how the transport is, for people.
        hint: why no gateway may be known, with what separates it from the rest; may be empty.
        waited_s: how long a gateway was waited for.
    """
    match code:
        case "no_gateway":
            return UnavailableError(f"no gateway is known after {waited_s:g} s; {transport}{hint}")
        case "deadline_exceeded":
            return UnavailableError(f"no whole answer before the deadline; {transport}")
        case "link_stopped":
            return UnavailableError("the link was stopped; the request stays in the outbox")
        case outbox.OUTBOX_FULL:
            return CapacityError("the outbox has no room for this answer")
        case outbox.ANSWER_DROPPED:
            return CapacityError("nobody read the answer in time, and its room was needed")
        case CapacityError.code:
            return CapacityError("the gateway has no room for this request now")
        case UnavailableError.code:
            return UnavailableError("the gateway's engine is not available")
        case ExecutionError.code:
            return ExecutionError("the gateway could not answer this request")
        case registry.REVOKED:
            return DeviceRefusedError("the gateway refuses this device: it was revoked")
        case registry.EXPIRED:
            return DeviceRefusedError(
                "the gateway refuses this device: its certificate has ended; enrol it again"
            )
        case _:
            return LinkError(f"request failed: {code!r}")
