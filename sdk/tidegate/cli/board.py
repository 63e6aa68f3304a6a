"""`--profile`: what a board's profile fills in where the command line says nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from tidegate.edge.energy.profile import Profile, Runtime
    from tidegate.edge.executors.choice import Choice
    from tidegate.edge.executors.onnx_providers import ProviderName
    from tidegate.edge.executors.openvino_model import KvPrecision
    from tidegate.model.recipe import Recipe

_ROWS = 4
_MIB = 1 << 20
_CPU: tuple[ProviderName, ...] = ("cpu",)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What the daemon takes of flags and profile, flags first."""

    executor: Choice
    providers: tuple[ProviderName, ...]
    lacking: tuple[ProviderName, ...]
    """Of the profile's providers, those that the installed ONNX Runtime does not have."""
    rows: int
    threads: int | None
    kv_precision: KvPrecision | None
    kv_mib: int | None
    max_model_mib: int | None
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


def served(
    args: argparse.Namespace,
    profile: Profile | None,
    memory_bytes: int,
    available: Sequence[ProviderName] | None = None,
) -> Served:
    """What `tidegate serve` takes.

    Args:
        args: flags; those that are None were not given.
        profile: of the board, if one was asked for.
        memory_bytes: of the machine, for a profile's share of it.
        available: providers that can be had; None for those of the installed ONNX Runtime.
    """
    from tidegate.edge.energy.profile import Runtime

    runtime = Runtime() if profile is None else profile.runtime
    executor = _or(args.executor, runtime.executor)
    providers, lacking = _providers(args, runtime, executor, available)
    memory_mib = args.memory_mib
    if memory_mib is None and profile is not None and profile.service.memory_max is not None:
        share = int(profile.service.memory_max.removesuffix("%"))
        memory_mib = memory_bytes * share // 100 // _MIB
    return Served(
        executor=executor,
        providers=providers,
        lacking=lacking,
        rows=_or(args.rows, _or(runtime.rows, _ROWS)),
        threads=_or(args.threads, runtime.threads),
        kv_precision=_or(args.kv_precision, runtime.kv_precision),
        kv_mib=_or(args.kv_mib, runtime.kv_mib),
        max_model_mib=_or(args.max_model_mib, runtime.max_model_mib),
        memory_mib=memory_mib,
    )


def _or(said: T | None, otherwise: T) -> T:
    return otherwise if said is None else said


def _providers(
    args: argparse.Namespace,
    runtime: Runtime,
    executor: Choice,
    available: Sequence[ProviderName] | None,
) -> tuple[tuple[ProviderName, ...], tuple[ProviderName, ...]]:
    """Those to use, and those of the profile that are not to be had.

    A flag insists. A profile prefers: what is not installed falls to the next of its list, and
    with another executor than ONNX Runtime none of them counts.
    """
    if args.providers is not None:
        # Checked, each by name, where the settings of the executor are made.
        named = tuple(name.strip() for name in args.providers.split(","))
        return cast("tuple[ProviderName, ...]", named), ()
    if executor == "openvino" or runtime.providers == _CPU:
        return _CPU, ()
    if available is None:
        from tidegate.edge.executors.onnx_providers import installed_providers

        available = installed_providers()
    found = tuple(name for name in runtime.providers if name in available)
    return found or _CPU, tuple(name for name in runtime.providers if name not in available)


def check_fits(checkpoint: Path, recipe: Recipe, runtime: Runtime) -> None:
    """Raise `ConfigError` if a board would refuse what a checkpoint becomes.

    It is asked before anything is converted, of sizes alone.
    """
    from tidegate.converters.planned import planned_bytes
    from tidegate.model.checkpoint import read_json_object
    from tidegate.model.registry import describe as architecture_of

    arch = architecture_of(read_json_object(checkpoint / "config.json"))
    check_weights(planned_bytes(arch, recipe), runtime)


def check_weights(weight_bytes: int, runtime: Runtime) -> None:
    """Raise `ConfigError`, with the sum, if weights take more than a board's `max_model_mib`."""
    from tidegate.edge.memory import check_model, weights_need

    check_model(weights_need(weight_bytes), runtime.max_model_mib)


def describe(profile: Profile, taken: Served) -> str:
    """One line of what was taken, and what of the profile is not to be had here."""
    said = [f"executor {taken.executor}"]
    if taken.providers != _CPU:
        said.append(f"providers {', '.join(taken.providers)}")
    said.append(f"rows {taken.rows}")
    said.append("threads as the runtime likes" if not taken.threads else f"threads {taken.threads}")
    if taken.kv_precision is not None:
        said.append(f"KV in {taken.kv_precision}")
    for mib, what in (
        (taken.kv_mib, "of KV"),
        (taken.max_model_mib, "of weights"),
        (taken.memory_mib, "in all"),
    ):
        if mib is not None:
            said.append(f"at most {mib} MiB {what}")
    line = f"{profile.id}: {', '.join(said)}"
    if not taken.lacking:
        return line
    return f"{line}; not in this ONNX Runtime: {', '.join(taken.lacking)}"
