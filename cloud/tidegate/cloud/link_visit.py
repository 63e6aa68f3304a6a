"""One request over the link in the books of keys: usage and audit under its device's handle.

Devices have certificates and no limits here. A request that the service could not end because it
stops is run again by the gateway's next start, and is written down then; a row is named by its
request, so one that was answered twice is in the books once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tidegate.api.admission import Tally
from tidegate.api.answers import status_of_code
from tidegate.api.backend import AnswerEvent, Routed
from tidegate.cloud.bookkeeping import GONE, billed, cost_nano
from tidegate.cloud.key_rules import Prices
from tidegate.cloud.limits_of_keys import utc
from tidegate.cloud.usage import LINK, UsageRow
from tidegate.engine.events import Failed, Usage
from tidegate.link.effects import InboundRequest

if TYPE_CHECKING:
    from tidegate.cloud.access import AccessControl

_OK: Final = 200


class LinkVisit:
    """From a request's opening to its end. Nothing of its text is kept."""

    def __init__(self, access: AccessControl, request: InboundRequest) -> None:
        self._access, self._request = access, request
        self._began_s = access.clock()
        self._tally = Tally()
        self._choice = self._tally.choice()
        self._model = ""
        self._failed: Failed | None = None
        self.prompt_tokens = 0
        """What a device that gives an answer up pays for, once it is known."""

    def check_room(self) -> None:
        """Refuse a request whose usage could not be kept; raises what the access does."""
        self._access.check_room()

    def see(self, event: AnswerEvent) -> None:
        """Count one event."""
        self._choice.see(event)
        if isinstance(event, Routed):
            self._model = event.model
        if isinstance(event, Failed):
            self._failed = event

    def leave(self, trace_id: str | None, *, runs_again: bool) -> None:
        """It is over; `runs_again` when the service ends before the request has."""
        outcome = self._tally.outcome
        if runs_again and self._failed is None and outcome in ("none", "aborted"):
            return
        usage = billed(self._tally, self.prompt_tokens)
        status = _OK if outcome == "ok" else GONE
        if self._failed is not None:
            status = status_of_code(self._failed.code)
        if outcome != "none":
            self._keep(usage, status)
        if self._access.audit is not None:
            self._access.audit.add(self._line(usage, status, trace_id))
        self._access.noted()

    @property
    def _key(self) -> str:
        """No API key has a colon in its name or id."""
        return f"device:{self._request.handle}"

    def _keep(self, usage: Usage, status: int) -> None:
        prices = self._access.prices.of(self._model, Prices())
        row = UsageRow(
            id=f"{self._key}:{self._request.request_id.hex()}",
            key_id=self._key,
            key_name=self._request.handle,
            request_id=self._request.request_id.hex(),
            endpoint=LINK,
            model=self._model,
            began_s=self._began_s,
            ended_s=self._access.clock(),
            status=status,
            outcome=self._tally.outcome,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            cost_nano=cost_nano(prices, usage),
        )
        self._access.usage.add(row)
        self._access.metrics.used(row)

    def _line(self, usage: Usage, status: int, trace_id: str | None) -> dict[str, object]:
        now_s = self._access.clock()
        return {
            "time": utc(now_s),
            "request_id": self._request.request_id.hex(),
            "trace_id": trace_id,
            "key_id": self._key,
            "source": LINK,
            "client": self._request.handle,
            "method": None,
            "path": LINK,
            "status": status,
            "refused": None if self._failed is None else self._failed.code,
            "model": self._model or None,
            "reserved_tokens": 0,
            "outcome": self._tally.outcome,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "seconds": round(max(0.0, now_s - self._began_s), 3),
        }
