"""Processes that live and die as one, each way that one of them can end."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from crewwork import break_down, die, refuse, until_told
from services import until

from tidegate.cloud import crew as crew_module
from tidegate.cloud.crew import Crew, Say, Work
from tidegate.errors import TeamError, UnavailableError

pytestmark = pytest.mark.system


@contextmanager
def started(work: Work, leave: Callable[[int], object] = lambda status: None) -> Iterator[Crew]:
    with closing(Crew(3, work, leave=leave)) as crew:
        pids = crew.pids
        assert len(pids) == 2
        yield crew
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not crew.meeting.parent.exists()


class PickledOnce:
    """Work that the first process takes, and that cannot be handed to the second."""

    def __init__(self) -> None:
        self.handed = 0

    def __call__(self, rank: int, meeting: Path, say: Say) -> None:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Work]]:
        self.handed += 1
        if self.handed > 1:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        return partial, (until_told,)


def test_when_one_cannot_be_started_those_before_it_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(BlockingIOError, match="no more processes"):
        Crew(3, PickledOnce())
    assert not multiprocessing.active_children()
    assert not list(tmp_path.iterdir())


def test_who_is_dismissed_ends_and_is_waited_for() -> None:
    with started(until_told) as crew:
        assert crew.wait(1) == ["1 is here", "2 is here"]
        crew.dismissed()
        crew.meeting.touch()
    assert crew.failure is None


def test_what_one_refuses_is_the_crews_error() -> None:
    problem = r"rank 2 of the 3 processes .*: memory_mib = 9: must be more"
    with started(refuse) as crew:
        with pytest.raises(UnavailableError, match=problem) as raised:
            crew.wait(1)
        assert raised.value.exit_status == 1


def test_a_defect_of_one_is_named_without_its_words() -> None:
    with started(break_down) as crew:
        with pytest.raises(TeamError, match=r"rank 1 .* failed: ZeroDivisionError") as raised:
            crew.wait(1)
        assert "a secret" not in str(raised.value)
        assert raised.value.exit_status == 70


def test_one_that_is_killed_ends_the_others_and_who_watches_hears_of_it() -> None:
    with started(die) as crew:
        assert len(crew.wait(1)) == 2
        with pytest.raises(TeamError, match=r"rank 2 .* was killed by signal 9"):
            asyncio.run(crew.watch())
        until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in crew.pids), "both end")
        # Whatever fails behind it has this cause.
        assert crew.explain(RuntimeError("connection closed")) is crew.failure


def test_a_process_that_does_not_end_by_itself_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crew_module, "LAST_WORDS_S", 0.2)
    left: list[int] = []
    with started(die, left.append) as crew:
        until(lambda: bool(left), "the process is left")
    assert left == [70]
    assert f"tidegate: {crew.failure}" in capsys.readouterr().err
