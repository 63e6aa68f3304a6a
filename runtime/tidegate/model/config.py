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
_MOST = 2**31 - 1
"""No size of a model comes near; products of two still fit an int64."""


def _refuse(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} = {value!r:.80}: must be {allowed}")


def positive_int(config: Config, key: str, default: int | None = None, *, most: int = _MOST) -> int:
    """The whole number at `key`, from 1 to `most`; `default` when the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _refuse(key, value, f"a whole number of at least 1 and at most {most}")
    return value


def whole_number(config: Config, key: str, default: int) -> int:
    """The whole number at `key`, 0 or more; `default` when the key is absent or null."""
    return 0 if _is_zero(config.get(key)) else positive_int(config, key, default)


def _is_zero(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 0


def optional_int(config: Config, key: str) -> int | None:
    """The whole number at `key`, at least 1; None when the key is absent or null."""
    return None if config.get(key) is None else positive_int(config, key)


def positive_float(config: Config, key: str, default: float | None = None) -> float:
    """The number at `key`, above 0; `default` when the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
        raise _refuse(key, value, "a number above 0")
    return float(value)


def optional_float(config: Config, key: str) -> float | None:
    """The number at `key`, above 0; None when the key is absent or null."""
    return None if config.get(key) is None else positive_float(config, key)


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


def mapping(config: Config, key: str) -> dict[str, object]:
    """The object at `key`; an empty one when the key is absent or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _refuse(key, value, "an object")
    return value


def refuse_unless(config: Config, key: str, allowed: tuple[object, ...], described: str) -> None:
    """Raise unless the value at `key` is absent or one of `allowed`."""
    value = config.get(key)
    if value is not None and value not in allowed:
        raise _refuse(key, value, described)
