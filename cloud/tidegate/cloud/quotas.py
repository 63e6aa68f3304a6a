"""Calendar days and months in UTC: what a quota counts in, and when it begins anew.

A request belongs to the day and month in which it was admitted, however long it runs.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tidegate.cloud.key_rules import Period


def name_of(period: Period, now_s: float) -> str:
    """`2026-11-21` or `2026-11`."""
    now = datetime.fromtimestamp(now_s, UTC)
    return now.strftime("%Y-%m-%d" if period == "day" else "%Y-%m")


def begin_s(period: Period, now_s: float) -> float:
    """When the period that `now_s` is in began, in Unix seconds."""
    now = datetime.fromtimestamp(now_s, UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return (midnight if period == "day" else midnight.replace(day=1)).timestamp()


def end_s(period: Period, now_s: float) -> float:
    """When the next one begins; strictly after `now_s`."""
    began = datetime.fromtimestamp(begin_s(period, now_s), UTC)
    if period == "day":
        return (began + timedelta(days=1)).timestamp()
    # From the first of a month, 32 days reach into the next one and never past it.
    return (began + timedelta(days=32)).replace(day=1).timestamp()
