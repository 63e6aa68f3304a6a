"""Typed look-ups in a parsed `config.json`, with errors that name the key.

Shared by the architecture modules so that a wrong type or a missing key reads the same whichever
model it is in.
"""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.errors import CheckpointError

Config = Mapping[str, object]

_HUGE = 1e30
"""No scale, rate or epsilon of a model comes near; above it a float32 overflows."""


def _refuse(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} = {value!r:.80}: must be {allowed}")


def positive_int(config: Config, key: str, default: int | None = None) -> int:
    """The whole number at `key`, at least 1; `default` when the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refuse(key, value, "a whole number of at least 1")
    return value


def positive_float(config: Config, key: str, default: float | None = None) -> float:
    """The number at `key`, above 0; `default` when the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
        raise _refuse(key, value, "a number above 0")
    return float(value)


def flag(config: Config, key: str, default: bool) -> bool:
    """The boolean at `key`; `default` when the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _refuse(key, value, "true or false")
    return value


def text(config: Config, key: str, default: str) -> str:
    """The string at `key`; `default` when the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _refuse(key, value, "a string")
    return value


def refuse_unless(config: Config, key: str, allowed: tuple[object, ...], described: str) -> None:
    """Raise unless the value at `key` is absent or one of `allowed`."""
    value = config.get(key)
    if value is not None and value not in allowed:
        raise _refuse(key, value, described)
