"""A key's rules as charges, and what is said when one is not granted. Pure.

Quotas come before rates, so of two limits that are used up the one that lasts longer is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tidegate.cloud import quotas
from tidegate.cloud.charges import Charge
from tidegate.cloud.key_rules import KeyRules, Quota, Rate, Unit
from tidegate.errors import LimitError, QuotaError, RequestError

_CLOCK_STEP_S = 86_400.0
"""Counts of a period are kept for so long after it, should the clock be set back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What one call may come to at most."""

    tokens: int

    def of(self, unit: Unit) -> int:
        """Its amount in `unit`."""
        return 1 if unit == "requests" else self.tokens


def quota_charge(quota: Quota, amount: int, now_s: float) -> Charge:
    """A quota's count for the period that `now_s` is in."""
    period = quotas.name_of(quota.period, now_s)
    return Charge(
        meter=f"{quota.unit}:{period}",
        kind="count",
        unit=quota.unit,
        most=quota.amount,
        amount=amount,
        lasts_s=quotas.end_s(quota.period, now_s) - now_s + _CLOCK_STEP_S,
    )


def bucket_charge(rate: Rate, amount: int) -> Charge:
    """A rate's bucket: it holds a whole window's amount and fills once in a window."""
    return Charge(
        meter=f"{rate.unit}:bucket",
        kind="bucket",
        unit=rate.unit,
        most=rate.amount,
        amount=amount,
        rate_per_s=rate.amount / rate.window_s,
    )


def sliding_charge(rate: Rate, amount: int) -> Charge:
    """What a call takes of a sliding window."""
    return Charge(
        meter=f"{rate.unit}:sliding:{rate.window_s}",
        kind="sliding",
        unit=rate.unit,
        most=rate.amount,
        amount=amount,
        window_s=float(rate.window_s),
    )


def _rate_charge(rate: Rate, amount: int) -> Charge:
    return (sliding_charge if rate.strategy == "sliding" else bucket_charge)(rate, amount)


def limits_of(rules: KeyRules) -> tuple[Quota | Rate, ...]:
    """The limits that are charges: quotas, then rates."""
    return (*rules.quotas, *(rate for rate in rules.rates if rate.in_ledger))


def charges_of(rules: KeyRules, ask: Ask, now_s: float) -> tuple[Charge, ...]:
    """The charges of a call, one for each of `limits_of`."""
    return tuple(
        quota_charge(limit, ask.of(limit.unit), now_s)
        if isinstance(limit, Quota)
        else _rate_charge(limit, ask.of(limit.unit))
        for limit in limits_of(rules)
    )


def check_fits(rules: KeyRules, ask: Ask, field: str) -> None:
    """Refuse what no waiting would make fit; `field` is what the caller can make smaller.

    Raises:
        RequestError: the call may come to more than a limit ever allows at once.
    """
    every: tuple[Quota | Rate, ...] = (*rules.quotas, *rules.rates)
    for limit in every:
        if ask.of(limit.unit) > limit.amount:
            problem = (
                f"the call may come to {ask.tokens} tokens: must be at most"
                f" {limit.amount}, the key's limit for {_span(limit)}"
            )
            raise RequestError(field, problem, status=413)


def refused(limit: Quota | Rate, amount: int, left: float, wait_s: float) -> LimitError:
    """The error for a limit that has only `left`."""
    what = f"{limit.amount} {limit.unit} {_span(limit)}"
    have = f"{max(0, math.floor(left))} left, this call may use {amount}"
    if isinstance(limit, Rate):
        text = f"rate limit of {what} reached: {have}; try again in {duration(wait_s)}"
        return LimitError(text, limit=f"{limit.unit}_rate", retry_after_s=wait_s)
    return QuotaError(
        f"quota of {what} reached: {have}; it begins anew in {duration(wait_s)}",
        limit=f"{limit.unit}_{limit.period}",
        retry_after_s=wait_s,
    )


def wait_s(limit: Quota | Rate, amount: int, left: float, now_s: float) -> float:
    """How long until `amount` fits: until a bucket has it, or the period ends."""
    if isinstance(limit, Quota):
        return quotas.end_s(limit.period, now_s) - now_s
    return (amount - left) * limit.window_s / limit.amount


def rate_headers(rate: Rate, left: float, reset_s: float) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*` of one rate."""
    return {
        f"x-ratelimit-limit-{rate.unit}": str(rate.amount),
        f"x-ratelimit-remaining-{rate.unit}": str(max(0, math.floor(left))),
        f"x-ratelimit-reset-{rate.unit}": duration(reset_s),
    }


def bucket_headers(limits: Sequence[Quota | Rate], left: Sequence[float]) -> dict[str, str]:
    """Of the rates among `limits`; a bucket is reset when it is full, a window when it passed."""
    headers: dict[str, str] = {}
    for limit, one in zip(limits, left, strict=True):
        if isinstance(limit, Rate):
            full_s = (limit.amount - one) * limit.window_s / limit.amount
            slides = limit.strategy == "sliding" and full_s > 0
            headers |= rate_headers(limit, one, float(limit.window_s) if slides else full_s)
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes them: `20ms`, `7s`, `6m0s`, `23h59m59s`; rounded up."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def utc(at_s: float) -> str:
    """`2026-11-21T22:40:00.123Z`."""
    told = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
    return told.replace("+00:00", "Z")


def _span(limit: Quota | Rate) -> str:
    if isinstance(limit, Quota):
        return f"per {limit.period}"
    return f"in {limit.window_s} s ({limit.strategy})"
