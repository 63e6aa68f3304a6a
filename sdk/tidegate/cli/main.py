"""Parses the command line, runs the command, turns our errors into one line and exit status 1."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from tidegate.errors import TidegateError

COMMANDS = {
    "demo": "see the whole idea work: convert, answer on the device, overflow to the cloud",
    "convert": "turn a Hugging Face checkpoint into a bundle for devices",
    "inspect": "show what a bundle holds, after verifying it",
    "evaluate": "measure what compression cost, against the checkpoint",
    "bundle": "sign, pack or unpack a bundle",
    "doctor": "show what this machine can run, and how it runs a bundle",
    "profile": "show what is known of a board: power modes, sensors, energy, and sources",
    "simulate": "simulate a board's requests under several energy policies",
    "serve": "run the device daemon on a bundle",
    "cloud": "run the cloud service on a checkpoint or a bundle",
    "ray": "run the cloud service on Ray Serve, with several engines",
    "broker": "run a small MQTT broker, for laptops",
    "chat": "ask a running device or cloud one question and stream the answer",
    "route": "ask a running device where it would run a call, and why",
    "keys": "make and look after keys: of a fleet and its devices, for bundles, for HTTP",
    "usage": "what calls by API key used and cost",
    "enroll": "join a fleet with a one-time token",
}


class Command(Protocol):
    """What a command's module provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags; imports nothing heavy."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit status."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="tidegate", description="Small models at the edge, the cloud when they overflow."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = _load(name)
        command = commands.add_parser(
            name,
            help=summary,
            description=importlib.import_module(f"tidegate.cli.{name}").__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tidegate`; returns the exit status."""
    args = build_parser().parse_args(argv)
    # SIGTERM unwinds like Ctrl-C, so that children end and half-written files go; a service
    # replaces both by an orderly stop. So does the end of the terminal, unless nohup was asked for.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TidegateError, ExceptionGroup) as error:
        ours = _ours(error)
        for one in ours:
            print(f"tidegate: {one}", file=sys.stderr)
        return max(one.exit_status for one in ours)
    except OSError as error:
        # What the machine refuses (a full disk, no permission) is no defect: no traceback.
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"tidegate: {what}", file=sys.stderr)
        return 1


def _ours(error: TidegateError | ExceptionGroup) -> list[TidegateError]:
    """All errors of ours; anything else in a group is a defect and is raised."""
    if isinstance(error, TidegateError):
        return [error]
    ours, other = error.split(TidegateError)
    if other is not None:
        raise other
    assert ours is not None
    found: list[TidegateError] = []
    for one in ours.exceptions:
        assert isinstance(one, TidegateError | ExceptionGroup)
        found += _ours(one)
    return found


def _load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"tidegate.cli.{name}"))
