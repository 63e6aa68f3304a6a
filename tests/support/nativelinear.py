"""libtidegate_native through ctypes, and the numpy twin that defines what it computes.

The twin follows the arithmetic in packed_linear.h: integers exactly, and each float operation
rounded to float32 in the same order, so that it equals the library bit for bit. A fused
multiply-add is done in float64 with a step towards odd, which makes the second rounding harmless.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidegate.model.packed import Array, Bytes, PackedLinear

ALIGNMENT = 64


def aligned_bytes(count: int) -> Bytes:
    """Uninitialised bytes that start at a multiple of `ALIGNMENT`."""
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count]


def pointer(array: npt.NDArray[np.generic] | None) -> ctypes.c_void_p:
    """The address of a contiguous array's first element, null for None."""
    if array is None:
        return ctypes.c_void_p()
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


class NativeLibrary:
    """The C interface, with errors raised as `ValueError`."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        shape = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        pointers = [ctypes.c_void_p] * 4
        self._library.tidegate_native_tiled_bytes.argtypes = shape
        self._library.tidegate_native_tiled_bytes.restype = ctypes.c_uint64
        self._library.tidegate_native_tile.argtypes = [*shape, *pointers]
        self._library.tidegate_native_linear.argtypes = [
            *shape,
            *pointers[:3],
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
        ]
        self._library.tidegate_native_read.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_int32,
        ]
        self._library.tidegate_native_read.restype = ctypes.c_uint64
        self._library.tidegate_native_digest.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self._library.tidegate_native_digest.restype = ctypes.c_uint64
        self._library.tidegate_native_gated_mlp.argtypes = [
            *pointers,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
        ]
        self._library.tidegate_native_force_path.argtypes = [ctypes.c_char_p]
        for name in ("error", "path", "paths"):
            getattr(self._library, f"tidegate_native_{name}").restype = ctypes.c_char_p

    def _check(self, status: int) -> None:
        if status != 0:
            raise ValueError(self._library.tidegate_native_error().decode())

    def version(self) -> int:
        """The layout's version."""
        return int(self._library.tidegate_native_version())

    def path(self) -> str:
        """The path in use."""
        name = self._library.tidegate_native_path()
        self._check(name is None)
        return str(name.decode())

    def paths(self) -> tuple[str, ...]:
        """The paths this CPU can run, best first."""
        return tuple(self._library.tidegate_native_paths().decode().split(","))

    def force_path(self, name: str) -> None:
        """Take this path from now on; an empty name undoes it."""
        self._check(self._library.tidegate_native_force_path(name.encode()))

    def read(self, memory: Bytes, threads: int) -> int:
        """Read whole lines of memory once; the sum of their 64-bit words, modulo 2 ** 64."""
        return int(self._library.tidegate_native_read(pointer(memory), memory.nbytes, threads))

    def digest(self, memory: Bytes) -> int:
        """Eight bytes that tell damage; a multiple of 64 bytes."""
        return int(self._library.tidegate_native_digest(pointer(memory), memory.nbytes))

    def tiled_bytes(self, inputs: int, outputs: int, bits: int, group: int, zeros: int) -> int:
        """Bytes of the tiles of such a weight."""
        count = int(self._library.tidegate_native_tiled_bytes(inputs, outputs, bits, group, zeros))
        self._check(count == 0)
        return count

    def tile(self, weight: PackedLinear) -> Tiled:
        """Re-tile a weight for this library."""
        shape = (
            weight.inputs,
            weight.outputs,
            weight.bits,
            weight.group_size,
            weight.zeros is not None,
        )
        tiles = aligned_bytes(self.tiled_bytes(*shape))
        values, zeros = np.ascontiguousarray(weight.values), weight.packed_zeros()
        scales = weight.scales.astype(np.float16)
        self._check(
            self._library.tidegate_native_tile(
                *shape, pointer(values), pointer(scales), pointer(zeros), pointer(tiles)
            )
        )
        return Tiled(library=self, shape=shape, tiles=tiles, bias=weight.bias)

    def linear(self, tiled: Tiled, x: Array, y: Array, threads: int) -> None:
        """Compute y = x W^T + b; x: (rows, inputs), y: (rows, outputs), contiguous float32."""
        rows, inputs = x.shape
        assert (inputs, y.shape) == (tiled.shape[0], (rows, tiled.shape[1]))
        self._check(
            self._library.tidegate_native_linear(
                *tiled.shape,
                pointer(tiled.tiles),
                pointer(tiled.bias),
                pointer(x),
                rows,
                pointer(y),
                threads,
            )
        )

    def gated_mlp(
        self, gate_up: Tiled, down: Tiled, gate: int, x: Array, *, threads: int = 1
    ) -> Array:
        """The gated MLP of two weights, the gate first; x: (rows, inputs), y: (rows, outputs)."""
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((x.shape[0], down.shape[1]), np.float32)
        shapes = np.array([*gate_up.shape, *down.shape, gate], np.int64)
        self._check(
            self._library.tidegate_native_gated_mlp(
                pointer(shapes),
                pointer(gate_up.tiles),
                pointer(down.tiles),
                pointer(x),
                x.shape[0],
                pointer(y),
                threads,
            )
        )
        return y


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiled:
    """A weight in the library's layout; shape: inputs, outputs, bits, group size, has zeros."""

    library: NativeLibrary
    shape: tuple[int, int, int, int, bool]
    tiles: Bytes
    bias: Array | None

    def __call__(self, x: Array, threads: int = 1) -> Array:
        """y: (rows, outputs) from x: (rows, inputs)."""
        y = np.empty((x.shape[0], self.shape[1]), np.float32)
        self.library.linear(self, np.ascontiguousarray(x, np.float32), y, threads)
        return y


