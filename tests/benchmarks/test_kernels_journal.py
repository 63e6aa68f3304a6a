"""A benchmark's run in parts: each case is measured once, whatever part it falls into."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

journal: Any = import_module("kernels.journal")


class Watch:
    """Seconds, of which each measurement takes 40."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def measure(self, told: dict[str, Any]) -> dict[str, Any]:
        self.now_s += 40
        return told | {"at_s": self.now_s}


def part(path: Path | None, watch: Watch, minutes: float | None) -> tuple[list[Any], int]:
    one = journal.Journal(path, minutes, clock=watch)
    return [one.run("some", name, watch.measure) for name in "abcde"], one.left


def test_parts_make_a_whole_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    path, watch = tmp_path / "so-far.jsonl", Watch()
    found, left = part(path, watch, 1)
    assert [one and one["case"] for one in found] == ["a", "b", None, None, None]
    assert left == 3
    part(path, watch, 1)
    found, left = part(path, watch, 1)
    assert [one["at_s"] for one in found] == [40, 80, 120, 160, 200]
    assert left == 0


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "so-far.jsonl"
    first = journal.Journal(path, None)
    first.run("some", "a", lambda told: told | {"failed": "no room"})
    again = journal.Journal(path, None)
    assert again.run("some", "a", lambda told: told | {"right": True})["right"]
    assert journal.Journal(path, None).run("some", "a", lambda told: {})["right"]


def test_without_a_file_or_a_limit_everything_is_measured() -> None:
    found, left = part(None, Watch(), None)
    assert all(found)
    assert left == 0
