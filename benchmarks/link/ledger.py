"""What an application knows: which requests it made and how each ended, on disk, one line each.

Lines are whole writes to a file opened for appending, so whoever is killed leaves whole lines;
what the kernel has taken outlives the process (the machine stays up in these benchmarks).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

What = Literal["submitted", "answered", "failed", "run", "repeated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line. `t_s` is the machine's monotonic clock, the same for all processes."""

    what: What
    number: int
    t_s: float
    request_id: str = ""
    right: bool = True
    """The answer was exactly the expected one."""
    code: str = ""


class Ledger:
    """The writing end."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(
        self,
        what: What,
        number: int,
        *,
        request_id: str = "",
        right: bool = True,
        code: str = "",
    ) -> None:
        entry = Entry(
            what=what,
            number=number,
            t_s=time.monotonic(),
            request_id=request_id,
            right=right,
            code=code,
        )
        os.write(self._file, json.dumps(asdict(entry)).encode() + b"\n")


class LedgerReader:
    """The reading end: what is new since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def fresh(self) -> Iterator[Entry]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            yield Entry(**json.loads(line))


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Every request of a run, by how it ended; each counts once, under the worst that is true."""

    submitted: int
    answered_once: int
    failed: int
    """The device said so, with a reason other than that time was up."""
    lost: int
    """No end, or none but that time was up."""
    duplicated: int
    """Answered more than once."""
    wrong: int
    """Some answer to it was not exactly the expected one."""
    ran_again: int
    """Generated more than once by the cloud (allowed: delivery is what happens once)."""
    repeated_chunks: int
    """Chunks that arrived again and that the application itself had to sort out."""
    codes: dict[str, int]


TIME_IS_UP = "deadline"


def tally(entries: list[Entry]) -> Tally:
    """Judge a run by its ledger."""
    ids: set[int] = set()
    answers: dict[int, list[bool]] = defaultdict(list)
    codes: dict[int, str] = {}
    runs: Counter[int] = Counter()
    repeated = 0
    for entry in entries:
        match entry.what:
            case "submitted":
                ids.add(entry.number)
            case "answered":
                answers[entry.number].append(entry.right)
            case "failed":
                codes[entry.number] = entry.code
            case "run":
                runs[entry.number] += 1
            case "repeated":
                repeated += 1
    wrong = {number for number, rights in answers.items() if not all(rights)}
    twice = {number for number, rights in answers.items() if len(rights) > 1} - wrong
    failed = {n for n, code in codes.items() if code != TIME_IS_UP} - answers.keys()
    once = answers.keys() - wrong - twice
    return Tally(
        submitted=len(ids),
        answered_once=len(once),
        failed=len(failed),
        lost=len(ids - answers.keys() - failed),
        duplicated=len(twice),
        wrong=len(wrong),
        ran_again=sum(count > 1 for count in runs.values()),
        repeated_chunks=repeated,
        codes=dict(Counter(codes.values())),
    )
