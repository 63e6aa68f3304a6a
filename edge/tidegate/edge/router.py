"""Where a request runs: on the device, or sealed to the cloud. A pure function of its signals.

Hard filters come first and are never traded: privacy, what the device can hold, what is reachable.
Only then the clock decides, by predicted seconds against the deadline. A request that may not
leave and cannot run here is refused, never sent. The decision carries the numbers it used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tidegate.api.schema import Privacy, RouteWish
from tidegate.errors import CapacityError, RequestError, TidegateError, UnavailableError

Place = Literal["edge", "cloud", "refuse"]
Obstacle = Literal["lasting", "busy", "gone"]
"""Why a place cannot take a request: it never will, not while busy, or not while away."""

MAY_LEAVE: frozenset[Privacy] = frozenset({"sealed", "any"})
"""`redact` stays until there is a redactor to send it through: the safe reading of its promise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteRequest:
    """What the router knows of a request: sizes and wishes, never its text."""

    prompt_tokens: int
    answer_tokens: float
    """Expected length of the answer: past answers tell, `max_tokens` is only a bound."""
    wish: RouteWish
    privacy: Privacy
    deadline_s: float | None
    """Seconds from now until the whole answer should be there."""
    token_ids: bool = False
    """It names token ids, which mean something to this device's model only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSignals:
    """The device's state. Rates are smoothed measurements; None before the first one."""

    healthy: bool
    context_tokens: int
    running: int
    waiting: int
    batch_rows: int
    """Requests that run at once."""
    queue_limit: int
    prefill_tokens_per_s: float | None
    decode_step_s: float | None
    pending_tokens: float
    """Tokens that the running and waiting requests are still expected to need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudSignals:
    """What is known of the cloud over the link."""

    reachable: bool
    context_tokens: int
    answer_s: float | None
    """Median seconds from sending a request to its last token, of the last few."""
    detail: str
    """Why it is not reachable, for the reason line."""
    is_set_up: bool = True
    """False for a device without a link: then waiting for a cloud is no use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Where to run and why, in one line with the numbers."""

    place: Place
    reason: str
    refusal: Obstacle | None = None
    """For `refuse`: change the request, come back soon, or wait for a place to return."""
    edge_s: float | None = None
    """Predicted seconds to the whole answer on the device."""
    cloud_s: float | None = None
    forced: bool = False
    """Only the cloud can take it, whatever the device's clock or energy say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """Why a place is closed to a request, whatever it costs there; None: it is open."""

    edge: str | None
    cloud: str | None


def filters(request: RouteRequest, edge: EdgeSignals, cloud: CloudSignals) -> Filters:
    """The hard filters alone."""
    edge_no, cloud_no = _why_not_edge(request, edge), _why_not_cloud(request, cloud)
    return Filters(
        edge=None if edge_no is None else edge_no[1],
        cloud=None if cloud_no is None else cloud_no[1],
    )


def predict_edge_s(request: RouteRequest, edge: EdgeSignals) -> float | None:
    """Seconds to the whole answer here: the wait for a row, the prompt, then the tokens.

    The pending tokens are computed `batch_rows` at a time, and the request gets a row once all
    but `batch_rows - 1` of those ahead are done. None until both rates were measured.
    """
    if edge.prefill_tokens_per_s is None or edge.decode_step_s is None:
        return None
    ahead = edge.running + edge.waiting
    to_finish = max(0, ahead - edge.batch_rows + 1)
    wait_steps = edge.pending_tokens / edge.batch_rows * to_finish / max(1, ahead)
    prompt_s = request.prompt_tokens / edge.prefill_tokens_per_s
    return prompt_s + (wait_steps + request.answer_tokens) * edge.decode_step_s


def decide(request: RouteRequest, edge: EdgeSignals, cloud: CloudSignals) -> Decision:
    """Choose where a request runs."""
    edge_s = predict_edge_s(request, edge)
    edge_no = _why_not_edge(request, edge)
    cloud_no = _why_not_cloud(request, cloud)
    if edge_no and cloud_no:
        reason = f"{edge_no[1]}; {cloud_no[1]}"
        refusal = _refusal(edge_no[0], cloud_no[0])
        return Decision(place="refuse", reason=reason, refusal=refusal, edge_s=edge_s)
    if cloud_no:
        return Decision(place="edge", reason=_stays(request, edge_s, cloud_no[1]), edge_s=edge_s)
    if edge_no:
        return _only_cloud(edge_no[1], edge_s, cloud)
    expected = request.prompt_tokens + math.ceil(request.answer_tokens)
    if edge.context_tokens < expected <= cloud.context_tokens:
        reason = f"answer cut short here: {expected} tokens expected, {edge.context_tokens} fit"
        return _only_cloud(reason, edge_s, cloud)
    return _by_time(request, edge, cloud, edge_s)


