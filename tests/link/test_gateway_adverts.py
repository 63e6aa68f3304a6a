"""When adverts leave: on the beat, and again when somebody may have missed one."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tidegate.link.gateway_adverts import GREETING_S, GREETINGS_APART_S, AdvertTimes
from tidegate.link.timing import Timing

TIMING = Timing()


def times(seed: int = 0) -> AdvertTimes:
    return AdvertTimes(TIMING, random.Random(seed))


def sent_until(adverts: AdvertTimes, end_s: float) -> list[float]:
    """When adverts leave while nothing else happens."""
    found = []
    while (now_s := adverts.next_s) <= end_s:
        found.append(now_s)
        adverts.sent(now_s)
    return found


def test_nothing_is_sent_before_there_is_a_connection() -> None:
    assert sent_until(times(), 1e6) == []


def test_after_connecting_an_advert_is_repeated_twice_and_then_keeps_its_beat() -> None:
    adverts = times()
    adverts.connected(100.0)
    first, second, third, *rest = sent_until(adverts, 200.0)
    assert first == 100.0
    assert 0.75 <= second - 100 <= 1.25
    assert 2.25 <= third - 100 <= 3.75
    assert [round(after - third) for after in rest] == [20, 40, 60, 80]


def test_another_connection_begins_anew() -> None:
    adverts = times()
    adverts.connected(0.0)
    adverts.sent(0.0)
    adverts.connected(10.0)
    assert len(sent_until(adverts, 15.0)) == 3


def test_a_device_that_comes_is_greeted_soon() -> None:
    adverts = times()
    adverts.connected(0.0)
    sent_until(adverts, 10.0)
    adverts.somebody_came(10.0)
    assert 10.5 <= adverts.next_s <= 10.0 + GREETING_S


def test_one_that_comes_before_an_advert_that_is_due_anyway_needs_no_other() -> None:
    adverts = times()
    adverts.connected(0.0)
    adverts.sent(0.0)
    adverts.sent(adverts.next_s)
    adverts.somebody_came(2.5)
    assert len(sent_until(adverts, 10.0)) == 1


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60), st.integers(0, 99))
def test_however_many_come_all_are_greeted_in_time_and_adverts_stay_few(
    waits_s: list[float], seed: int
) -> None:
    adverts = times(seed)
    adverts.connected(0.0)
    sent, came, now_s = [], [], 10.0
    sent_until(adverts, now_s)
    for wait_s in waits_s:
        sent += sent_until(adverts, now_s + wait_s)
        now_s += wait_s
        came.append(now_s)
        adverts.somebody_came(now_s)
    sent += sent_until(adverts, now_s + 3 * TIMING.advert_every_s)
    for at_s in came:
        assert any(
            at_s < advert_s <= at_s + GREETINGS_APART_S + 2 * GREETING_S for advert_s in sent
        )
    for early, late in zip(sent, sent[2:], strict=False):
        assert late - early > GREETINGS_APART_S - GREETING_S, "greetings and the beat, no more"
