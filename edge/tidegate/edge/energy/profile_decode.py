"""A parsed TOML table becomes a dataclass: unknown, missing and mistyped keys are errors.

The first mistake is raised as `ProfileError`, which names the file that brought the key.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from tidegate.edge.energy.profile import ALL_KEYS, Src
from tidegate.errors import ConfigError

Path = tuple[str, ...]
T = TypeVar("T")


class ProfileError(ConfigError):
    """A profile file is wrong; the setting is `FILE: KEY`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origins:
    """Which file each key came from, where tables of several were merged."""

    files: Mapping[Path, str]
    """By path of a key; the longest that a path begins with counts."""

    def error(self, path: Path, value: object, allowed: str) -> ProfileError:
        """The error for one key, naming file and key."""
        found = next(
            (self.files[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.files), "?"
        )
        return ProfileError(f"{found}: {dotted(path)}", value, allowed)


def dotted(path: Path) -> str:
    """`("energy", "idle", "[0]", "w")` as `energy.idle[0].w`."""
    return ".".join(path).replace(".[", "[") or "file"


def key_of(one: Field[Any]) -> str:
    """The TOML key of a field; `from_` is `from`, a word that Python keeps for itself."""
    return one.name.removesuffix("_")


def hints_of(cls: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass."""
    return typing.get_type_hints(cls)


def decode(cls: type[T], table: object, origins: Origins, path: Path = ()) -> T:
    """Read `table` as a `cls`.

    Raises:
        ProfileError: a key is unknown, missing or of another type.
    """
    if not isinstance(table, dict):
        raise origins.error(path, table, "a table")
    declared = {key_of(one): one for one in fields(cast(Any, cls))}
    for key in table:
        if key not in declared:
            raise origins.error((*path, key), table[key], f"absent; known are {_list(declared)}")
    hints, values = hints_of(cls), {}
    for key, one in declared.items():
        if key in table:
            values[one.name] = _value(hints[one.name], table[key], origins, (*path, key))
        elif one.default is MISSING and one.default_factory is MISSING:
            raise origins.error((*path, key), None, "given")
    return cls(**values)


def _value(hint: Any, value: object, origins: Origins, path: Path) -> object:
    """`value` as the annotation `hint` wants it."""
    kind = get_origin(hint)
    if hint == Src and path[-1] == "src":
        value = {ALL_KEYS: value} if isinstance(value, str) else value
    if kind in (types.UnionType, typing.Union):
        (hint,) = (one for one in get_args(hint) if one is not types.NoneType)
        return _value(hint, value, origins, path)
    if kind is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise origins.error(path, value, f"one of {_list(map(str, get_args(hint)))}")
        return value
    if kind is tuple:
        if not isinstance(value, list):
            raise origins.error(path, value, "an array")
        inner = get_args(hint)[0]
        items = enumerate(value)
        return tuple(_value(inner, one, origins, (*path, f"[{n}]")) for n, one in items)
    if kind is not None and issubclass(kind, Mapping):
        if not isinstance(value, dict):
            raise origins.error(path, value, "a table")
        inner = get_args(hint)[1]
        return {key: _value(inner, one, origins, (*path, key)) for key, one in value.items()}
    if is_dataclass(hint):
        return decode(cast(type[object], hint), value, origins, path)
    return _scalar(hint, value, origins, path)


def _scalar(hint: Any, value: object, origins: Origins, path: Path) -> object:
    checks: dict[type, tuple[Callable[[object], bool], str]] = {
        str: (lambda one: isinstance(one, str) and bool(one.strip()), "a text, not empty"),
        bool: (lambda one: isinstance(one, bool), "true or false"),
        int: (_is_count, "a whole number, at least 0"),
        float: (_is_number, "a finite number, at least 0"),
    }
    holds, allowed = checks[hint]
    if not holds(value):
        raise origins.error(path, value, allowed)
    return float(cast(float, value)) if hint is float else value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(cast(float, value)) and cast(float, value) >= 0


def _list(names: typing.Iterable[str]) -> str:
    return ", ".join(names)
