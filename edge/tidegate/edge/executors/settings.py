"""Checks that the settings of every executor have in common."""

from __future__ import annotations

from tidegate.errors import ConfigError


def check_counts(settings: object, *, always: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Raise `ConfigError` naming the first count that is below 1.

    Args:
        settings: has the named attributes, whole numbers.
        always: names of counts that are there.
        optional: names of counts that may be None.
    """
    for name in always:
        value: int = getattr(settings, name)
        if value < 1:
            raise ConfigError(name, value, "at least 1")
    for name in optional:
        wanted: int | None = getattr(settings, name)
        if wanted is not None and wanted < 1:
            raise ConfigError(name, wanted, "at least 1, or absent")
