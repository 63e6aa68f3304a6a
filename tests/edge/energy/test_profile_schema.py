"""The published schema takes every file that comes along, and refuses what reading refuses."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from importlib import resources
from typing import Any

import pytest

from tidegate.edge.energy.profile_schema import Schema, profile_schema

FILES = {
    one.name: tomllib.loads(one.read_text(encoding="utf-8"))
    for one in sorted(resources.files("tidegate.profiles").iterdir(), key=lambda one: one.name)
    if one.name.endswith(".toml")
}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


def holds(schema: Schema, value: Any) -> bool:
    """Whether `value` is what the schema says; knows the words that the schema uses, no others."""
    known = {"type", "additionalProperties", "properties", "required", "items", "enum"}
    assert set(schema) <= known | {"minimum", "minLength", "anyOf", "oneOf", "$schema", "title"}
    if "anyOf" in schema:
        return any(holds(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if (
        "oneOf" in schema
        and sum(set(one["required"]) <= set(value) for one in schema["oneOf"]) != 1
    ):
        return False
    wanted = schema["type"]
    kind = type(value)
    if kind not in TYPES[wanted]:
        return False
    if wanted == "array":
        return all(holds(schema["items"], one) for one in value)
    if wanted == "object":
        inner, other = schema.get("properties", {}), schema["additionalProperties"]
        if not set(schema.get("required", ())) <= set(value) or (
            not other and set(value) - set(inner)
        ):
            return False
        return all(holds(inner.get(key, other), one) for key, one in value.items())
    if wanted == "string":
        return bool(len(value) >= schema.get("minLength", 0))
    return bool(wanted == "boolean" or value >= schema.get("minimum", value))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_comes_along_is_what_the_schema_says(name: str) -> None:
    assert holds(profile_schema(), FILES[name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("hue",), "red"),
        (("applies_to",), "rk3588"),
        (("schema",), 2),
        (("runtime", "threads"), "two"),
        (("runtime", "threads"), True),
        (("runtime", "providers"), ["abacus"]),
        (("energy", "point", 0, "quant"), None),
        (("energy", "point", 0, "active_w"), -1),
        (("sources", "jfikar", "kind"), "guessed"),
        (("title",), ""),
    ],
)
def test_what_reading_refuses_is_not_what_the_schema_says(
    path: tuple[str | int, ...], value: object
) -> None:
    wrong: Any = deepcopy(FILES["raspberry-pi-5.toml"])
    *way, last = path
    inner = wrong
    for key in way:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    assert not holds(profile_schema(), wrong)
