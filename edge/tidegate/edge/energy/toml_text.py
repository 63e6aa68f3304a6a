"""`toml_text`: a parsed TOML table as text again, of which the parser makes an equal table.

The standard library only reads TOML. Keys keep their order, but plain values come before tables.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(table: Mapping[str, Any]) -> str:
    """The text of a whole file.

    Raises:
        TypeError: a value is of a type that TOML does not have.
    """
    return "\n".join(_lines(table, "")).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: str) -> Iterator[str]:
    plain = {key: one for key, one in table.items() if not _is_table(one) and not _are_tables(one)}
    for key, value in plain.items():
        yield f"{_key(key)} = {_value(value)}"
    for key, value in table.items():
        if key in plain:
            continue
        inner = f"{path}.{_key(key)}" if path else _key(key)
        for one in value if _are_tables(value) else [value]:
            yield ""
            yield f"[[{inner}]]" if _are_tables(value) else f"[{inner}]"
            yield from _lines(one, inner)


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _are_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_table, value))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # shortest that reads back as the same; nan and inf are TOML's words
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inner = (f"{_key(key)} = {_value(one)}" for key, one in value.items())
        return f"{{ {', '.join(inner)} }}"
    raise TypeError(f"{type(value).__name__} is no type of TOML")


def _text(value: str) -> str:
    # The escapes of JSON are TOML's too; one more character has to be escaped there.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
