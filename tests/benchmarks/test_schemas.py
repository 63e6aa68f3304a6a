"""The validator that answers are checked by: what it takes and what it refuses."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

import pytest

schemas: Any = import_module("peers.schemas")

RECORD = {
    "type": "object",
    "properties": {
        "state": {"enum": ["on", 1]},
        "at": {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"},
        "values": {
            "type": "array",
            "items": {"type": "integer", "minimum": -2, "maximum": 2},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["state"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("value", [{"state": "on"}, {"state": 1, "at": "10:45", "values": [-2, 2]}])
def test_what_the_schema_says_is_valid(value: object) -> None:
    assert schemas.is_valid(RECORD, value)
    assert schemas.is_valid({"anyOf": [{"enum": [None]}, RECORD]}, value)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"state": "off"},
        {"state": True},
        {"state": "on", "more": 1},
        {"state": "on", "at": "1:45"},
        {"state": "on", "values": []},
        {"state": "on", "values": [3]},
        {"state": "on", "values": [True]},
        {"state": "on", "values": [1, 1, 1]},
    ],
)
def test_anything_else_is_not(value: object) -> None:
    assert not schemas.is_valid(RECORD, value)


def test_every_schema_that_is_drawn_can_be_checked() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        assert schemas.is_valid(schemas.draw(rng), object()) is False
