"""What processes of a crew do in its tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tidegate.cloud.crew import Say
from tidegate.errors import ConfigError


def until_told(rank: int, meeting: Path, say: Say) -> None:
    """Be ready, and end when the meeting's file is there."""
    say(f"{rank} is here")
    while not meeting.exists():
        time.sleep(0.02)


def refuse(rank: int, meeting: Path, say: Say) -> None:
    """The second one cannot; the first one would go on for ever."""
    if rank == 2:
        raise ConfigError("memory_mib", 9, "more")
    until_told(rank, meeting, say)


def break_down(rank: int, meeting: Path, say: Say) -> None:
    """The first one has a defect, whose words may quote what it was about."""
    if rank == 1:
        words = "a " + "secret"
        raise ZeroDivisionError(words)
    until_told(rank, meeting, say)


def die(rank: int, meeting: Path, say: Say) -> None:
    """The second one is killed, after all were ready."""
    say(f"{rank} is here")
    if rank == 2:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
