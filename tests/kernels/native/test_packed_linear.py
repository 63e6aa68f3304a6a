"""The native packed linear layer against its numpy twin, bit for bit, on every path."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nativelinear import ALIGNMENT, NativeLibrary, activation_group, aligned_bytes, twin

from tidegate.model.packed import Array, Bits, PackedLinear, pack_nibbles

GROUP_SIZES = (16, 32, 48, 64, 80, 128, 256, 2048)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A layer and how many rows go through it."""

    inputs: int
    outputs: int
    rows: int
    bits: Bits = 4
    group_size: int = 64
    zeros: bool = True
    bias: bool = True
    seed: int = 0


def make_weight(problem: Problem) -> PackedLinear:
    """Random integers, with runs of the largest, and scales of either sign."""
    rng = np.random.default_rng(problem.seed)
    groups = -(-problem.inputs // problem.group_size)
    shape = (problem.outputs, groups)
    top = (1 << problem.bits) - 1
    values = rng.integers(0, top + 1, (*shape, problem.group_size), dtype=np.uint8)
    values[rng.random(shape) < 0.2] = top
    scales = rng.normal(0, 0.02, shape).astype(np.float16).astype(np.float32)
    return PackedLinear(
        values=pack_nibbles(values) if problem.bits == 4 else values,
        scales=scales,
        zeros=rng.integers(0, top + 1, shape, dtype=np.uint8) if problem.zeros else None,
        bias=rng.normal(size=problem.outputs).astype(np.float32) if problem.bias else None,
        inputs=problem.inputs,
        bits=problem.bits,
        group_size=problem.group_size,
    )


def make_rows(problem: Problem) -> Array:
    """Activations, some of them outliers: (rows, inputs)."""
    rng = np.random.default_rng(problem.seed + 1)
    x = rng.normal(size=(problem.rows, problem.inputs))
    return (x * np.where(rng.random(x.shape) < 0.02, 100, 1)).astype(np.float32)


def on_every_path(native: NativeLibrary) -> list[str]:
    """Paths to force, one after another."""
    paths = list(native.paths())
    assert paths[-1] == "portable"
    return paths


def assert_same_bits(y: Array, expected: Array, what: object) -> None:
    """Equal to the last bit; the sign of a zero counts."""
    same: npt.NDArray[np.bool_] = y.view(np.int32) == expected.view(np.int32)
    assert same.all(), f"{what}: {np.abs(y - expected).max()} at {np.argwhere(~same)[:3].tolist()}"


problems = st.builds(
    Problem,
    inputs=st.integers(1, 600),
    outputs=st.integers(1, 120),
    rows=st.integers(1, 19),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from(GROUP_SIZES),
    zeros=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
@given(problem=problems)
@example(problem=Problem(inputs=2048, outputs=16, rows=1, bits=8, group_size=2048, zeros=False))
@example(problem=Problem(inputs=1, outputs=1, rows=1, group_size=16))
@example(problem=Problem(inputs=129, outputs=97, rows=9, group_size=128, bits=8))
def test_every_path_equals_the_twin_bit_for_bit(native: NativeLibrary, problem: Problem) -> None:
    weight, x = make_weight(problem), make_rows(problem)
    expected = twin(weight, x)
    tiled = native.tile(weight)
    for path in on_every_path(native):
        native.force_path(path)
        assert_same_bits(tiled(x), expected, path)
        assert_same_bits(tiled(x, threads=3), expected, f"{path}, 3 threads")
    native.force_path("")


@settings(max_examples=30, deadline=None)
@given(problem=problems, data=st.data())
def test_a_row_does_not_depend_on_the_others(
    native: NativeLibrary, problem: Problem, data: st.DataObject
) -> None:
    x = make_rows(problem)
    tiled = native.tile(make_weight(problem))
    whole = tiled(x)
    first = data.draw(st.integers(0, problem.rows - 1))
    last = data.draw(st.integers(first + 1, problem.rows))
    for path in on_every_path(native):
        native.force_path(path)
        assert_same_bits(tiled(x[first:last], threads=2), whole[first:last], path)
    native.force_path("")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_results_are_near_the_dequantised_product(
    native: NativeLibrary, bits: Bits, group_size: int
) -> None:
    problem = Problem(inputs=777, outputs=50, rows=6, bits=bits, group_size=group_size)
    weight, x = make_weight(problem), make_rows(problem)
    assert weight.bias is not None
    exact = x.astype(np.float64) @ weight.dequantise().T.astype(np.float64) + weight.bias
    # Rounding moves an activation by at most half a step of its group.
    width = activation_group(group_size)
    padded = np.zeros((problem.rows, -(-problem.inputs // width) * width))
    padded[:, : problem.inputs] = np.abs(x)
    steps = np.repeat(padded.reshape(problem.rows, -1, width).max(-1) / 127, width, axis=1)
    bound = steps[:, : problem.inputs] / 2 @ np.abs(weight.dequantise()).T.astype(np.float64)
    assert (np.abs(native.tile(weight)(x) - exact) <= bound * 1.001 + 1e-4).all()


def test_activations_without_a_magnitude_give_the_bias(native: NativeLibrary) -> None:
    problem = Problem(inputs=100, outputs=20, rows=3)
    weight = make_weight(problem)
    assert weight.bias is not None
    tiled = native.tile(weight)
    for value in (0.0, -0.0, 1e-44, 1e-20):
        x = np.full((3, 100), value, np.float32)
        for path in on_every_path(native):
            native.force_path(path)
            np.testing.assert_array_equal(tiled(x), np.tile(weight.bias, (3, 1)), path)
    native.force_path("")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_row_nan_and_no_other(
    native: NativeLibrary, bad: float
) -> None:
    problem = Problem(inputs=300, outputs=20, rows=9)
    weight, x = make_weight(problem), make_rows(problem)
    tiled = native.tile(weight)
    expected = tiled(x)
    x[4, 299] = bad
    for path in on_every_path(native):
        native.force_path(path)
        y = tiled(x)
        assert np.isnan(y[4]).all(), path
        assert_same_bits(np.delete(y, 4, 0), np.delete(expected, 4, 0), path)
    native.force_path("")


def test_the_largest_finite_activations_are_quantised_like_any(native: NativeLibrary) -> None:
    weight = replace(make_weight(Problem(inputs=64, outputs=5, rows=1)), bias=None)
    weight = replace(weight, scales=np.full_like(weight.scales, 2.0**-10))
    x = np.full((1, 64), np.finfo(np.float32).max / 64, np.float32)
    expected = twin(weight, x)
    assert np.isfinite(expected).all()
    tiled = native.tile(weight)
    for path in on_every_path(native):
        native.force_path(path)
        assert_same_bits(tiled(x), expected, path)
    native.force_path("")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tile_holds_scales_then_zeros_then_interleaved_values(
    native: NativeLibrary, bits: Bits
) -> None:
    problem = Problem(inputs=96, outputs=40, rows=1, bits=bits, group_size=32)
    weight = make_weight(problem)
    assert weight.zeros is not None
    tiled = native.tile(weight)
    tile_bytes = len(tiled.tiles) // 3
    assert (tile_bytes % ALIGNMENT, tiled.tiles.ctypes.data % ALIGNMENT) == (0, 0)
    for output, group in ((0, 0), (17, 1), (39, 2)):
        record_bytes = 32 + 16 + 32 * 16 * bits // 8
        begin = output // 16 * tile_bytes + group * record_bytes
        record, lane = tiled.tiles[begin : begin + record_bytes], output % 16
        assert record[:32].view(np.float16)[lane] == np.float16(weight.scales[output, group])
        assert record[32 + lane] == weight.zeros[output, group]
        quads = record[48:].reshape(-1, 16, 4)[:, lane]
        halves = np.stack([quads & 15, quads >> 4], axis=1) if bits == 4 else quads
        np.testing.assert_array_equal(halves.reshape(-1), weight.integers()[output, group])
    unused = tiled.tiles[2 * tile_bytes :][:32].view(np.float16)[8:]
    np.testing.assert_array_equal(unused, 0)


def test_padding_of_the_input_contributes_nothing_whatever_it_holds(native: NativeLibrary) -> None:
    problem = Problem(inputs=70, outputs=20, rows=2)
    weight, x = make_weight(problem), make_rows(problem)
    other = weight.values.copy()
    other[:, 1, 3:] ^= 0xFF
    changed = replace(weight, values=other)
    assert_same_bits(native.tile(changed)(x), native.tile(weight)(x), "padding")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 8, 4, 64, 0), "inputs = 0: must be 1 to 2147483647"),
        ((8, 1 << 40, 4, 64, 0), "outputs = 1099511627776: must be 1 to 2147483647"),
        ((8, 8, 3, 64, 0), "bits = 3: must be 4 or 8"),
        ((8, 8, 4, 24, 0), "group = 24: must be a multiple of 16, at most 16777216"),
        ((8, 8, 4, 0, 0), "group = 0: must be a multiple of 16, at most 16777216"),
    ],
)
def test_a_shape_that_is_not_allowed_is_named(
    native: NativeLibrary, shape: tuple[int, int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        native.tiled_bytes(*shape)


def test_a_path_that_cannot_run_is_refused_and_the_best_is_taken(native: NativeLibrary) -> None:
    allowed = ", ".join(native.paths())
    with pytest.raises(ValueError, match=f"^path = mmx: must be one of {allowed}$"):
        native.force_path("mmx")
    assert native.path() == native.paths()[0]
    native.force_path("portable")
    assert native.path() == "portable"
    native.force_path("")


def test_threads_have_a_range(native: NativeLibrary) -> None:
    problem = Problem(inputs=16, outputs=1, rows=1, group_size=16)
    tiled = native.tile(make_weight(problem))
    for threads in (0, 257):
        with pytest.raises(ValueError, match=f"^threads = {threads}: must be 1 to 256$"):
            tiled(make_rows(problem), threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_plain_read_reads_every_whole_line(native: NativeLibrary, threads: int) -> None:
    memory = aligned_bytes(64 * 37 + 10)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.size, dtype=np.uint8)
    expected = int(memory[: 64 * 37].view(np.uint64).sum(dtype=np.uint64))
    assert native.read(memory, threads) == expected


def digest_twin(data: npt.NDArray[np.uint8]) -> int:
    """As tidegate_native_digest defines it."""
    prime, whole = 0x9E3779B97F4A7C15, 1 << 64
    lanes = [0] * 8
    for place, word in enumerate(data.view("<u8").tolist()):
        lanes[place % 8] = (lanes[place % 8] * prime + word) % whole
    digest = 0
    for lane in lanes:
        digest = (digest * prime + lane) % whole
    return digest


@pytest.mark.parametrize("lines", [0, 1, 2, 37])
def test_the_digest_of_tiles_equals_its_twin_and_tells_every_flipped_bit(
    native: NativeLibrary, lines: int
) -> None:
    data = aligned_bytes(64 * lines)
    data[:] = np.random.default_rng(lines).integers(0, 256, 64 * lines, np.uint8)
    right = native.digest(data)
    assert right == digest_twin(data)
    for place in range(data.nbytes):
        for bit in (1, 16, 128):
            data[place] ^= bit
            assert native.digest(data) != right
            data[place] ^= bit
    if lines > 1:
        swapped = data.reshape(lines, 64)[::-1].copy().reshape(-1)
        assert native.digest(swapped) != right
