"""What every kept result carries: the command, versions and hardware it was made with."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def cpu() -> str:
    """Number and name of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def command(script: str, arguments: Sequence[str]) -> str:
    """The command without the folders it worked in, which mean nothing elsewhere."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not skip and name not in ("--work", "--keep"):
            kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
        skip = argument in ("--work", "--keep")
    return " ".join(["python", f"benchmarks/{script}", *kept])


def report(script: str, packages: Sequence[str], results: object) -> str:
    """JSON to print, and to keep under `benchmarks/results/`."""
    body: Mapping[str, object] = {
        "command": command(script, sys.argv[1:]),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "hardware": f"{platform.machine()}, {cpu()}",
        "results": results,
    }
    return json.dumps(body, indent=2)
