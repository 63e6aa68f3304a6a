"""docs/api.md is true: its limits are those of the code, its stages are in the sampler's order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate.api.schema import MOST_CHOICES, read_chat, read_completion
from tidegate.engine.logprobs import LEAST
from tidegate.engine.request import MOST_BIASED, MOST_TOP_LOGPROBS
from tidegate.errors import RequestError

PAGE = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text(encoding="utf-8")
HELLO = [{"role": "user", "content": "hello"}]


def test_the_limits_it_names_are_those_of_the_code() -> None:
    assert f"at most {MOST_BIASED}" in PAGE
    assert f"`top_logprobs` (0 to {MOST_TOP_LOGPROBS})" in PAGE
    assert f"`n` up to {MOST_CHOICES}" in PAGE
    assert f"told as {LEAST:g}" in PAGE


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("repetition_penalty", 0.01, 10),
        ("frequency_penalty", -2, 2),
        ("presence_penalty", -2, 2),
        ("temperature", 0, 2),
    ],
)
def test_the_ranges_it_names_are_those_of_the_code(field: str, least: float, most: float) -> None:
    row = next(line for line in PAGE.splitlines() if f"`{field}`" in line and line[0] == "|")
    assert f"{least:g} to {most:g}" in row
    for value in (least, most):
        read_chat({"messages": HELLO, field: value})
    for value in (least - 0.01, most + 0.01):
        with pytest.raises(RequestError, match=field):
            read_chat({"messages": HELLO, field: value})


def test_every_field_of_its_table_is_read() -> None:
    rows = re.findall(r"^\| \d [^|]+\|([^|]+)\|", PAGE, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) == 10
    for name in names:
        for read, said in ((read_chat, {"messages": HELLO}), (read_completion, {"prompt": "x"})):
            with pytest.raises(RequestError, match=name):
                read({**said, name: "no such value"})
