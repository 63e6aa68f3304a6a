"""The demo's table: joules never without what they cover, and none where nobody knows."""

from __future__ import annotations

import io

from rich.console import Console

from tidegate.cli.demo import Outcome, print_table
from tidegate.cli.demo_script import REQUESTS
from tidegate.engine.events import EnergyUse

HERE = EnergyUse(joules=0.31, scope="package", source="measured")
RADIO = EnergyUse(joules=1.25, scope="radio", source="estimated")


def outcome(
    title: str, energy: EnergyUse | None, *, as_expected: bool = True, reason: str = "fits"
) -> Outcome:
    return Outcome(
        title=title,
        route="edge",
        reason=reason,
        tokens=7,
        ttft_s=0.01,
        tokens_per_s=500.0,
        energy=energy,
        as_expected=as_expected,
    )


def printed(*outcomes: Outcome) -> str:
    console = Console(file=io.StringIO(), width=120, highlight=False)
    print_table(list(outcomes), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_cells(text: str) -> list[str]:
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return [row[-1].strip() for row in rows]


def test_joules_come_with_what_they_cover_and_how_they_are_known() -> None:
    text = printed(outcome("one", HERE), outcome("two", RADIO))
    assert last_cells(text) == ["310 mJ", "package, measured", "1.25 J", "radio, estimated"]


def test_where_nobody_keeps_account_there_is_a_dash() -> None:
    text = printed(outcome("one", None))
    assert last_cells(text) == ["-"]
    assert "- where nobody keeps account" in " ".join(text.split())


def test_what_a_device_says_is_shown_and_never_obeyed() -> None:
    use = EnergyUse(joules=1.0, scope="[/b]", source="measured")
    text = printed(outcome("one", use, reason="[red] [/]"))
    assert "[red] [/]" in text
    assert "[/b], measured" in text


def test_a_route_that_was_not_expected_is_called_so() -> None:
    assert "edge, unexpected" in printed(outcome("one", None, as_expected=False))


def test_a_device_that_schedules_by_energy_may_keep_an_urgent_request_and_no_other_may() -> None:
    (urgent,) = [one for one in REQUESTS if one.by_energy is not None]
    assert urgent.while_busy
    assert urgent.scheduled(by_energy=True).right == {"cloud", "edge"}
    assert urgent.scheduled(by_energy=False).right == {"cloud"}
    for one in REQUESTS:
        if one is not urgent:
            assert one.scheduled(by_energy=True).right == {one.expected}