def activation_group(group_size: int) -> int:
    """Inputs that share an activation scale."""
    return next(width for width in (64, 48, 32, 16) if group_size % width == 0)


def quantised(x: Array, width: int) -> tuple[Array, Array]:
    """Whole numbers, (rows, groups, width), and scales, (rows, groups), of activations."""
    rows, inputs = x.shape
    padded = np.zeros((rows, -(-inputs // width) * width), np.float32)
    padded[:, :inputs] = x
    parts = padded.reshape(rows, -1, width)
    finite = np.isfinite(parts).all(axis=-1)
    largest = np.abs(parts).max(axis=-1)
    live = finite & (largest >= np.float32(2.0**-64))
    safe = np.where(live, largest, np.float32(1))
    integers = np.rint(np.where(live[..., None], parts, 0) * (np.float32(127) / safe)[..., None])
    scales = np.where(live, safe / np.float32(127), np.where(finite, 0, np.nan))
    return integers.astype(np.float32), scales.astype(np.float32)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Round a * b + c once, to float32; `a * b` must be exact in float64, as it is here."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    # Knuth's two-sum: what the addition lost. Rounded to odd, the sum rounds correctly to float32.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    odd = np.where((lost != 0) & even, np.nextafter(total, towards), total)
    return odd.astype(np.float32)


def twin(weight: PackedLinear, x: Array) -> Array:
    """What the library must return, bit for bit, for finite x: (rows, inputs)."""
    width = activation_group(weight.group_size)
    per_group = weight.group_size // width
    integers, scales = quantised(x, width)
    zeros = weight.symmetric_zero if weight.zeros is None else weight.zeros[..., None]
    parts = (weight.integers().astype(np.int32) - zeros).reshape(weight.outputs, -1, width)
    y = np.zeros((x.shape[0], weight.outputs), np.float32)
    for index in range(scales.shape[1]):
        sums = (integers[:, index].astype(np.float64) @ parts[:, index].T).astype(np.float32)
        scale = weight.scales[:, index // per_group] * scales[:, index, None]
        y = fused_multiply_add(sums, scale, y)
    return y if weight.bias is None else y + weight.bias


def exponential(x: Array) -> Array:
    """e^x as gate.h computes it, cut to [-87, 88]."""
    single = np.float32
    x = np.where(x > 88, single(88), np.where(x < -87, single(-87), x)).astype(np.float32)

    def fused(a: Array, b: float, c: Array | float) -> Array:
        factor = np.full_like(a, single(b))
        return fused_multiply_add(a, factor, np.broadcast_to(np.asarray(c, single), a.shape))

    n = fused(x, float.fromhex("0x1.715476p+0"), 1.5 * 2.0**23) - single(1.5 * 2.0**23)
    r = fused(n, -float.fromhex("0x1.62e4p-1"), x)
    r = fused(n, -float.fromhex("0x1.7f7d1cp-20"), r)
    series = np.full_like(r, single(1) / single(5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        series = fused_multiply_add(series, r, np.full_like(r, single(1) / single(divisor)))
    return np.ldexp(series, n.astype(np.int32)).astype(np.float32)


def gated(gates: Array, ups: Array, gate: int) -> Array:
    """act(gates) * ups as gate.h computes it; gate: 0 for SiLU, 1 for GELU by tanh."""
    t = gates
    if gate == 1:
        slope = np.full_like(gates, np.float32(1.59576912161))
        factor = np.full_like(gates, np.float32(0.07135481627))
        t = gates * fused_multiply_add(factor, gates * gates, slope)
    return np.asarray(gates / (np.float32(1) + exponential(-t)) * ups, np.float32)


def gated_mlp_twin(gate_up: PackedLinear, down: PackedLinear, gate: int, x: Array) -> Array:
    """What the library's gated MLP must return, bit for bit, for finite x: (rows, inputs)."""
    gates, ups = np.split(twin(gate_up, x), 2, axis=1)
    return twin(down, gated(gates, ups, gate))
