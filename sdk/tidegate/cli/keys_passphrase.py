"""Where a passphrase comes from: a prompt, a file or the environment, never the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.link.wrapping import PassphraseSource


def add_passphrase(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; without one, TIDEGATE_PASSPHRASE_FILE or TIDEGATE_PASSPHRASE is used."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--ask-passphrase", action="store_true", help="ask for it on the terminal")
    group.add_argument(
        "--passphrase-file", type=Path, metavar="FILE", help="its first line, mode 0600"
    )
    group.add_argument("--passphrase-env", metavar="NAME", help="the variable that holds it")


def passphrase_source(args: argparse.Namespace) -> PassphraseSource:
    """How to get the passphrase of keys that exist; asked only when one is wrapped."""
    from tidegate.link.keyfiles import passphrase_from_environment

    return _chosen(args, twice=False) or passphrase_from_environment


def new_passphrase(args: argparse.Namespace) -> bytes | None:
    """The passphrase for keys that are being made; None when none was asked for."""
    source = _chosen(args, twice=True)
    return None if source is None else source()


def _chosen(args: argparse.Namespace, *, twice: bool) -> PassphraseSource | None:
    if args.ask_passphrase:
        return lambda: _ask(twice=twice)
    if args.passphrase_file is not None:
        from tidegate.link.keyfiles import read_passphrase

        path: Path = args.passphrase_file
        return lambda: read_passphrase(path)
    if args.passphrase_env is not None:
        name: str = args.passphrase_env
        return lambda: _variable(name)
    return None


def _ask(*, twice: bool) -> bytes:
    from getpass import getpass

    first = getpass("passphrase: ")
    if twice and getpass("once more: ") != first:
        raise ConfigError("passphrase", "(typed twice)", "the same both times")
    return first.encode()


def _variable(name: str) -> bytes:
    import os

    value = os.environ.get(name)
    if value is None:
        raise ConfigError("passphrase-env", name, "the name of a variable that is set")
    return value.encode()
