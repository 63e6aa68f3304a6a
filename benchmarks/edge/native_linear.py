"""The native linear layer beside a plain read of its bytes and OpenVINO's FullyConnected.

The shapes are those of a 1.1 B Llama layer at 4 bits and groups of 64, with zero-points. Each round
runs the read, ours and the library's operator in turn over weights that together exceed the
last-level cache, so that all come from memory, as in decoding; the library gets the activation
groups that ours has. Ratios are of medians over the rounds. With one thread the figures are from
processor time, which other processes on the machine disturb less than the clock.

    python benchmarks/edge/native_linear.py --paths avx512-vnni avx2 \
        --keep benchmarks/results/native-linear.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from tidegate.model.packed import Array, PackedLinear

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/support")]

from nativelinear import NativeLibrary, Tiled  # noqa: E402
from report import report  # noqa: E402

LIBRARY = ROOT / "kernels/native/build/tidegate_native/libtidegate_native.so"
SHAPES = ((2048, 2048), (2048, 5632), (5632, 2048))
"""Inputs and outputs."""
GROUP = 64
FEW_ROWS, MANY_ROWS = (1, 2, 4, 8), (128, 256)
COPIES = 6
"""Weights of each shape: together 89 MB."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of rows on one shape; GB/s counts the bytes of our tiles."""

    threads: int
    clock: str
    shape: str
    rows: int
    path: str
    read_gb_per_s: float
    native_gb_per_s: float
    native_over_read: float
    over_one_row: float
    """Time beside that of one row."""
    native_gmac_per_s: float
    library_gmac_per_s: float
    native_over_library: float


