"""`OwnModes`: power modes of the daemon's own, fewer threads, on every machine that has no other.

Only executors whose threads can be limited while they run have them (`LiveThreads`): OpenVINO with
the native layer. On ONNX Runtime, and on OpenVINO without that layer, threads are fixed when the
model is loaded; there the scheduler still chooses how many requests share a step.
"""

from __future__ import annotations

import contextlib
import re
from typing import Protocol, runtime_checkable

from tidegate.edge.energy.actuate import ModeSwitch
from tidegate.errors import ActuationError, TidegateError


@runtime_checkable
class LiveThreads(Protocol):
    """What runs a model, with threads that can be limited between two steps."""

    @property
    def most_threads(self) -> int | None:
        """That there are without a limit; None where they cannot be limited here."""

    def limit_threads(self, threads: int) -> None:
        """Use so many from the next step on, at least one and at most `most_threads`.

        Raises:
            TidegateError: it cannot; they are as they were.
        """


class OwnModes:
    """`ModeSwitch` over an executor's threads: all of them, half and a quarter."""

    tool = "own"

    def __init__(self, executor: LiveThreads) -> None:
        """Begin with all of them; `own_modes` tells whether there is anything to switch."""
        most = executor.most_threads
        assert most is not None, "own_modes asks first"
        self._executor, self._most = executor, most
        self._threads = {mode_name(count): count for count in thread_counts(most)}
        self._now = mode_name(most)
        self.modes = tuple(self._threads)

    def current(self) -> str | None:
        """See `ModeSwitch.current`."""
        return self._now

    def switch(self, mode: str) -> None:
        """See `ModeSwitch.switch`."""
        try:
            self._executor.limit_threads(self._threads[mode])
        except TidegateError as error:
            raise ActuationError(f"the power mode is {self._now} as before: {error}") from error
        self._now = mode

    def close(self) -> None:
        """See `ModeSwitch.close`."""
        with contextlib.suppress(TidegateError):  # it may have been closed
            self._executor.limit_threads(self._most)
            self._now = mode_name(self._most)


def own_modes(executor: object) -> ModeSwitch | None:
    """The modes that an executor lets the daemon have; None if it has but one."""
    if not isinstance(executor, LiveThreads):
        return None
    most = executor.most_threads
    return None if most is None or most < 2 else OwnModes(executor)


def thread_counts(most: int) -> tuple[int, ...]:
    """A quarter, half and all of the threads, ascending, each once."""
    return tuple(sorted({max(1, most // 4), max(1, most // 2), most}))


def mode_name(threads: int) -> str:
    """The name of the mode of so many threads."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def threads_of(mode: str) -> int | None:
    """The threads of a mode of that name; None for a mode of another tool."""
    found = re.fullmatch(r"([1-9]\d{0,3}) threads?", mode)
    return None if found is None else int(found[1])
