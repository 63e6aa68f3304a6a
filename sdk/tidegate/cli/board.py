"""`--profile`: what a board's profile fills in where the command line says nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidegate.edge.energy.profile import Profile
    from tidegate.edge.executors.choice import Choice

_ROWS = 4
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What the daemon takes of flags and profile, flags first."""

    executor: Choice
    rows: int
    threads: int | None
    memory_mib: int | None


def add_profile(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare the flag; `what` says what the profile fills in."""
    parser.add_argument(
        "--profile", metavar="ID", help=f"board whose profile says {what}, or auto: this machine's"
    )


def read_profile(wanted: str) -> Profile:
    """The profile of that id, or the one detected.

    Raises:
        ConfigError: there is none, or a file is wrong.
    """
    from tidegate.edge.energy.profile_detect import detect, read_board
    from tidegate.edge.energy.profile_files import read_library

    library = read_library()
    if wanted != "auto":
        return library.profile(wanted)
    return detect(read_board(), library.every()).profile


def served(args: argparse.Namespace, profile: Profile | None, memory_bytes: int) -> Served:
    """What `tidegate serve` takes.

    Args:
        args: flags; those that are None were not given.
        profile: of the board, if one was asked for.
        memory_bytes: of the machine, for a profile's share of it.
    """
    executor, rows = args.executor, args.rows
    threads, memory_mib = args.threads, args.memory_mib
    if profile is not None:
        executor = profile.runtime.executor if executor is None else executor
        rows = profile.runtime.rows if rows is None else rows
        threads = profile.runtime.threads if threads is None else threads
        if memory_mib is None and profile.service.memory_max is not None:
            share = int(profile.service.memory_max.removesuffix("%"))
            memory_mib = memory_bytes * share // 100 // _MIB
    return Served(
        executor="auto" if executor is None else executor,
        rows=_ROWS if rows is None else rows,
        threads=threads,
        memory_mib=memory_mib,
    )


def describe(profile: Profile, taken: Served) -> str:
    """One line of what was taken, and what of the profile has no effect here."""
    threads = (
        "threads as the runtime likes" if taken.threads is None else f"threads {taken.threads}"
    )
    memory = "" if taken.memory_mib is None else f", at most {taken.memory_mib} MiB"
    line = f"{profile.id}: executor {taken.executor}, rows {taken.rows}, {threads}{memory}"
    idle = [] if profile.runtime.kv_mib is None else [f"kv_mib {profile.runtime.kv_mib}"]
    if profile.runtime.max_model_mib is not None:
        idle.append(f"max_model_mib {profile.runtime.max_model_mib}")
    if profile.runtime.providers != ("cpu",):
        idle.append(f"providers {', '.join(profile.runtime.providers)}")
    return f"{line}; without effect yet: {'; '.join(idle)}" if idle else line
