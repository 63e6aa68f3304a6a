"""Show what this machine can run and measure and, given a bundle, load it and say how it runs.

Of energy it says which sensors can be read, which power modes can be taken, and what to mend.

`tidegate doctor link` looks at the way to the cloud instead: names, TLS, certificates, the broker's
access rules, the clock, the gateway. (A bundle that is called so is ./link.)

Example:
  tidegate doctor
  tidegate doctor assistant --rows 8 --json
  tidegate doctor link --link mqtts://broker.example --keys device/
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli import doctor_energy, doctor_link
from tidegate.cli.trust import add_trust, read_trust
from tidegate.errors import TidegateError

if TYPE_CHECKING:
    from tidegate.edge.machine import Machine
    from tidegate.model.bundle import Bundle

_PACKAGES = ("tidegate", "tidegate-native", "openvino", "onnxruntime")
_HOW = "pip install ./kernels/native, or scripts/build-native in a checkout: needs a C++17 compiler"

Facts = Mapping[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "bundle", type=Path, nargs="?", help="folder of a bundle to load, or the word `link`"
    )
    parser.add_argument(
        "--executor",
        choices=("auto", "onnx", "openvino"),
        default="auto",
        help="what would run the model (default: the fastest that the bundle holds)",
    )
    parser.add_argument("--context", type=int, help="prompt plus answer of one request, in tokens")
    parser.add_argument("--rows", type=int, default=4, help="requests that run at once (default 4)")
    parser.add_argument("--threads", type=int, help="threads (default: the runtime's choice)")
    parser.add_argument("--kv-precision", choices=("u8", "u4", "f16", "f32"))
    parser.add_argument("--native", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--cache-dir", type=Path, help="folder of re-tiled weights, as in `serve`")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    doctor_energy.add_arguments(parser)
    doctor_link.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Look, maybe load, print; status 1 where the bundle cannot run."""
    if args.bundle == Path("link"):
        return doctor_link.run(args)
    from tidegate.edge.machine import read_gb_per_s, read_machine
    from tidegate.model.bundle import Bundle

    machine = read_machine()
    found: dict[str, Facts] = {
        "machine": {
            **asdict(machine),
            "read_gb_per_s": round(read_gb_per_s(machine.cores), 1),
        },
        "installed": {name: _version(name) for name in _PACKAGES},
        "native": _native(),
        "energy": doctor_energy.energy_facts(args),
    }
    status = 0
    if args.bundle is not None:
        bundle = Bundle.open(args.bundle, trusted=read_trust(args.trust))
        found["bundle"] = _try(bundle, args, machine)
        status = int(found["bundle"]["runs"] is not True)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return status


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> Facts:
    """The path of the native layer, or why there is none and what to do."""
    from tidegate.edge.executors.native import NativeUnavailable, find_native

    release = _version("openvino")
    if release is None:
        return {"path": None, "reason": "it runs in OpenVINO, which is not installed"}
    try:
        native = find_native(".".join(release.split(".")[:3]))
    except NativeUnavailable as why:
        return {"path": None, "reason": str(why), "how": _HOW}
    if not native.fast:
        how = f"--native on runs the {native.path} path, which is slow"
        return {"path": None, "reason": "it has no fast path for this processor", "how": how}
    return {"path": native.path}


def _try(bundle: Bundle, args: argparse.Namespace, machine: Machine) -> Facts:
    """Load the bundle as `serve` would, unless its memory is not there."""
    from tidegate.edge.executors.choice import ExecutorSettings, choose_target, open_executor
    from tidegate.edge.memory import memory_need
    from tidegate.engine.facts import Described

    manifest = bundle.manifest
    context = args.context or manifest.context_tokens
    settings = ExecutorSettings(
        choice=args.executor,
        context_tokens=args.context,
        rows=args.rows,
        threads=args.threads,
        kv_precision=args.kv_precision,
        native=args.native,
        cache_dir=args.cache_dir,
    )
    need = memory_need(manifest, choose_target(bundle, args.executor), settings)
    memory = need.to_json()
    needs = {"model": manifest.model_id, "context_tokens": context, "rows": args.rows}
    needs |= {"memory": memory}
    if memory["sum_bytes"] > machine.available_bytes:
        reason = f"{_mb(memory['sum_bytes'])} of memory: {_mb(machine.available_bytes)} are free"
        return {**needs, "runs": False, "reason": reason}
    try:
        executor = open_executor(bundle, settings)
    except TidegateError as error:
        return {**needs, "runs": False, "reason": str(error)}
    facts = asdict(executor.facts) if isinstance(executor, Described) else None
    executor.close()
    return {**needs, "runs": True, "executor": facts}


def _print(found: Mapping[str, Facts]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for title, facts in found.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in _flat(facts):
            table.add_row(name.replace("_", " "), Text(_text(name, value)))
        Console(file=sys.stdout, highlight=False).print(table)


def _flat(facts: Facts) -> list[tuple[str, object]]:
    """Nested facts one after another."""
    rows: list[tuple[str, object]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value)
        elif isinstance(value, list):
            rows += [(name, one) for one in value]
        else:
            rows.append((name, value))
    return rows


def _text(name: str, value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none known"
    if name.endswith("_bytes") and isinstance(value, int):
        return _mb(value)
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