def random_weight(inputs: int, outputs: int, seed: int) -> PackedLinear:
    """Integers at random; what they are does not change the speed."""
    rng = np.random.default_rng(seed)
    shape = (outputs, inputs // GROUP)
    return PackedLinear(
        values=rng.integers(0, 256, (*shape, GROUP // 2), dtype=np.uint8),
        scales=np.full(shape, 0.0078125, np.float32),
        zeros=rng.integers(0, 16, shape, dtype=np.uint8),
        inputs=inputs,
        bits=4,
        group_size=GROUP,
    )


def library_operator(weight: PackedLinear, threads: int) -> Callable[[Array], None]:
    """The pattern that the CPU plugin makes one FullyConnected of, compiled."""
    shape = [weight.outputs, weight.groups]
    values = ov.Tensor(ov.Type.u4, ov.Shape([*shape, GROUP]))
    values.data.reshape(-1)[:] = weight.values.reshape(-1)
    zeros = ov.Tensor(ov.Type.u4, ov.Shape([*shape, 1]))
    packed = weight.packed_zeros()
    assert packed is not None
    zeros.data.reshape(-1)[:] = packed.reshape(-1)
    x = ops.parameter([-1, weight.inputs], np.float32)
    signed = ops.subtract(
        ops.convert(ops.constant(values), np.float16), ops.convert(ops.constant(zeros), np.float16)
    )
    scaled = ops.multiply(signed, ops.constant(weight.scales[..., None].astype(np.float16)))
    flat = ops.reshape(scaled, ops.constant(np.array([weight.outputs, -1])), False)
    product = ops.matmul(x, ops.convert(flat, np.float32), False, True)
    settings = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = (
        ov.Core().compile_model(ov.Model([product], [x]), "CPU", settings).create_infer_request()
    )

    def run(rows: Array) -> None:
        request.set_input_tensor(ov.Tensor(rows, shared_memory=True))
        request.infer()

    return run


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight, in both forms."""

    tiled: Tiled
    library: Callable[[Array], None]


def build(native: NativeLibrary, threads: int) -> dict[tuple[int, int], list[Layer]]:
    """`COPIES` layers of each shape."""
    layers: dict[tuple[int, int], list[Layer]] = defaultdict(list)
    for seed in range(COPIES):
        for shape in SHAPES:
            weight = random_weight(*shape, seed)
            layer = Layer(tiled=native.tile(weight), library=library_operator(weight, threads))
            layers[shape].append(layer)
    return layers


def measure(native: NativeLibrary, threads: int, repeats: int) -> list[Figure]:
    """Every number of rows on every shape."""
    clock = time.process_time if threads == 1 else time.perf_counter
    layers = build(native, threads)
    rng = np.random.default_rng(0)
    samples: dict[tuple[str, tuple[int, int], int], list[float]] = defaultdict(list)

    def timed(what: str, shape: tuple[int, int], rows: int, run: Callable[[Layer], object]) -> None:
        used = layers[shape] if rows in FEW_ROWS else layers[shape][:1]
        began_s = clock()
        for layer in used:
            run(layer)
        samples[what, shape, rows].append((clock() - began_s) / len(used))

    for rows in FEW_ROWS + MANY_ROWS:
        inputs = {shape: rng.normal(size=(rows, shape[0])).astype(np.float32) for shape in SHAPES}
        y = {shape: np.empty((rows, shape[1]), np.float32) for shape in SHAPES}
        # The first of them is not counted: buffers are made and kernels compiled in it.
        for repeat in range(repeats + 1):
            for shape in SHAPES:
                timed("read", shape, rows, lambda one: native.read(one.tiled.tiles, threads))
            for shape in SHAPES:
                x, out = inputs[shape], y[shape]
                timed(
                    "native",
                    shape,
                    rows,
                    lambda one, x=x, out=out: native.linear(one.tiled, x, out, threads),
                )
            for shape in SHAPES:
                timed("library", shape, rows, lambda one, x=inputs[shape]: one.library(x))
            if repeat == 0:
                samples.update({key: [] for key in samples if key[2] == rows})
    medians = {key: statistics.median(values) for key, values in samples.items()}
    return [
        figure(native, layers[shape][0].tiled, medians, shape, rows, threads)
        for rows in FEW_ROWS + MANY_ROWS
        for shape in SHAPES
    ]


def figure(
    native: NativeLibrary,
    tiled: Tiled,
    seconds: dict[tuple[str, tuple[int, int], int], float],
    shape: tuple[int, int],
    rows: int,
    threads: int,
) -> Figure:
    """What the medians say."""
    read, ours, library = (seconds[what, shape, rows] for what in ("read", "native", "library"))
    products = shape[0] * shape[1] * rows
    return Figure(
        threads=threads,
        clock="processor" if threads == 1 else "wall",
        shape=f"{shape[0]}x{shape[1]}",
        rows=rows,
        path=native.path(),
        read_gb_per_s=round(tiled.tiles.nbytes / read / 1e9, 1),
        native_gb_per_s=round(tiled.tiles.nbytes / ours / 1e9, 1),
        native_over_read=round(read / ours, 2),
        over_one_row=round(ours / seconds["native", shape, 1], 2),
        native_gmac_per_s=round(products / ours / 1e9, 1),
        library_gmac_per_s=round(products / library / 1e9, 1),
        native_over_library=round(library / ours, 2),
    )


def table(figures: Sequence[Figure]) -> str:
    """For people."""
    lines = [
        "threads  path          shape      rows  read GB/s  ours GB/s  of read  x 1 row  x lib"
    ]
    lines += [
        f"{one.threads:7}  {one.path:12}  {one.shape:9}  {one.rows:4}  {one.read_gb_per_s:9}  "
        f"{one.native_gb_per_s:9}  {one.native_over_read:7}  {one.over_one_row:7}  "
        f"{one.native_over_library:5}"
        for one in figures
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--paths", nargs="+", default=[""], help="paths to force; default: best")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="file to keep the figures in, as JSON")
    arguments = parser.parse_args()
    native = NativeLibrary(LIBRARY)
    figures: list[Figure] = []
    for path in arguments.paths:
        native.force_path(path)
        for threads in arguments.threads:
            figures += measure(native, threads, arguments.repeats)
    print(table(figures))
    if arguments.keep is not None:
        packages = ("numpy", "openvino")
        kept = report("edge/native_linear.py", packages, [asdict(one) for one in figures])
        arguments.keep.write_text(kept + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
