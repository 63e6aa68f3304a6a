"""What a device's link shows of itself: the gateways it hears and the requests it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from tidegate.link.envelope import RequestId, request_time_ms
from tidegate.link.outbox import Held, Outcome
from tidegate.link.prekeys import Advert, ModelOffer


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayView:
    """A live gateway, as its last signed advert describes it."""

    gateway_id: str
    models: tuple[ModelOffer, ...]
    load: float
    age_s: float
    http: str = ""
    """Where it takes devices over HTTP; empty for nowhere."""

    @classmethod
    def of(cls, advert: Advert, now_s: float) -> Self:
        return cls(
            gateway_id=advert.gateway_id,
            models=advert.models,
            load=advert.load,
            age_s=max(0.0, now_s - advert.issued_s),
            http=advert.http,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingRequest:
    """A request in the outbox and how it stands; `held_bytes` are its prompt and its answer."""

    request_id: RequestId
    outcome: Outcome
    code: str
    age_s: float
    held_bytes: int
    is_read: bool
    """Someone is reading its answer now."""

    @classmethod
    def of(cls, held: Held, now_ms: int, *, is_read: bool) -> Self:
        return cls(
            request_id=held.request_id,
            outcome=held.outcome,
            code=held.code,
            age_s=max(0.0, (now_ms - request_time_ms(held.request_id)) / 1000),
            held_bytes=held.held_bytes,
            is_read=is_read,
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a request: its answer so far, and whether that is all."""

    payloads: list[bytes] = field(repr=False)
    outcome: Outcome
    code: str
