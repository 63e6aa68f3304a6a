"""Small random JSON schemas and a validator of our own for them: the twin of what a grammar does.

Every schema is bounded, so that a model that answers at random comes to an end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES = st.sampled_from(["a", "b", "name", "lamp on", 'quo"ted', "Grüße", "a.b"])


def _strings() -> st.SearchStrategy[Schema]:
    bounds = st.tuples(st.integers(0, 3), st.integers(0, 5))
    return st.one_of(
        bounds.map(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[0] + b[1]}),
        st.sampled_from(["^[a-c]{1,4}$", "^(on|off)$", "^x[0-9]{2}$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
    )


def _scalars() -> st.SearchStrategy[Schema]:
    return st.one_of(
        _strings(),
        st.tuples(st.integers(-50, 50), st.integers(0, 1000)).map(
            lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}
        ),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1]}}]),
        st.lists(st.sampled_from(["x", "yes", 1, 2.5, None, True]), min_size=1).map(
            lambda values: {"enum": values}
        ),
    )


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def schema(drawn: tuple[dict[str, Schema], bool]) -> Schema:
        properties, all_required = drawn
        required = sorted(properties) if all_required else sorted(properties)[:1]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return st.tuples(st.dictionaries(_NAMES, inner, max_size=3), st.booleans()).map(schema)


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda drawn: {
            "type": "array",
            "items": drawn[0],
            "minItems": drawn[1],
            "maxItems": drawn[1] + drawn[2],
        }
    )


def _deeper(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    either = st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
    return st.one_of(_objects(inner), _arrays(inner), either)


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas whose answers have at most a few hundred characters."""
    return st.recursive(_scalars(), _deeper, max_leaves=5)


def is_valid(schema: Schema, value: object) -> bool:
    """Whether `value` satisfies a schema that `schemas` drew."""
    if "anyOf" in schema:
        return any(is_valid(part, value) for part in schema["anyOf"])
    if "const" in schema:
        return _same(value, schema["const"])
    if "enum" in schema:
        return any(_same(value, one) for one in schema["enum"])
    return _CHECKS[schema["type"]](schema, value)


def _same(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _is_text(schema: Schema, value: object) -> bool:
    if not isinstance(value, str):
        return False
    if "pattern" in schema:
        return re.search(schema["pattern"], value) is not None
    return bool(schema["minLength"] <= len(value) <= schema["maxLength"])


def _is_integer(schema: Schema, value: object) -> bool:
    return type(value) is int and bool(schema["minimum"] <= value <= schema["maximum"])


def _is_object(schema: Schema, value: object) -> bool:
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys() <= properties.keys()
        and all(is_valid(properties[name], inner) for name, inner in value.items())
    )


def _is_array(schema: Schema, value: object) -> bool:
    return (
        isinstance(value, list)
        and schema["minItems"] <= len(value) <= schema["maxItems"]
        and all(is_valid(schema["items"], inner) for inner in value)
    )


_CHECKS: dict[str, Callable[[Schema, object], bool]] = {
    "string": _is_text,
    "integer": _is_integer,
    "object": _is_object,
    "array": _is_array,
    "boolean": lambda schema, value: isinstance(value, bool),
    "null": lambda schema, value: value is None,
}
