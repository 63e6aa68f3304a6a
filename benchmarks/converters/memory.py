"""Peak memory, time and output of converting a 1.1 B checkpoint, beside the usual converters.

Each conversion is a process of its own, and its peak is the `ru_maxrss` the kernel kept for it.
Converters take turns within every repeat, medians are compared, and the checkpoint is in the page
cache for all alike. Ours writes 4-bit groups of 64 and 8-bit tables; the peers run with the same
group size, otherwise with what they do by default, and only on the smallest checkpoint: they hold
it in memory. Asserts nothing.

Peers live in environments of their own, because they need other versions of transformers:

    pip install onnxruntime-genai==0.18.0 onnx_ir transformers torch==2.13.0
    pip install "optimum-intel[openvino]" nncf openvino==2026.4.1 torch==2.13.0

    python benchmarks/converters/memory.py --json --builder-python genai/bin/python
    python benchmarks/converters/memory.py --json --layers 2 --repeats 1 --recipes balanced

Passes that look at data take minutes a layer at this width, so recipes are measured on few layers:
one layer at a time is in memory, whatever their number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
GROUP_SIZE = 64
TARGETS = ("onnx", "openvino", "packed", "onnx,openvino")
PEER_PACKAGES = {
    "onnxruntime-genai builder": ("onnxruntime-genai", "transformers", "torch"),
    "optimum-intel": ("optimum-intel", "nncf", "openvino", "transformers", "torch"),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One conversion."""

    peak_mib: float
    wall_s: float
    output_mb: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians of a converter's runs on a checkpoint of so many layers."""

    converter: str
    layers: int
    repeats: int
    peak_mib: float
    wall_s: float
    output_mb: float


def ours(checkpoint: Path, out: Path, target: str) -> list[str]:
    """The command that people use."""
    flags = ["--target", target, "--bits", "4", "--group-size", str(GROUP_SIZE), "--quiet"]
    tool = [sys.executable, "-P", "-m", "tidegate.cli", "convert"]
    return [*tool, str(checkpoint), "--out", str(out), *flags]


def by_recipe(checkpoint: Path, out: Path, recipe: str) -> list[str]:
    """The same with a recipe, on the calibration text that comes along."""
    flags = ["--target", "onnx", "--recipe", recipe, "--quiet"]
    tool = [sys.executable, "-P", "-m", "tidegate.cli", "convert"]
    return [*tool, str(checkpoint), "--out", str(out), *flags]


def builder(python: Path, checkpoint: Path, out: Path) -> list[str]:
    """onnxruntime-genai's model builder, for the CPU."""
    tool = [str(python), "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    paths = ["-i", str(checkpoint), "-o", str(out), "-c", str(out.with_suffix(".cache"))]
    return [*tool, *paths, "--extra_options", f"int4_block_size={GROUP_SIZE}"]


def optimum(python: Path, checkpoint: Path, out: Path) -> list[str]:
    """optimum-intel's export; every layer at 4 bits, tables at 8, as ours."""
    tool = [str(python), "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    kind = ["--task", "text-generation-with-past", "--weight-format", "int4", "--ratio", "1.0"]
    return [*tool, "-m", str(checkpoint), *kind, "--group-size", str(GROUP_SIZE), str(out)]


def commands(
    args: argparse.Namespace, layers: int, checkpoint: Path, out: Path
) -> dict[str, list[str]]:
    """The converters by name, in the order they take turns."""
    if args.recipes:
        return {f"recipe {one}": by_recipe(checkpoint, out, one) for one in args.recipes}
    found = {f"tidegate {target}": ours(checkpoint, out, target) for target in TARGETS}
    if layers > min(args.layers):
        return found
    if args.builder_python is not None:
        found["onnxruntime-genai builder"] = builder(args.builder_python, checkpoint, out)
    if args.optimum_python is not None:
        found["optimum-intel"] = optimum(args.optimum_python, checkpoint, out)
    return found


def run(command: Sequence[str], out: Path) -> Run:
    """Run a converter to its end and remove what it wrote.

    Linux starts a child's peak at its parent's memory, so this process must stay small: it
    imports no numpy.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began_s = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - began_s
        if child.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{command}: {log.read()[-2000:].decode(errors='replace')}")
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    shutil.rmtree(out.with_suffix(".cache"), ignore_errors=True)
    return Run(peak_mib=usage.ru_maxrss / 1024, wall_s=wall_s, output_mb=nbytes / 1e6)


def measure(args: argparse.Namespace, layers: int) -> list[Result]:
    """Make a checkpoint of so many layers and let the converters take turns on it."""
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, out = Path(folder) / "checkpoint", Path(folder) / "out"
        maker = Path(__file__).with_name("synthetic.py")
        make = [sys.executable, str(maker), str(checkpoint), "--layers", str(layers)]
        subprocess.run(make, check=True)
        for _ in range(args.repeats):
            for name, command in commands(args, layers, checkpoint, out).items():
                runs.setdefault(name, []).append(run(command, out))
                print(f"{layers} layers, {name}: {runs[name][-1]}", file=sys.stderr)
    return [
        Result(
            converter=name,
            layers=layers,
            repeats=len(found),
            peak_mib=round(statistics.median(one.peak_mib for one in found), 1),
            wall_s=round(statistics.median(one.wall_s for one in found), 2),
            output_mb=round(found[0].output_mb, 1),
        )
        for name, found in runs.items()
    ]


def peer_versions(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What the peers' environments hold."""
    pythons = zip(PEER_PACKAGES, (args.builder_python, args.optimum_python), strict=True)
    found: dict[str, dict[str, str]] = {}
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    for name, python in pythons:
        if python is not None:
            packages = PEER_PACKAGES[name]
            said = subprocess.check_output([python, "-c", code, *packages], text=True)
            found[name] = dict(zip(packages, said.split(), strict=True))
    return found


def main() -> int:
    """Print a table, or JSON with the command, versions and hardware."""
    from report import report

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[22, 44])
    parser.add_argument("--recipes", nargs="+", help="only these, names or TOML files, to onnx")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--builder-python", type=Path, help="has onnxruntime-genai")
    parser.add_argument("--optimum-python", type=Path, help="has optimum-intel")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = [result for layers in args.layers for result in measure(args, layers)]
    if args.json:
        body = {"peers": peer_versions(args), "conversions": [asdict(one) for one in results]}
        print(report("converters/memory.py", ("numpy", "onnx", "openvino"), body))
        return 0
    for one in results:
        print(
            f"{one.converter:<27} {one.layers:>3} layers {one.peak_mib:>8.0f} MiB"
            f" {one.wall_s:>7.1f} s {one.output_mb:>8.0f} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
