"""What runs beside the main thread at exit: it ends first, or is left behind after a while."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

from tidegate.engine import exit_threads
from tidegate.engine.exit_threads import start_until_exit

PROGRAM = """
import asyncio, sys, time
from tidegate.engine import exit_threads
from tidegate.engine.one_thread import OneThread

exit_threads.PATIENCE_S = {patience_s}

def piece():
    print("begun", flush=True)
    time.sleep({piece_s})
    print("ended", flush=True)

async def main():
    OneThread("beside").submit(piece)
    await asyncio.sleep(0.1)

asyncio.run(main())
"""


def run(*, patience_s: float, piece_s: float) -> str:
    program = PROGRAM.format(patience_s=patience_s, piece_s=piece_s)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_piece_that_runs_at_exit_is_waited_for() -> None:
    assert run(patience_s=30, piece_s=0.5) == "begun\nended\n"


def test_a_piece_that_hangs_does_not_keep_the_process() -> None:
    began_s = time.monotonic()
    assert run(patience_s=0.2, piece_s=50) == "begun\n"
    assert time.monotonic() - began_s < 40


def test_a_thread_that_has_ended_is_forgotten() -> None:
    stopped = threading.Event()
    thread = threading.Thread(target=stopped.wait, daemon=True)
    start_until_exit(thread, stopped.set)
    assert thread in exit_threads._stops
    kept = weakref.ref(thread)
    stopped.set()
    thread.join()
    del thread
    gc.collect()
    # Counting would not do: threads of tests before this one may be forgotten meanwhile.
    assert kept() is None
    assert kept not in list(exit_threads._stops.keyrefs())
