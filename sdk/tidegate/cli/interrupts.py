"""Ctrl-C, SIGTERM and SIGHUP during work that calls into compiled libraries: between two steps.

Python raises `KeyboardInterrupt` wherever it is, also while a library in C++ is being imported or
calls back, and some of those end the process instead of passing it on. So the first signal is only
noted, and raised by the next report of progress; a second one is raised at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, int, int], None]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTED = b"tidegate: ends after this step; once more to end now\n"


@contextmanager
def interrupted_between_steps(report: Report) -> Iterator[Report]:
    """Yield `report`, which raises `KeyboardInterrupt` once a signal has come.

    Outside the main thread, where signals cannot be listened to, it is `report` itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield report
        return
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        os.write(2, _NOTED)  # `print` may not be called again from within itself

    def checked(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if noted:
            raise KeyboardInterrupt

    # Under nohup the end of the terminal is none of ours.
    heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, note) for number in heard]
    try:
        yield checked
    finally:
        for number, handler in zip(heard, before, strict=True):
            signal.signal(number, handler)
