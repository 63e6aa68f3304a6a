"""The cloud, as the device sees it: a call goes out sealed, the same events come back.

What leaves is the validated call as JSON, without the wishes that were only for the router, and
with a seed, so that a gateway that restarts answers with the same tokens.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from hashlib import sha256
from statistics import median_low

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.metrics import render_counters, render_paths
from tidegate.api.schema import Call, call_to_json
from tidegate.api.wire import read_event
from tidegate.edge.router import CloudSignals
from tidegate.engine.events import Cancelled, Failed, Finished, Terminal, Timing
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    LinkError,
    RequestError,
    TidegateError,
    UnavailableError,
)
from tidegate.link.device import DeviceLink
from tidegate.link.envelope import RequestId
from tidegate.link.outbox import Name
from tidegate.link.prekeys import ModelOffer
from tidegate.link.transport import PATHS

DEFAULT_PATIENCE_S = 120.0
"""How long a request without a deadline may take before it is reported as failed."""

UNKNOWN_TOKENS = 2**31
"""The cloud's context while no gateway is known: then that is not what stops a request."""

_REMEMBERED = 5
"""Answers that the expected time is the median of: one that was slow, such as the first over a new
link, does not keep others here."""


class CloudLeg:
    """Sends calls over a link and keeps the numbers that the router asks for."""

    def __init__(self, link: DeviceLink, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Use `link`, whose `run` is the owner's to keep going."""
        self._link, self._clock = link, clock
        self._took_s: deque[float] = deque(maxlen=_REMEMBERED)

    async def models(self) -> tuple[ModelOffer, ...]:
        """What each live gateway serves calls with that name no model, as a device's do."""
        return tuple(view.models[0] for view in await self._link.gateways() if view.models)

    def metrics(self) -> bytes:
        """Prometheus text of the link's counters."""
        text = render_counters("tidegate_link", asdict(self._link.counters))
        return text + render_paths("tidegate_link", [self._link.path], known=PATHS)

    async def signals(self) -> CloudSignals:
        """What the router may count on right now."""
        models = await self.models()
        detail = ""
        if not self._link.connected:
            detail = "broker not connected"
        elif not models:
            detail = "no gateway announced itself"
        return CloudSignals(
            reachable=not detail,
            context_tokens=max((model.context_tokens for model in models), default=UNKNOWN_TOKENS),
            answer_s=self._answer_s(),
            detail=detail,
        )

    async def status(self) -> Mapping[str, object]:
        """JSON for `/status`."""
        now = await self.signals()
        return {
            "reachable": now.reachable,
            "detail": now.detail,
            "broker": self._link.status,
            "path": self._link.path,
            "answer_s": self._answer_s(),
            "counters": asdict(self._link.counters),
        }

    async def holds(self, call: Call) -> bool:
        """An answer to this very call is on its way, or here and unread: a caller asks again.

        Raises:
            RequestError: its `Idempotency-Key` belongs to another call, or to one in progress.
        """
        name = _name(call)
        return name is not None and await self._link.holds(name)

    async def answer(
        self, call: Call, request_id: str, reason: str
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Answer a call in the cloud; `reason` is why it goes there.

        Nothing is yielded before there is text, so until then an error is still the whole answer.

        Raises:
            RequestError: the cloud cannot serve the call as it is.
            CapacityError: the cloud has no room.
            UnavailableError: the cloud did not answer in time, or is going away.
            ExecutionError: the cloud failed before there was any text.
            LinkError: the answer is not one.
        """
        body = json.dumps(call_to_json(_outgoing(call)), ensure_ascii=False).encode()
        times, deadline_ms = _Arrivals(self._clock), call.options.deadline_ms
        # A late answer is still worth more than none: the deadline chose the route, no more.
        patience_s = DEFAULT_PATIENCE_S if deadline_ms is None else 10 + deadline_ms / 1000
        link_id = RequestId(bytes.fromhex(request_id))
        # The widest model's gateway: `signals` promised the router that context.
        offers = await self.models()
        model = max(offers, key=lambda one: one.context_tokens).id if offers else None
        answer = self._link.request(
            body,
            deadline_s=patience_s,
            request_id=link_id,
            model=model,
            priority=int(call.options.priority),
            name=_name(call),
            heard=times.heard,
        )
        heading: Routed | None = None
        first_s, ended = None, False
        async with aclosing(answer):
            async for payload in answer:
                event, now_s = read_event(payload), times.last_s()
                if isinstance(event, Routed):
                    if heading is not None:
                        raise LinkError("the cloud's answer begins twice")
                    heading = replace(event, route="cloud", reason=reason, request_id=request_id)
                    continue
                if first_s is None:
                    if isinstance(event, Failed | Cancelled):
                        raise _refusal(event)
                    if heading is None:
                        raise LinkError("the cloud's answer does not say where it ran")
                    first_s = now_s
                    yield heading
                if isinstance(event, Finished):
                    self._took_s.append(now_s)
                    event = _as_seen_here(event, first_s, now_s)
                ended = isinstance(event, Terminal)
                yield event
        if not ended:
            raise UnavailableError("the cloud's answer broke off")

    def _answer_s(self) -> float | None:
        return median_low(self._took_s) if self._took_s else None


class _Arrivals:
    """When something of an answer came, however late its caller read it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began_s = clock, clock()
        self._heard_s: float | None = None

    def heard(self) -> None:
        """Something has just come."""
        self._heard_s = self._clock() - self._began_s

    def last_s(self) -> float:
        """Seconds from the beginning to the last of it; to now for what came before this one."""
        return self._clock() - self._began_s if self._heard_s is None else self._heard_s


def _refusal(event: Failed | Cancelled) -> TidegateError:
    """What the cloud said instead of an answer, as the error it was there."""
    if isinstance(event, Cancelled):
        return UnavailableError("the cloud cancelled the request")
    match event.code:
        case RequestError.code:
            field, _, problem = event.message.partition(": ")
            return RequestError(field, f"{problem or 'refused'} (says the cloud)")
        case CapacityError.code:
            return CapacityError(f"the cloud has no room: {event.message}")
        case _ if event.retryable:
            return UnavailableError(f"the cloud is not available: {event.message}")
        case _:
            return ExecutionError(f"the cloud failed: {event.message}")


def _as_seen_here(event: Finished, first_token_s: float, total_s: float) -> Finished:
    """With this device's times, the way there and back included, but the cloud's own pace."""
    timing = Timing(
        first_scheduled_s=min(event.timing.first_scheduled_s, first_token_s),
        first_token_s=first_token_s,
        total_s=total_s,
        # Tokens arrive in bursts, one for each beat of the link: only the cloud saw their pace.
        decode_s=event.timing.decode_s,
    )
    return replace(event, timing=timing)


def _name(call: Call) -> Name | None:
    """What a call is found by again; one of several answers cannot be told from the others."""
    if call.retry_key is None or call.n != 1:
        return None
    said = json.dumps(call_to_json(replace(call, stream=False)), sort_keys=True)
    return Name(call.retry_key, sha256(said.encode()).digest())


def _outgoing(call: Call) -> Call:
    """The call as the cloud gets it: its default model, one answer, a seed for a sampled one."""
    sampling = call.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(62))
    return replace(call, model=None, sampling=sampling, n=1, stream=True)
