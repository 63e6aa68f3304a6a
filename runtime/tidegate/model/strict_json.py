"""Reads parsed JSON (or TOML) into frozen dataclasses, strictly, by their annotations.

Every key must be there and none besides, every value of exactly the annotated type; what is wrong
is named by its path. Understood are dataclasses, `X | Y` of them (told apart by their keys), `X |
None`, `Literal`, `tuple[X, ...]`, `Mapping[str, X]`, and bool, int, float, str. A whole number may
stand for a float, and must not be negative: no count, size or version of ours is.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_EXACT = 2**53
"""Whole numbers up to it are floats exactly; far larger ones have no float at all."""

T = TypeVar("T")
Refuse = Callable[[str], Exception]
"""Makes the error to raise from a message."""


def read(kind: type[T], value: object, where: str, refuse: Refuse) -> T:
    """The value as a `kind`.

    Args:
        kind: a dataclass.
        value: what a JSON or TOML parser gave.
        where: how to call the value in messages, such as `manifest.json`.
        refuse: makes the error that is raised.
    """
    return cast(T, _read(kind, value, where, refuse))


def _read(kind: Any, value: object, where: str, refuse: Refuse) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(cast(type, kind), value, where, refuse)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where, refuse)
    if origin is Literal:
        if not any(type(value) is type(item) and value == item for item in arguments):
            allowed = ", ".join(repr(item) for item in arguments)
            raise refuse(f"{where} = {value!r:.80}: must be one of {allowed}")
        return value
    if origin is tuple:
        return tuple(
            _read(arguments[0], item, f"{where}[{place}]", refuse)
            for place, item in enumerate(_list(value, where, refuse))
        )
    if origin is not None and issubclass(origin, Mapping):
        body = _object(value, where, refuse)
        return {key: _read(arguments[1], item, f"{where}.{key}", refuse) for key, item in body}
    return _plain(kind, value, where, refuse)


def _dataclass(kind: type, value: object, where: str, refuse: Refuse) -> object:
    body = dict(_object(value, where, refuse))
    hints = get_type_hints(kind)
    expected = {field.name for field in fields(kind)}
    if set(body) != expected:
        missing, unknown = sorted(expected - set(body)), sorted(set(body) - expected)
        raise refuse(f"{where}: missing keys {missing}, unknown keys {unknown}")
    values = {
        name: _read(hints[name], body[name], f"{where}.{name}", refuse) for name in sorted(expected)
    }
    return kind(**values)


def _union(options: tuple[Any, ...], value: object, where: str, refuse: Refuse) -> object:
    """None, the dataclass whose keys are these, or the plain type that fits."""
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if isinstance(value, dict):
        classes = [option for option in rest if is_dataclass(option)]
        fitting = [c for c in classes if {field.name for field in fields(c)} == set(value)]
        if fitting or len(classes) == 1:
            return _read((fitting or classes)[0], value, where, refuse)
    if len(rest) == 1:
        return _read(rest[0], value, where, refuse)
    exact = [option for option in rest if type(value) is option]
    if exact:
        return _read(exact[0], value, where, refuse)
    names = " or ".join(getattr(option, "__name__", str(option)) for option in rest)
    raise refuse(f"{where} = {value!r:.80}: must be a {names}")


def _plain(kind: Any, value: object, where: str, refuse: Refuse) -> object:
    if kind is float and type(value) is int and abs(value) <= _EXACT:
        value = float(value)
    wrong = type(value) is not kind or (type(value) is int and value < 0)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise refuse(f"{where} = {value!r:.80}: must be a {kind.__name__}")
    return value


def _object(value: object, where: str, refuse: Refuse) -> list[tuple[str, object]]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise refuse(f"{where} must be an object")
    return list(value.items())


def _list(value: object, where: str, refuse: Refuse) -> list[object]:
    if not isinstance(value, list):
        raise refuse(f"{where} must be a list")
    return value
