"""Days and months in UTC, against the calendar's own arithmetic."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.cloud import quotas
from tidegate.cloud.key_rules import Period


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@given(st.dates(date(1990, 1, 1), date(2190, 1, 1)), st.floats(0, 86_399.999))
def test_a_moment_is_in_its_day_and_its_month(day: date, seconds: float) -> None:
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    now_s = midnight.timestamp() + seconds
    assert quotas.name_of("day", now_s) == day.isoformat()
    assert quotas.begin_s("day", now_s) == midnight.timestamp()
    assert quotas.end_s("day", now_s) == (midnight + timedelta(days=1)).timestamp()
    assert quotas.name_of("month", now_s) == day.isoformat()[:7]
    months = day.year * 12 + day.month  # of the next one, from 0
    assert (
        quotas.end_s("month", now_s)
        == datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC).timestamp()
    )
    assert quotas.begin_s("month", now_s) == midnight.replace(day=1).timestamp()


@pytest.mark.parametrize(
    ("period", "last", "first"),
    [
        ("day", "2026-11-21T23:59:59.999", "2026-11-22"),
        ("day", "2028-02-28T23:59:59.999", "2028-02-29"),
        ("day", "2026-12-31T23:59:59.999", "2027-01-01"),
        ("month", "2026-11-30T23:59:59.999", "2026-12"),
        ("month", "2028-02-29T23:59:59.999", "2028-03"),
        ("month", "2026-12-31T23:59:59.999", "2027-01"),
    ],
)
def test_a_period_ends_with_its_last_millisecond(period: Period, last: str, first: str) -> None:
    last_s = at(last)
    end_s = quotas.end_s(period, last_s)
    assert 0 < end_s - last_s <= 0.0011
    assert quotas.name_of(period, last_s) != first
    assert quotas.name_of(period, end_s) == first
