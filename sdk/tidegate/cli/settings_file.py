"""Settings of a process from a TOML file, whose keys are the command's flags without the dashes.

A flag that was given counts before the file, the file before the default. The flags' own types and
choices check the file's values, so a flag needs nothing more to be a setting. Relative paths in a
file are relative to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from tidegate.errors import ConfigError

Origin = Literal["flag", "file", "default"]
Table = Mapping[str, Any]

_NOT_GIVEN: Final = object()


class Options:
    """The flags of a parser as settings. To be made when all flags are declared.

    Args:
        parser: its defaults are taken over: what it parses tells which flags were given.
        without: flags that are for the command line only.
    """

    def __init__(self, parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
        self._actions: dict[str, argparse.Action] = {}
        self._defaults: dict[str, object] = {}
        for action in parser._actions:
            names = [name[2:] for name in action.option_strings if name.startswith("--")]
            if not names or action.dest == "help":
                continue
            self._defaults[action.dest] = action.default
            # A list that flags are appended to cannot begin as anything but None.
            action.default = None if isinstance(action, argparse._AppendAction) else _NOT_GIVEN
            if names[0] not in without:
                self._actions[names[0]] = action

    def resolved(
        self, args: argparse.Namespace, table: Table, folder: Path
    ) -> tuple[argparse.Namespace, dict[str, Origin]]:
        """The settings, and where each one of a file could come from does.

        Args:
            args: as parsed.
            table: of the file, `{}` without one.
            folder: that its paths are relative to.

        Raises:
            ConfigError: a key is unknown, or its value is not allowed.
        """
        check_keys(table, self._actions, "the settings")
        found, origins = copy.copy(args), dict[str, Origin]()
        for dest, default in self._defaults.items():
            if not self.given(args, dest):
                setattr(found, dest, copy.copy(default))
        for key, action in self._actions.items():
            origins[key] = "flag" if self.given(args, action.dest) else "default"
            if key in table:
                value = self.read(key, table[key], folder)  # wrong in vain is wrong, too
                if origins[key] == "default":
                    setattr(found, action.dest, value)
                    origins[key] = "file"
        return found, origins

    def given(self, args: argparse.Namespace, dest: str) -> bool:
        """Whether a flag was on the command line."""
        return getattr(args, dest) not in (None, _NOT_GIVEN)

    def dest(self, key: str) -> str:
        """Where a flag's value is kept."""
        return self._actions[key].dest

    def read(self, key: str, value: object, folder: Path) -> object:
        """The value of a file's key, of the flag's type.

        Raises:
            ConfigError: it is not allowed.
        """
        action = self._actions[key]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ConfigError(key, value, "true or false")
            return action.const if value else self._defaults[action.dest]
        if isinstance(action, argparse._AppendAction):
            if not isinstance(value, list):
                raise ConfigError(key, value, "a list")
            return [_scalar(action, key, one, folder) for one in value]
        return _scalar(action, key, value, folder)

    def lines(self, settings: argparse.Namespace, origins: Mapping[str, Origin]) -> Iterator[str]:
        """What holds, as TOML with its origins; passwords in URLs are left out."""
        for key, action in self._actions.items():
            value = getattr(settings, action.dest)
            if value is None:
                yield f"# {key}: not set"
            else:
                yield f"{key} = {shown(value)}  # {origins[key]}"


def _scalar(action: argparse.Action, key: str, value: object, folder: Path) -> object:
    kind: Any = action.type or str
    wanted = {int: (int,), float: (int, float)}.get(kind, (str,))
    names = {int: "a whole number", float: "a number"}
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ConfigError(key, value, names.get(kind, "a text"))
    if action.choices is not None and value not in action.choices:
        raise ConfigError(key, value, f"one of {', '.join(map(str, action.choices))}")
    if kind is Path:
        return folder / str(value)
    if action.metavar == "NAME=PATH":
        name, equals, path = str(value).partition("=")
        return f"{name}{equals}{folder / path}"
    return kind(value)


def check_keys(table: Table, known: Collection[str], where: str) -> None:
    """Refuse a key that nothing reads.

    Raises:
        ConfigError: names it.
    """
    for key in table:
        if key not in known:
            raise ConfigError(key, table[key], f"one of {where}: {', '.join(known)}")


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config", str(path), f"a readable file ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", str(path), f"TOML ({error})") from error


def shown(value: object) -> str:
    """A value as TOML, without a URL's password."""
    match value:
        case bool() | int() | float():
            return json.dumps(value)
        case list() | tuple():
            return f"[{', '.join(shown(one) for one in value)}]"
        case _:
            return json.dumps(_without_password(str(value)), ensure_ascii=False)


def _without_password(text: str) -> str:
    if "://" not in text or "@" not in text:
        return text
    parts = urlsplit(text)
    return parts._replace(netloc="...@" + parts.netloc.rpartition("@")[2]).geturl()
