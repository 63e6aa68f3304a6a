"""What a kept result says of how it was made."""

from __future__ import annotations

from importlib import import_module
from typing import Any

report: Any = import_module("report")


def test_the_command_is_kept_without_the_folders_it_worked_in() -> None:
    given = ["--repeats", "3", "--work", "/somewhere", "--keep=/else", "--json"]
    assert (
        report.command("edge/speed.py", given)
        == "python benchmarks/edge/speed.py --repeats 3 --json"
    )
    assert report.command("edge/speed.py", []) == "python benchmarks/edge/speed.py"
