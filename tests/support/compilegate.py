"""Compiles kernels for GPUs that are not there, and reads what they take from the binaries.

Run as a program, since the switch between compiling and interpreting is read when a kernel is
defined: `python -P compilegate.py MODULE 90` compiles every `Variant` of `MODULE.COMPILED` for
sm_90 and prints one JSON line each. `cuobjdump` comes with Triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Final

from tidegate.kernels.variant import Variant

ROOT: Final = Path(__file__).resolve().parents[2]
KERNELS: Final = ROOT / "kernels" / "tidegate" / "kernels"
SHARED_LIMIT_BYTES: Final = {80: 163 * 1024, 90: 227 * 1024}
"""What one program may have on A100 and H100 (CUDA C++ programming guide, compute capabilities)."""
REGISTER_LIMIT: Final = 255
_TENSOR_CORES: Final = ("mma.sync", "wgmma.mma_async")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What one variant takes on one architecture, and what is wrong with that."""

    variant: str
    sm: int
    registers: int = 0
    spilled_bytes: int = 0
    """Stack and local memory of a thread."""
    shared_bytes: int = 0
    tensor_cores: bool = False
    seconds: float = 0.0
    problem: str = ""
    """Empty when the gate lets it through."""


def registered() -> list[str]:
    """Modules that list variants, one for each folder of kernels that has some."""
    folders = sorted(path.parent.name for path in KERNELS.glob("*/variants.py"))
    return [f"tidegate.kernels.{folder}.variants" for folder in folders]


def compiled(module: str) -> list[Compiled]:
    """Compile what `module` lists, for every architecture at once."""
    with ThreadPoolExecutor(len(SHARED_LIMIT_BYTES)) as pool:
        found = list(pool.map(partial(_elsewhere, module), SHARED_LIMIT_BYTES))
    return [one for part in found for one in part]


def _elsewhere(module: str, sm: int) -> list[Compiled]:
    """Compile for one architecture, in a process that compiles and whose cache starts empty."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TRITON_CACHE_DIR": cache,
            "TRITON_DEFAULT_FP_FUSION": "1",
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-P", __file__, module, str(sm)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{module} could not be compiled:\n{done.stdout}\n{done.stderr}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [Compiled(**json.loads(line)) for line in lines]


def _everything(module: str, sm: int) -> Iterator[Compiled]:
    variants: tuple[Variant, ...] = tuple(import_module(module).COMPILED)
    names = [variant.name for variant in variants]
    if not names or len(names) != len(set(names)):
        raise ValueError(f"{module}.COMPILED: names must be there and differ, not {names}")
    for variant in variants:
        if sm in variant.architectures:
            yield _compile(variant, sm)


def _compile(variant: Variant, sm: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, began_s = variant.kernel, time.monotonic()
    names: list[str] = kernel.arg_names  # type: ignore[attr-defined]
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    unknown = set(variant.signature) | set(variant.constexprs)
    missing = {name for name in names if name not in unknown}
    if missing or unknown - set(names):
        problem = f"lacks {sorted(missing)}, has too much {sorted(unknown - set(names))}"
        return Compiled(variant=variant.name, sm=sm, problem=problem)
    divisible = [
        place
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.divisible
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(variant.constexprs),
        attrs={(place,): [["tt.divisibility", 16]] for place in divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # the boundary of one variant: the others are still compiled
        return Compiled(variant=variant.name, sm=sm, problem=f"does not compile: {error}")
    found = _Resources.of(binary.asm["cubin"])
    return Compiled(
        variant=variant.name,
        sm=sm,
        registers=found.registers,
        spilled_bytes=found.spilled_bytes,
        shared_bytes=binary.metadata.shared,
        tensor_cores=(cores := any(name in binary.asm["ptx"] for name in _TENSOR_CORES)),
        seconds=round(time.monotonic() - began_s, 2),
        problem=_problem(variant, sm, found, binary.metadata.shared, tensor_cores=cores),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Resources:
    registers: int
    spilled_bytes: int

    @classmethod
    def of(cls, cubin: bytes) -> _Resources:
        """Read by cuobjdump: the largest of all functions in the binary."""
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            told = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
        assert used, f"cuobjdump names no function: {told}"
        return cls(
            registers=max(int(registers) for registers, _, _ in used),
            spilled_bytes=max(int(stack) + int(local) for _, stack, local in used),
        )


def _problem(
    variant: Variant, sm: int, found: _Resources, shared_bytes: int, *, tensor_cores: bool
) -> str:
    problems = []
    if found.spilled_bytes:
        problems.append(f"spills {found.spilled_bytes} bytes a thread")
    if found.registers > REGISTER_LIMIT:
        problems.append(f"{found.registers} registers, at most {REGISTER_LIMIT}")
    if shared_bytes > SHARED_LIMIT_BYTES[sm]:
        problems.append(f"{shared_bytes} bytes of shared memory, at most {SHARED_LIMIT_BYTES[sm]}")
    if variant.dot and not tensor_cores:
        problems.append("its dots do not reach the tensor cores")
    return "; ".join(problems)


if __name__ == "__main__":
    for one in _everything(sys.argv[1], int(sys.argv[2])):
        print(json.dumps(asdict(one)), flush=True)
