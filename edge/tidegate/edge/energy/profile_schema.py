"""The JSON schema of a profile file, made from the dataclasses, so that the two cannot differ.

For editors and other languages. A file may leave out what it inherits, so only what is in arrays,
which are replaced as a whole, has required keys; sources, scopes and the rest of
`profile_checks` are checked by `tidegate profile check`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from tidegate.edge.energy.profile import SCHEMA_VERSION, Profile, Src
from tidegate.edge.energy.profile_decode import hints_of, key_of

Schema = dict[str, Any]

_SCALARS: dict[type, Schema] = {
    str: {"type": "string", "minLength": 1},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number", "minimum": 0},
}


def profile_schema() -> Schema:
    """The schema of one file: a profile, an overlay or a calibration."""
    schema = _table(Profile, whole=False)
    schema["properties"]["applies_to"] = _SCALARS[str]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Tidegate board profile, schema {SCHEMA_VERSION}",
        **schema,
        "required": ["schema"],
        "oneOf": [{"required": ["id"]}, {"required": ["applies_to"]}],
    }


def _table(cls: Any, *, whole: bool) -> Schema:
    hints = hints_of(cls)
    found: Schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            key_of(one): _kind(hints[one.name], one.name, whole=whole) for one in fields(cls)
        },
    }
    needed = [
        key_of(one)
        for one in fields(cls)
        if one.default is MISSING and one.default_factory is MISSING
    ]
    return found | ({"required": needed} if whole and needed else {})


def _kind(hint: Any, name: str, *, whole: bool) -> Schema:
    kind, inner = get_origin(hint), get_args(hint)
    if hint == Src and name == "src":
        table = {"type": "object", "additionalProperties": _SCALARS[str]}
        return {"anyOf": [_SCALARS[str], table]}
    if kind in (types.UnionType, typing.Union):
        (only,) = (one for one in inner if one is not types.NoneType)
        return _kind(only, name, whole=whole)
    if kind is Literal:
        return {"enum": list(inner)}
    if kind is tuple:
        return {"type": "array", "items": _kind(inner[0], name, whole=True)}
    if kind is not None and issubclass(kind, Mapping):
        values = _kind(inner[1], name, whole=whole)
        return {"type": "object", "additionalProperties": values}
    return _table(hint, whole=whole) if is_dataclass(hint) else dict(_SCALARS[hint])
