"""Random JSON schemas, bounded so that every answer ends, and a validator of our own for them.

The validator shares nothing with the library that constrains the answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

Schema = dict[str, object]

_NAMES = ("name", "room", "state", "minutes", "values", "a.b", "Grüße", 'quo"ted')
_PATTERNS = ("^[a-c]{1,4}$", "^(on|off)$", "^[0-9]{2}:[0-9]{2}$")
_CHOICES = ("on", "off", "zwölf", 1, 2.5, True, None)


def draw(rng: random.Random, depth: int = 2) -> Schema:
    """A schema; at depth 0 of a single value."""
    kinds = [_text, _pattern, _integer, _choice]
    if depth:
        kinds += [_object, _object, _object, _array, _either]
    return rng.choice(kinds)(rng, depth)


def draw_object(rng: random.Random) -> Schema:
    """A schema of an object, as programs ask for."""
    return _object(rng, 2)


def _text(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _pattern(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _integer(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 1000)}


def _choice(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample(_CHOICES, rng.randint(1, 4))}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: draw(rng, depth - 1) for name in names},
        "required": sorted(rng.sample(names, rng.randint(1, len(names)))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    most = least + rng.randint(0, 2)
    return {"type": "array", "items": draw(rng, depth - 1), "minItems": least, "maxItems": most}


def _either(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [draw(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def is_valid(schema: Mapping[str, object], value: object) -> bool:
    """Whether `value`, as JSON was read, satisfies a schema that was drawn here."""
    match schema:
        case {"anyOf": [*parts]}:
            return any(is_valid(part, value) for part in parts)
        case {"enum": [*choices]}:
            return any(value == one and type(value) is type(one) for one in choices)
        case {"type": "string", "pattern": str(pattern)}:
            return isinstance(value, str) and re.search(pattern, value) is not None
        case {"type": "string", "minLength": int(least), "maxLength": int(most)}:
            return isinstance(value, str) and least <= len(value) <= most
        case {"type": "integer", "minimum": int(least), "maximum": int(most)}:
            return type(value) is int and least <= value <= most
        case {"type": "array", "items": dict(item), "minItems": int(least), "maxItems": int(most)}:
            sized = isinstance(value, list) and least <= len(value) <= most
            return sized and all(is_valid(item, one) for one in value)
        case {"type": "object", "properties": dict(inner), "required": [*required]}:
            named = isinstance(value, dict) and set(required) <= value.keys() <= inner.keys()
            return named and all(is_valid(inner[name], one) for name, one in value.items())
    raise ValueError(f"{schema}: was not drawn here")