def can_leave(request: RouteRequest, cloud: CloudSignals) -> bool:
    """Whether a request may go to the cloud, and would fit there."""
    return _why_not_cloud(request, cloud) is None


def may_ever_leave(request: RouteRequest, cloud: CloudSignals) -> bool:
    """Whether it may once the cloud can be reached: what privacy and size alone say."""
    return cloud.is_set_up and can_leave(request, replace(cloud, reachable=True))


def refusal_of(decision: Decision) -> TidegateError:
    """The error that a refused request ends with."""
    if decision.refusal == "busy":
        return CapacityError(decision.reason)
    if decision.refusal == "gone":
        return UnavailableError(decision.reason)
    return RequestError("tidegate", f"cannot run anywhere: {decision.reason}", status=422)


def _only_cloud(reason: str, edge_s: float | None, cloud: CloudSignals) -> Decision:
    return Decision(
        place="cloud", reason=reason, edge_s=edge_s, cloud_s=cloud.answer_s, forced=True
    )


def _refusal(edge: Obstacle, cloud: Obstacle) -> Obstacle:
    """The obstacle that may pass decides: then the same request can be tried again."""
    if "busy" in (edge, cloud):
        return "busy"
    return "gone" if "gone" in (edge, cloud) else "lasting"


def _why_not_edge(request: RouteRequest, edge: EdgeSignals) -> tuple[Obstacle, str] | None:
    needed = request.prompt_tokens + 1
    if request.wish == "cloud":
        return "lasting", "asked for the cloud"
    if needed > edge.context_tokens:
        return (
            "lasting",
            f"too long for the device: {needed} tokens, it holds {edge.context_tokens}",
        )
    if not edge.healthy:
        return "gone", "the device's engine makes no progress"
    if edge.waiting >= edge.queue_limit:
        return "busy", f"the device's queue is full: {edge.waiting} waiting"
    return None


def _why_not_cloud(request: RouteRequest, cloud: CloudSignals) -> tuple[Obstacle, str] | None:
    needed = request.prompt_tokens + 1
    if request.wish == "edge":
        return "lasting", "asked for the device"
    if request.privacy not in MAY_LEAVE:
        return "lasting", f"private ({request.privacy}): never leaves the device"
    if request.token_ids:
        return "lasting", "token ids are for the device's own model"
    if needed > cloud.context_tokens:
        return (
            "lasting",
            f"too long for the cloud: {needed} tokens, it holds {cloud.context_tokens}",
        )
    if not cloud.reachable:
        return "gone" if cloud.is_set_up else "lasting", f"cloud: {cloud.detail}"
    return None


def _stays(request: RouteRequest, edge_s: float | None, cloud_no: str) -> str:
    """Why the device keeps it though another place was not open, and whether it will be late."""
    if edge_s is None:
        return f"{cloud_no}; nothing measured yet"
    late = request.deadline_s is not None and edge_s > request.deadline_s
    return f"{cloud_no}; {'late: ' if late else ''}{_clock(edge_s, request.deadline_s)}"


def _clock(predicted_s: float, deadline_s: float | None) -> str:
    allowed = "no deadline" if deadline_s is None else f"{deadline_s:.2f} s allowed"
    return f"{predicted_s:.2f} s predicted, {allowed}"


def _by_time(
    request: RouteRequest, edge: EdgeSignals, cloud: CloudSignals, edge_s: float | None
) -> Decision:
    """Both can; the device keeps it unless the clock says that only the cloud would make it."""
    deadline_s, cloud_s = request.deadline_s, cloud.answer_s
    if edge_s is None:
        reason = "fits: nothing measured yet"
        return Decision(place="edge", reason=reason, cloud_s=cloud_s)
    if deadline_s is None or edge_s <= deadline_s:
        reason = f"fits: {_clock(edge_s, deadline_s)}"
        return Decision(place="edge", reason=reason, edge_s=edge_s, cloud_s=cloud_s)
    late = f"{edge_s:.2f} s predicted here with {edge.waiting} waiting, {deadline_s:.2f} s allowed"
    if cloud_s is not None and cloud_s >= edge_s:
        reason = f"late either way: {late}, {cloud_s:.2f} s in the cloud"
        return Decision(place="edge", reason=reason, edge_s=edge_s, cloud_s=cloud_s)
    return Decision(
        place="cloud", reason=f"deadline too tight: {late}", edge_s=edge_s, cloud_s=cloud_s
    )
