"""`Crew`: the processes beside this one that run a model together: started, watched, ended.

They live and die as one. A process that ends unasked ends the others, and this one: the service is
told, so that it can fail its answers; when that takes too long, because an exchange waits for the
dead, the process ends at once. A process whose parent is gone ends by itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, Literal

from tidegate.errors import (
    ExecutionError,
    TeamError,
    TidegateError,
    UnavailableError,
    describe_defect,
)

_log = logging.getLogger(__name__)

LAST_WORDS_S: Final = 5.0
"""From a process's death to the end of this one, if it has not ended orderly by then."""
_TOLD_S: Final = 0.5
"""For the answers that fail to reach who waits for them."""
_JOIN_S: Final = 20.0
"""For processes to end that were asked to."""

Say = Callable[[str], None]
"""Called by a process when it has come so far as the others wait for, with a word about it."""
Work = Callable[[int, Path, Say], None]
"""What a process does, of its rank and where they meet, until it is done; picklable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Word:
    """What a process says: that it came so far, why it cannot, or how it failed."""

    kind: Literal["said", "refused", "failed"]
    text: str


class Crew:
    """The processes 1 to `world` - 1 of a team; this one is 0."""

    def __init__(
        self, world: int, work: Work, *, leave: Callable[[int], object] = os._exit
    ) -> None:
        """Start them.

        Args:
            world: processes of the team, with this one.
            work: what each of them does.
            leave: ends this process with a status, without unwinding.

        Raises:
            Exception: a process could not be started; those that were are ended.
        """
        self._world, self._leave = world, leave
        self._folder = Path(tempfile.mkdtemp(prefix="tidegate-team-"))
        self.meeting = self._folder / "meeting"
        self.failure: TidegateError | None = None
        """Why it cannot go on; set once."""
        self._failed = threading.Event()
        self._said: dict[int, list[str]] = {rank: [] for rank in range(1, world)}
        self._news = threading.Condition()
        self._ended = False
        self._lock = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._processes: dict[int, BaseProcess] = {}
        self._words: dict[int, Connection] = {}
        # Before `multiprocessing` waits for them, which are not going to end.
        atexit.register(self._kill)
        try:
            for rank in range(1, world):
                self._start(rank, work, context)
        except BaseException:  # whoever was started has nobody to meet, and no one to close it
            self._kill()
            atexit.unregister(self._kill)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        threading.Thread(target=self._watch, name="crew", daemon=True).start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes."""
        return tuple(one.pid for one in self._processes.values() if one.pid is not None)

    def wait(self, words: int) -> list[str]:
        """Until each of them has said so many words; the last of each, by rank.

        Raises:
            TidegateError: one of them is not going to.
        """
        with self._news:
            while any(len(said) < words for said in self._said.values()):
                if self.failure is not None:
                    raise self.failure
                self._news.wait(0.2)
            return [said[words - 1] for said in self._said.values()]

    def fail(self, error: TidegateError) -> None:
        """End all of the crew, and soon this process: it cannot go on."""
        with self._lock:
            if self.failure is not None or self._ended:
                return
            self.failure = error
        _log.critical("%s; the service ends, to be started again", error)
        self._kill()
        self._failed.set()
        threading.Thread(target=self._leave_late, name="crew's end", daemon=True).start()

    async def watch(self) -> None:
        """Until cancelled.

        Raises:
            TidegateError: a process ended, or a step failed in this one.
        """
        while not self._failed.is_set():
            await asyncio.sleep(0.1)
        await asyncio.sleep(_TOLD_S)
        assert self.failure is not None, "set before the event"
        raise self.failure

    def explain(self, error: Exception, *, within_s: float = 2.0) -> Exception:
        """What is behind an error of this process: the death of another, if there is one."""
        self._failed.wait(within_s)
        return self.failure or error

    def dismissed(self) -> None:
        """They were told that there is nothing more to do: from now on they may end."""
        with self._lock:
            self._ended = True

    def close(self) -> None:
        """Wait for those that were dismissed and end all others."""
        asked, deadline_s = self._ended, time.monotonic() + _JOIN_S
        self.dismissed()
        for process in self._processes.values() if asked else ():
            process.join(max(0.0, deadline_s - time.monotonic()))
        self._kill()
        atexit.unregister(self._kill)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, rank: int, work: Work, context: SpawnContext) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(work, rank, self.meeting, theirs), name=f"rank {rank}"
        )
        process.start()
        theirs.close()
        self._processes[rank], self._words[rank] = process, ours

    def _watch(self) -> None:
        """Hear what the processes say, until one of them ends."""
        speaking, alive = dict(self._words), dict(self._processes)
        while alive and not self._failed.is_set():
            ends = [one.sentinel for one in alive.values()]
            heard = wait([*speaking.values(), *ends])
            for rank in [rank for rank, one in speaking.items() if one in heard]:
                try:
                    self._hear(rank, speaking[rank].recv())
                except (EOFError, OSError):
                    speaking.pop(rank).close()
            # The last words of the dead first.
            for rank in [rank for rank in alive if rank not in speaking]:
                if alive[rank].is_alive():
                    continue
                manner = _manner(alive.pop(rank).exitcode)
                if not self._ended:
                    self.fail(TeamError(f"{self._name(rank)} {manner}"))

    def _hear(self, rank: int, word: _Word) -> None:
        match word.kind:
            case "said":
                with self._news:
                    self._said[rank].append(word.text)
                    self._news.notify_all()
            case "refused":
                self.fail(UnavailableError(f"{self._name(rank)}: {word.text}"))
            case "failed":
                self.fail(TeamError(f"{self._name(rank)} failed: {word.text}"))

    def _name(self, rank: int) -> str:
        return f"rank {rank} of the {self._world} processes that run the model"

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def _leave_late(self) -> None:
        time.sleep(LAST_WORDS_S)
        if not self._ended:
            assert self.failure is not None, "why this runs"
            sys.stderr.write(f"tidegate: {self.failure}\n")
            sys.stderr.flush()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._leave(self.failure.exit_status)


def _manner(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed by signal {-status}"
    return f"ended with status {status}"


def _run(work: Work, rank: int, meeting: Path, words: Connection) -> None:
    """A process of the crew."""
    # Whoever stops a service may signal all of its processes; the first one says when it is over.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format=f"rank {rank}: %(levelname)s %(message)s")
    threading.Thread(
        target=_end_with_the_parent, args=(meeting.parent,), name="parent", daemon=True
    ).start()
    try:
        work(rank, meeting, lambda text: words.send(_Word(kind="said", text=text)))
    except ExecutionError as error:
        _say_and_end(words, _Word(kind="failed", text=str(error)))
    except TidegateError as error:
        _say_and_end(words, _Word(kind="refused", text=str(error)))
    except Exception as error:  # the boundary of a process
        _say_and_end(words, _Word(kind="failed", text=describe_defect(error)))


def _say_and_end(words: Connection, word: _Word) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        words.send(word)
    sys.exit(1)


def _end_with_the_parent(folder: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of a crew has one"
    wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)  # which the parent had no time for
    os._exit(1)
