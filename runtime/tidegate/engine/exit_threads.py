"""Threads beside the main one end before the interpreter does.

Python stops a daemon thread at exit wherever it next wants the interpreter. Inside a C++ library
that unwinds frames which forbid it, and the process aborts with `terminate called without an active
exception`: when a model still runs, but also when the garbage that such a thread happens to collect
is a model. A thread that is no daemon would be waited for without end, and a step that hangs must
not keep a process. So these are told to stop at exit and waited for, but only for so long.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

PATIENCE_S: Final = 10.0
"""For all threads together; a step of the largest model that a machine bears takes less."""

_stops: WeakKeyDictionary[threading.Thread, Callable[[], None]] = WeakKeyDictionary()
_lock = threading.Lock()


def start_until_exit(thread: threading.Thread, stop: Callable[[], None]) -> None:
    """Start a daemon thread that is told to `stop` at exit, if it still runs, and waited for.

    Args:
        thread: not started yet.
        stop: makes it end soon; must not hold the thread, or neither is ever forgotten.
    """
    assert thread.daemon, "what is no daemon Python waits for itself, without end"
    with _lock:
        if not _stops:
            # Again and again the same function: it runs once.
            atexit.unregister(_end_all)
            atexit.register(_end_all)
        _stops[thread] = stop
    thread.start()


def _end_all() -> None:
    with _lock:
        threads = [(thread, stop) for thread, stop in _stops.items() if thread.is_alive()]
    for _, stop in threads:
        stop()
    deadline_s = time.monotonic() + PATIENCE_S
    for thread, _ in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
