"""An interruption waits for the step it came in, unless it comes twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from tidegate.cli.interrupts import interrupted_between_steps


def send(number: signal.Signals) -> None:
    """What Python does when the signal comes; one that is really sent reaches the test's runner."""
    handler = signal.getsignal(number)
    if handler is not signal.SIG_IGN:
        assert callable(handler)
        handler(number, None)


@pytest.fixture(autouse=True)
def unwinds() -> Iterator[None]:
    """Signals as `tidegate` has them; whoever started the tests may have them ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def quiet(what: str, done: int, total: int) -> None:
    """Reports to nobody."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_at_the_next_report_and_not_before(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    done = []

    def work() -> None:
        with interrupted_between_steps(quiet) as report:
            report("blocks", 0, 3)
            send(number)
            done.append("the rest of the step")
            report("blocks", 1, 3)
            done.append("the step after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest of the step"]
    assert capfd.readouterr().err == "tidegate: ends after this step; once more to end now\n"


def test_what_was_started_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_between_steps(quiet) as report:
            send(signal.SIGHUP)
            report("blocks", 1, 3)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_wait_for_the_step() -> None:
    done = []

    def work() -> None:
        with interrupted_between_steps(quiet):
            send(signal.SIGTERM)
            done.append("after one")
            send(signal.SIGINT)
            done.append("after two")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["after one"]


def test_a_signal_in_the_last_step_leaves_its_result() -> None:
    with interrupted_between_steps(quiet) as report:
        report("blocks", 3, 3)
        send(signal.SIGTERM)
        result = "whole"
    assert result == "whole"


def test_handlers_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupted_between_steps(quiet):
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_reports_as_ever() -> None:
    reported: list[int] = []

    def work() -> None:
        with interrupted_between_steps(lambda what, done, total: reported.append(done)) as report:
            report("blocks", 1, 3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reported == [1]
