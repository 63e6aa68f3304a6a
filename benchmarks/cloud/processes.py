"""Services of this checkout as child processes: started, watched from outside, ended by signal.

What is read of a process is what the system says of it (`/proc`), so nothing is asked of what is
being measured. Linux only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PARTS = ("runtime", "edge", "cloud", "kernels", "converters", "sdk", "firmware-profiles")
TIDEGATE = ("-m", "tidegate.cli")
_START_S = 120.0


def environment() -> dict[str, str]:
    """With this checkout's packages before any installed ones."""
    paths = [str(ROOT / part) for part in (*PARTS, "tests/support", "benchmarks")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(*arguments: str) -> str:
    """What a program of this checkout says on stdout."""
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


class ServiceProcess:
    """A program that announces its URL as the last word of its first line, from `with` to its end.

    Args:
        arguments: of Python.
        log: where its stderr goes.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._command = [sys.executable, "-P", *arguments]
        self._log = log
        self.port = 0
        self.began_s = 0.0

    def __enter__(self) -> Self:
        """Start it and wait until it listens.

        Raises:
            RuntimeError: it ended instead; with the end of its log.
        """
        self.began_s = time.perf_counter()
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=out, env=environment()
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if not line:
            self.process.wait(_START_S)
            raise RuntimeError(f"it did not start: {self._log.read_text()[-2000:]}")
        self.port = int(line.rsplit(":", 1)[1])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self, within_s: float = 90.0) -> int:
        """SIGTERM, and its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(within_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode

    def cpu_s(self) -> float:
        """Processor time of all its threads so far, in steps of 10 ms."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float | None:
        """Resident memory now; None once it has ended."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return None if found is None else int(found[1]) / 1024
