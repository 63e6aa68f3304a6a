"""JSON schemas, read for what a grammar can enforce: everything else is refused by its name.

JSON Schema lets a reader ignore keywords that it does not know; then an answer would be called
valid that is not. So keywords are either enforced, or known to say nothing about validity, or an
error with their place. (JSON Schema 2020-12, core and validation.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from tidegate.errors import RequestError

_NAME_CHARS: Final = 64
_SCHEMAS: Final = 2048
_PROPERTIES: Final = 512
"""Of one object. The matcher's work grows with their square: 0.1 s for 512, 60 s for 8 000."""


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_COUNT: Final = (_is_count, "a whole number of at least 0")
_NUMBER: Final = (_is_number, "a number")
_TEXT: Final = (lambda value: isinstance(value, str), "a string")
_TEXTS: Final = (_is_texts, "a list of strings")
_LIST: Final = (lambda value: isinstance(value, list) and bool(value), "a list of at least one")
_TYPES: Final = (
    lambda value: isinstance(value, str) or (_is_texts(value) and bool(value)),
    "a type or a list of types",
)

ENFORCED: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "type": _TYPES,
    "enum": _LIST,
    "const": (lambda value: True, "anything"),
    "required": _TEXTS,
    "minItems": _COUNT,
    "maxItems": _COUNT,
    "minProperties": _COUNT,
    "maxProperties": _COUNT,
    "minLength": _COUNT,
    "maxLength": _COUNT,
    "pattern": _TEXT,
    "format": _TEXT,
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "exclusiveMaximum": _NUMBER,
    "multipleOf": _NUMBER,
    "$ref": _TEXT,
}
"""Keywords without schemas in them, and what they may hold."""

_ONE: Final = ("items", "additionalProperties")
_SEVERAL: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED: Final = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords that hold one schema, a list of them, or an object of them."""

_IDENTITY: Final = ("$schema", "$id", "$anchor", "$comment")
_FOR_PEOPLE: Final = ("title", "description", "default", "examples", "example", "deprecated")
_FOR_TOOLS: Final = ("readOnly", "writeOnly", "contentEncoding", "contentMediaType")
_SILENT: Final = frozenset((*_IDENTITY, *_FOR_PEOPLE, *_FOR_TOOLS, "discriminator"))
"""Keywords that say nothing about what is valid."""


def check_schema(schema: object, *, name: str, most_nested: int) -> None:
    """Refuse what the grammar would not enforce.

    Args:
        schema: parsed JSON.
        name: what errors call the schema; the place in it follows.
        most_nested: schemas within schemas.

    Raises:
        RequestError: a keyword is not supported or holds the wrong kind of value, or the schema is
            too deep or too wide.
    """
    for count, (path, part) in enumerate(walk(schema, name, most_nested=most_nested), start=1):
        if count > _SCHEMAS:
            raise RequestError(name, f"holds too many schemas: at most {_SCHEMAS}")
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise RequestError(path, "is no schema: must be an object, true or false")
        for keyword, value in part.items():
            _check_keyword(f"{path}.{keyword[:_NAME_CHARS]}", keyword, value)


def walk(schema: object, name: str, *, most_nested: int) -> Iterator[tuple[str, object]]:
    """Every schema in `schema`, itself included and before what it holds, with its path.

    Raises:
        RequestError: a schema lies more than `most_nested` deep.
    """
    stack = [(name, schema, 0)]
    while stack:
        path, part, depth = stack.pop()
        if depth > most_nested:
            raise RequestError(name, f"is nested too deeply: at most {most_nested} schemas deep")
        yield path, part
        if isinstance(part, dict):
            stack += [(f"{path}.{key}", inner, depth + 1) for key, inner in _inner(part)]


def _inner(part: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for keyword, value in part.items():
        if keyword in _ONE:
            yield keyword, value
        elif keyword in _SEVERAL and isinstance(value, list):
            yield from ((f"{keyword}.{index}", inner) for index, inner in enumerate(value))
        elif keyword in _NAMED and isinstance(value, dict):
            yield from ((f"{keyword}.{key[:_NAME_CHARS]}", one) for key, one in value.items())


def _check_keyword(path: str, keyword: str, value: object) -> None:
    if keyword in ENFORCED:
        allows, allowed = ENFORCED[keyword]
        if not allows(value):
            raise RequestError(path, f"must be {allowed}")
    elif keyword in _SEVERAL and not isinstance(value, list):
        raise RequestError(path, "must be a list of schemas")
    elif keyword in _NAMED and not isinstance(value, dict):
        raise RequestError(path, "must be an object of schemas")
    elif keyword == "properties" and isinstance(value, dict) and len(value) > _PROPERTIES:
        raise RequestError(path, f"has {len(value)}: must be at most {_PROPERTIES}")
    elif keyword == "items" and isinstance(value, list):
        raise RequestError(path, "must be one schema; prefixItems takes a list")
    elif not (
        keyword in (*_ONE, *_SEVERAL, *_NAMED)
        or keyword in _SILENT
        or (keyword.startswith("x-") and keyword != "x-guidance")  # the matcher's own options
    ):
        raise RequestError(path, "is a keyword that is not supported: must be absent")
