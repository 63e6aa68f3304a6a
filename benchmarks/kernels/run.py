"""Every kernel on the GPU at hand: first right, then how fast, beside torch and a plain copy.

    python benchmarks/kernels/run.py --all --json --keep benchmarks/results/kernels-h200.json

Runs the GPU tests, then every case of every family, in turns with its baseline and a copy
(`timing.py`); a case that fails is named and the others go on. `--only NAME` takes the families or
cases whose name holds it. Where a machine is lent for a while, `--resume FILE --minutes 9` begins
no case after so long and exits with 3 while some are left: the same command goes on from FILE, a
line of JSON for each case. `--smoke` runs every case once at tiny sizes, without a GPU through
Triton's interpreter, and measures nothing. Without a GPU there is nothing to measure: exit code 2.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from kernels.journal import Journal  # noqa: E402  (behind the path that it lies on)

_NOT_FAMILIES = {"case", "journal", "models", "run", "timing"}
_TURNS = 60


def main() -> int:
    """Parse, run, print; 1 when a test or a case failed, 2 without a GPU."""
    arguments = _parser().parse_args()
    if not (arguments.all or arguments.only or arguments.quick):
        _parser().error("say --all, --only NAME or --smoke")
    has_gpu = os.path.exists("/dev/nvidiactl")
    if not has_gpu and not arguments.quick:
        print("no NVIDIA GPU here: nothing to measure (--smoke tries the code)", file=sys.stderr)
        return 2
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    results: dict[str, Any] = {"gpu": _gpu() if has_gpu else None}
    journal = Journal(arguments.resume, arguments.minutes)
    if arguments.all and not arguments.quick:
        results["tests"] = journal.run("tests", "on the GPU", lambda told: told | _tests())
    results["cases"] = list(_measured(arguments, journal))
    _tell(results, arguments)
    if journal.left:
        print(f"time is up, {journal.left} left: run the same again", file=sys.stderr)
        return 3
    failed = any("failed" in one for one in results["cases"])
    return int(failed or (results.get("tests") or {}).get("exit_code", 0) != 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="GPU tests and every case")
    parser.add_argument("--only", metavar="NAME", help="families or cases that hold this")
    parser.add_argument(
        "--smoke",
        "--quick",
        dest="quick",
        action="store_true",
        help="tiny sizes, once, nothing measured",
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="what was measured so far")
    parser.add_argument("--minutes", type=float, help="after which no case begins")
    parser.add_argument("--json", action="store_true", help="print what --keep writes")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--turns", type=int, default=_TURNS, help=f"of each case, {_TURNS}")
    return parser


def families() -> list[str]:
    """The modules beside this one that have `cases(quick)`."""
    names = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in names if name not in _NOT_FAMILIES)


def _measured(arguments: argparse.Namespace, journal: Journal) -> Iterator[dict[str, Any]]:
    import torch
    from kernels.timing import Clock

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = None if arguments.quick else Clock(device, arguments.turns)

    def measure(one: Any, told: dict[str, Any]) -> dict[str, Any]:
        try:
            if hasattr(one, "measure"):
                return told | _reported(one, device, quick=arguments.quick)
            return told | (_tried(one, device) if clock is None else _timed(one, device, clock))
        except Exception as error:  # the boundary of one case: the others are measured
            traceback.print_exc()
            return told | {"failed": f"{type(error).__name__}: {error}"[:2000]}
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    for family in families():
        module = import_module(f"kernels.{family}")
        reports = module.reports(arguments.quick) if hasattr(module, "reports") else ()
        for one in (*module.cases(arguments.quick), *reports):
            if arguments.only and arguments.only not in f"{family} {one.name}":
                continue
            told = journal.run(family, one.name, partial(measure, one))
            if told is not None:
                print(_line(told), file=sys.stderr, flush=True)
                yield told


def _reported(report: Any, device: Any, *, quick: bool) -> dict[str, Any]:
    """What a family measures in its own way."""
    figures = report.measure(device)
    bars = [
        {**asdict(limit), "kind": limit.figure, "met": limit.met(figures[limit.figure])}
        for limit in report.limits
        if not quick
    ]
    return {"figures": figures, "bars": bars}


def _tried(case: Any, device: Any) -> dict[str, Any]:
    work = case.make(device)
    work.run()
    if work.baseline is not None:
        work.baseline()
    return _error(work)


def _error(work: Any) -> dict[str, Any]:
    if work.error is None:
        return {}
    error = float(work.error())
    told: dict[str, Any] = {"error_over_allowed": round(error, 4)}
    # Also where it is not a number at all.
    return told if error <= 1 else told | {"failed": "too far from float64"}


def _timed(case: Any, device: Any, clock: Any) -> dict[str, Any]:
    from kernels.timing import COPY_BYTES, ratio, timed

    work = case.make(device)
    told = _error(work)
    calls = [work.run, clock.copy] + ([work.baseline] if work.baseline is not None else [])
    times, graphs = clock.in_turns(calls)
    told["kernel"] = asdict(timed(times[0], graph=graphs[0]))
    copy = timed(times[1], graph=graphs[1])
    told["copy_gb_per_s"] = 2 * COPY_BYTES / copy.us / 1e3
    reached: dict[str, float] = {}
    if case.bytes_moved:
        told["gb_per_s"] = case.bytes_moved / told["kernel"]["us"] / 1e3
        reached["copy"] = ratio(times[1], times[0]) * case.bytes_moved / (2 * COPY_BYTES)
    if case.flops:
        reached["tflops"] = case.flops / told["kernel"]["us"] / 1e6
    if work.baseline is not None:
        told["baseline"] = {"what": case.baseline, **asdict(timed(times[2], graph=graphs[2]))}
        reached["baseline"] = ratio(times[2], times[0])
    bars = [
        {"kind": bar.kind, "at_least": bar.at_least, "met": reached[bar.kind] >= bar.at_least}
        for bar in case.bars
    ]
    return told | {"reached": reached, "bars": bars}


def _line(told: dict[str, Any]) -> str:
    name = f"{told['family']}: {told['case']}"
    if "failed" in told:
        return f"{name}: FAILED, {told['failed']}"
    if "figures" in told:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in told["figures"].items())
        return f"{name}: {figures}{_bars(told)}"
    if "kernel" not in told:
        return f"{name}: ran"
    reached = ", ".join(f"{kind} {value:.3f}" for kind, value in told["reached"].items())
    return f"{name}: {told['kernel']['us']:.1f} us, {reached}{_bars(told)}"


def _bars(told: dict[str, Any]) -> str:
    """What was to be reached, and what of it was not."""
    words = []
    for bar in told["bars"]:
        bounds = [
            f"{sign} {bar[name]:.4g}"
            for name, sign in (("at_least", ">="), ("at_most", "<="))
            if bar.get(name) is not None
        ]
        words.append(f"{'' if bar['met'] else 'MISSED '}{bar['kind']} {' '.join(bounds)}")
    return f"  [{'; '.join(words)}]" if words else ""


def _tests() -> dict[str, Any]:
    """The GPU tests, whose end is kept whatever it is."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(
        [*command, "tests/kernels", "tests/cloud"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    end = done.stdout.splitlines()[-15:]
    print("\n".join(end), file=sys.stderr, flush=True)
    return {"exit_code": done.returncode, "end": end}


def _gpu() -> dict[str, Any]:
    import torch

    query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    told = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "nvidia_smi": told.stdout.strip() or told.stderr.strip(),
        "processors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _tell(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    from report import report

    body = report("kernels/run.py", ("torch", "triton", "numpy"), results)
    if arguments.keep:
        arguments.keep.write_text(body + "\n", encoding="utf-8")
    if arguments.json:
        print(body)
        return
    failed = [one for one in results["cases"] if "failed" in one]
    met = [bar["met"] for one in results["cases"] for bar in one.get("bars", ())]
    print(f"{len(results['cases'])} cases, {len(failed)} failed; {sum(met)} of {len(met)} bars met")


if __name__ == "__main__":
    sys.exit(main())
