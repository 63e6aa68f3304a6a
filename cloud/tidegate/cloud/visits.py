"""One request and the key it came with: let in or not, admitted or not, settled, written down."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from tidegate.api.admission import CallSize, Knock, Tally
from tidegate.api.answers import error_answer, error_object
from tidegate.api.log_context import log_context
from tidegate.cloud.api_keys import ApiKey
from tidegate.cloud.bookkeeping import GONE, billed, cost_nano
from tidegate.cloud.charges import Charge, Denied, Used
from tidegate.cloud.failed_attempts import WINDOW_S
from tidegate.cloud.key_rules import KeyRules, Rate, scopes_of
from tidegate.cloud.limits_of_keys import (
    Ask,
    bucket_headers,
    charges_of,
    check_fits,
    limits_of,
    rate_headers,
    refused,
    utc,
    wait_s,
)
from tidegate.cloud.uncut import uncut
from tidegate.cloud.usage import UsageRow
from tidegate.engine.events import Usage
from tidegate.errors import AccessError, CapacityError, LimitError, RequestError

if TYPE_CHECKING:
    from tidegate.cloud.access import AccessControl
    from tidegate.cloud.windows import WindowState

_MOST_PATH = 200


class KeyVisit:
    """`tidegate.api.admission.Visit`."""

    def __init__(self, access: AccessControl, knock: Knock) -> None:
        self._access, self._knock = access, knock
        self._began_s = access.clock()
        self._key: ApiKey | None = None
        self._unlisted = False
        self._reason: str | None = None
        self._claim = ""
        self._model = ""
        self._ask = Ask(tokens=0)
        self._prompt_tokens = 0
        self._charges: tuple[Charge, ...] = ()
        self._fixed: list[tuple[Rate, int]] = []
        self.refusal: JSONResponse | None = None
        self.headers: Mapping[str, str] = {}
        self.tally = Tally()

    def enter(self) -> None:
        """Find out who it is and whether its scopes are enough; sets `refusal` if not."""
        try:
            key = self._access.find(self._knock.key, self._knock.client)
        except CapacityError as error:
            status, body = error_answer(error)
            self.refusal = JSONResponse(body, status, {"Retry-After": "1"})
            return
        why = "invalid_api_key" if key is None else key.refusal(self._began_s)
        self._key = key
        if why is not None:
            self._unknown(why)
            return
        assert key is not None
        scopes = scopes_of(self._knock.path)
        if not set(scopes) & set(key.rules.scopes):
            lacking = " or ".join(map(repr, scopes))
            self._refuse(403, "insufficient_scope", f"this key lacks the scope {lacking}")

    def _unknown(self, why: str) -> None:
        """No key, or none that opens anything. Its holder may know that it was one once."""
        if not self._access.failures.failed(self._knock.source):
            self._unlisted = True
            message = "too many requests without a valid API key; wait a minute"
            self._refuse(429, "too_many_attempts", message)
            return
        messages = {
            "key_revoked": "this API key was revoked",
            "key_expired": "this API key has expired",
        }
        self._refuse(401, why, messages.get(why, "no valid API key was given"))

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._reason = code
        self._access.metrics.refused(code)
        heads = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": f"{WINDOW_S:.0f}"}}
        body = error_object(message, status=status, code=code)
        self.refusal = JSONResponse(body, status, heads.get(status))

    def may_use(self, model: str) -> bool:
        """See `Visit.may_use`."""
        allowed = () if self._key is None else self._key.rules.models
        return not allowed or model in allowed

    async def expect(self, least: CallSize) -> None:
        """See `Visit.expect`."""
        with self._noting_refusals():
            key = self._check(least.tokens, least.model, "max_tokens")
            await self._look(key)

    async def admit(self, size: CallSize) -> None:
        """See `Visit.admit`."""
        self._prompt_tokens = size.prompt_tokens
        await self._admit(size.tokens, size.model, "max_tokens")

    async def admit_tokens(self, tokens: int, model: str) -> None:
        """See `Visit.admit_tokens`."""
        await self._admit(tokens, model, "input")

    async def _admit(self, tokens: int, model: str, field: str) -> None:
        assert not self._claim, "one call of one visit"
        with self._noting_refusals():
            key = self._check(tokens, model, field)
            # To its end, should the client leave meanwhile: what was taken is then given back.
            await uncut(self._take(key))

    def _check(self, tokens: int, model: str, field: str) -> ApiKey:
        """What needs no account of what was used before."""
        assert self._key is not None
        self._model, self._ask = model, Ask(tokens=tokens)
        self._check_model(model)
        self._access.check_room()
        check_fits(self._key.rules, self._ask, field)
        return self._key

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        try:
            yield
        except (AccessError, RequestError, CapacityError) as error:
            self._reason = error.limit if isinstance(error, LimitError) else error.code
            self._access.metrics.refused(self._reason)
            raise

    def _check_model(self, model: str) -> None:
        assert self._key is not None
        if not self.may_use(model):
            names = ", ".join(self._key.rules.models)
            raise AccessError(f"model {model[:64]!r}: this key may use {names}; name one of them")

    async def _take(self, key: ApiKey) -> None:
        """Take the charges, then the windows; what was taken returns when a later one refuses."""
        access, rules, charges = self._access, key.rules, self._charges_of(key)
        claim = secrets.token_hex(16)
        if charges:
            taken = await access.ledger.take(key.id, claim, charges)
            if isinstance(taken, Denied):
                raise self._denied(rules, charges, taken)
            self.headers = bucket_headers(limits_of(rules), taken.left)
        self._claim, self._charges = claim, charges
        try:
            for rate in sorted(rules.rates, key=lambda rate: rate.strategy):  # fixed, sliding
                if not rate.in_ledger:
                    await self._window(key, rate)
        except BaseException:
            self._settle(Used(requests=0, tokens=0))
            self._claim = ""
            raise

    async def _look(self, key: ApiKey) -> None:
        """Refuse as `_take` would, and take nothing."""
        access, rules, charges = self._access, key.rules, self._charges_of(key)
        denied = await access.ledger.peek(key.id, charges) if charges else None
        if denied is not None:
            raise self._denied(rules, charges, denied)
        for rate in rules.rates:
            if not rate.in_ledger:
                state = await access.windows.peek(key.id, rate, self._ask.of(rate.unit))
                self._note_window(rate, state)

    def _charges_of(self, key: ApiKey) -> tuple[Charge, ...]:
        for quota in key.rules.quotas:
            self._access.begin_quota(key.id, quota, self._began_s)
        return charges_of(key.rules, self._ask, self._began_s)

    def _denied(self, rules: KeyRules, charges: Sequence[Charge], denied: Denied) -> LimitError:
        limit, amount = limits_of(rules)[denied.index], charges[denied.index].amount
        if isinstance(limit, Rate):
            self.headers = bucket_headers((limit,), (denied.left,))
        later_s = denied.wait_s
        if later_s is None:
            later_s = wait_s(limit, amount, denied.left, self._began_s)
        return refused(limit, amount, denied.left, later_s)

    async def _window(self, key: ApiKey, rate: Rate) -> None:
        state = await self._access.windows.take(key.id, rate, self._ask.of(rate.unit))
        self._note_window(rate, state)
        self._fixed.append((rate, state.number))

    def _note_window(self, rate: Rate, state: WindowState) -> None:
        self.headers = {**self.headers, **rate_headers(rate, state.left, state.reset_s)}
        if not state.granted:
            raise refused(rate, self._ask.of(rate.unit), state.left, state.reset_s)

    def leave(self, status: int, request_id: str) -> None:
        """See `Visit.leave`."""
        status = status or GONE
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        outcome = self.tally.outcome
        if self._claim:
            usage = billed(self.tally, self._prompt_tokens)
            began = 0 if outcome == "none" else 1
            self._settle(Used(requests=began, tokens=usage.prompt_tokens + usage.completion_tokens))
            if began:
                self._keep(usage, status, request_id)
        if self._access.audit is not None and not self._unlisted:
            self._access.audit.add(self._line(usage, status, request_id))
        self._access.noted()

    def _settle(self, used: Used) -> None:
        assert self._key is not None
        access = self._access
        if self._charges:
            access.ledger.settle(self._key.id, self._claim, self._charges, used)
        for rate, number in self._fixed:
            back = self._ask.of(rate.unit) - used.of(rate.unit)
            if back and rate.strategy == "fixed":
                access.later(access.windows.give_back(self._key.id, rate, back, number))

    def _keep(self, usage: Usage, status: int, request_id: str) -> None:
        assert self._key is not None
        prices = self._access.prices.of(self._model, self._key.rules.prices)
        row = UsageRow(
            id=self._claim,
            key_id=self._key.id,
            key_name=self._key.name,
            request_id=request_id,
            endpoint=self._knock.path,
            model=self._model,
            began_s=self._began_s,
            ended_s=self._access.clock(),
            status=status,
            outcome=self.tally.outcome,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            cost_nano=cost_nano(prices, usage),
        )
        self._access.usage.add(row)
        self._access.metrics.used(row)

    def _line(self, usage: Usage, status: int, request_id: str) -> dict[str, object]:
        key, now_s, context = self._key, self._access.clock(), log_context()
        return {
            "time": utc(now_s),
            "request_id": request_id,
            "trace_id": None if context is None else context.trace_id,
            "key_id": None if key is None else key.id,
            "source": self._knock.source,
            "client": self._knock.client,
            "method": self._knock.method,
            "path": self._knock.path[:_MOST_PATH],
            "status": status,
            "refused": self._reason,
            "model": self._model or None,
            "reserved_tokens": self._ask.tokens,
            "outcome": self.tally.outcome,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "seconds": round(max(0.0, now_s - self._began_s), 3),
        }
