"""`Journal`: what was measured so far, so that a run may be cut into parts.

A line of JSON for each case, written when it ended; a case that failed is tried again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Told = dict[str, Any]


class Journal:
    """Runs what was not run, as long as there is time."""

    def __init__(
        self,
        path: Path | None,
        minutes: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read `path`, if it is there; None keeps nothing. `minutes` None is any time."""
        self._path, self._clock = path, clock
        self._ends_s = None if minutes is None else clock() + 60 * minutes
        self._known: dict[tuple[str, str], Told] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                told = json.loads(line)
                if "failed" not in told and not told.get("exit_code"):
                    self._known[told["family"], told["case"]] = told
        self.left = 0
        """How many were not run for want of time."""

    def run(self, family: str, case: str, measure: Callable[[Told], Told]) -> Told | None:
        """What is known of a case, else what `measure` adds to its name; None without time."""
        known = self._known.get((family, case))
        if known is not None:
            return known
        if self._ends_s is not None and self._clock() >= self._ends_s:
            self.left += 1
            return None
        told = measure({"family": family, "case": case})
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
        return told
