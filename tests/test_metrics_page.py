"""docs/metrics.md names every counter of the link, and both ends expose every one."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path

from tidegate.api.metrics import render_counters
from tidegate.link.counters import LinkCounters

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_every_counter_has_its_line_and_every_line_a_counter() -> None:
    named = re.findall(r"^\| `tidegate_link_([a-z_]+)_total` \|", PAGE, re.MULTILINE)
    assert named == [field.name for field in fields(LinkCounters)]


def test_what_is_exposed_bears_the_names_of_the_page() -> None:
    text = render_counters("tidegate_link", asdict(LinkCounters(sent=3))).decode()
    for name in re.findall(r"`(tidegate_link_[a-z_]+_total)`", PAGE):
        assert f"\n{name} " in text
    assert "tidegate_link_sent_total 3.0" in text
