"""Which path a device uses: the broker first, HTTP while the broker is of no use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import ConfigError
from tidegate.link.path_choice import PathChoice, PathTiming

TIMING = PathTiming(patience_s=5.0, steady_s=4.0, linger_s=2.0, fresh_s=65.0)


def choice() -> PathChoice:
    return PathChoice(TIMING, now_s=0.0)


def test_http_is_tried_once_the_broker_was_away_for_a_while() -> None:
    state = choice()
    assert state.poll(4.9) == "none"
    assert not state.wants_http(4.9)
    assert state.next_wakeup_s(0.0) == 5.0
    assert state.wants_http(5.0)
    state.http_up()
    assert state.poll(5.5) == "http"


def test_a_broker_that_comes_in_time_is_used_alone() -> None:
    state = choice()
    state.broker_up(3.0)
    assert state.poll(3.0) == "broker"
    assert not state.wants_http(10.0)


def test_a_broker_that_blinks_is_waited_for() -> None:
    state = choice()
    state.broker_up(0.0)
    state.poll(0.0)
    state.broker_down(10.0)
    assert state.poll(10.0) == "none"
    assert not state.wants_http(14.9)
    state.broker_up(14.9)
    assert state.poll(14.9) == "broker"
    assert not state.wants_http(16.0)


def test_the_broker_is_gone_back_to_once_it_has_stood_for_a_while() -> None:
    state = choice()
    state.http_up()
    assert state.poll(6.0) == "http"
    state.broker_up(10.0)
    assert state.poll(13.9) == "http"
    assert state.next_wakeup_s(13.9) == 14.0
    assert state.poll(14.0) == "broker"
    assert state.wants_http(15.9), "what is on its way there still arrives"
    assert not state.wants_http(16.0)


def test_a_broker_that_comes_and_goes_does_not_draw_the_device_back() -> None:
    state = choice()
    state.http_up()
    state.poll(6.0)
    for at_s in range(10, 40, 3):
        state.broker_up(at_s)
        assert state.poll(at_s) == "http"
        state.broker_down(at_s + 2.0)
        assert state.poll(at_s + 2.0) == "http"


def test_when_http_fails_too_a_broker_that_has_just_come_is_better_than_nothing() -> None:
    state = choice()
    state.http_up()
    state.poll(6.0)
    state.broker_up(7.0)
    state.http_down()
    assert state.poll(7.1) == "broker"


def test_a_broker_without_gateways_is_of_no_use() -> None:
    state = choice()
    state.broker_up(0.0)
    state.broker_heard(1.0, retained=True)
    state.broker_heard(20.0, retained=False)
    state.poll(20.0)
    assert not state.wants_http(84.9)
    assert state.next_wakeup_s(20.0) == 85.0
    assert state.poll(85.0) == "broker", "while there is nothing better"
    assert state.wants_http(85.0)
    state.http_up()
    assert state.poll(86.0) == "http"
    state.broker_heard(100.0, retained=True)
    assert state.poll(100.0) == "broker", "kept messages come only with a new connection"


def test_what_the_broker_kept_does_not_count_as_a_gateway() -> None:
    state = choice()
    state.broker_up(0.0)
    state.broker_heard(4.9, retained=True)
    assert state.wants_http(65.0)


EVENTS = st.sampled_from(["up", "down", "heard", "http_up", "http_down", "poll"])


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 40.0)), max_size=60))
def test_whatever_happens_a_path_that_is_used_is_up_and_waiting_ends(
    events: list[tuple[str, float]],
) -> None:
    state, now_s, broker, http = choice(), 0.0, False, False
    for event, wait_s in events:
        now_s += wait_s
        match event:
            case "up":
                broker = True
                state.broker_up(now_s)
            case "down":
                broker = False
                state.broker_down(now_s)
            case "heard":
                state.broker_heard(now_s, retained=False)
            case "http_up":
                http = True
                state.http_up()
            case "http_down":
                http = False
                state.http_down()
        used = state.poll(now_s)
        allowed = {"broker" if broker else "none", "http" if http else "none"}
        assert used in (allowed - {"none"} or allowed)
        assert state.wants_http(now_s) or used != "http"
        assert state.next_wakeup_s(now_s) > now_s
        if not broker:
            assert state.wants_http(state.next_wakeup_s(now_s) + TIMING.patience_s)


def test_times_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="patience_s"):
        PathTiming(patience_s=-1.0)
