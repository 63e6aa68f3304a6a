"""Rounding to nearest: the error is at most half a step, whatever the shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidegate.converters.rounding.rtn import quantise, quantise_rows
from tidegate.errors import ConversionError
from tidegate.model.packed import (
    Array,
    Bits,
    DenseLinear,
    PackedLinear,
    pack_nibbles,
    unpack_nibbles,
)


def at_once(weight: Array, *, bits: Bits, group_size: int | None, symmetric: bool) -> PackedLinear:
    """The definition: the whole weight in one expression per step."""
    outputs, inputs = weight.shape
    size, top = group_size or inputs, np.float32((1 << bits) - 1)
    groups = -(-inputs // size)
    grouped = np.pad(weight, ((0, 0), (0, groups * size - inputs))).reshape(outputs, groups, size)
    low, high = np.minimum(grouped.min(axis=-1), 0), np.maximum(grouped.max(axis=-1), 0)
    reach = (high - low) / top
    if symmetric:
        reach = np.abs(grouped).max(axis=-1) / np.float32((1 << (bits - 1)) - 1)
    scales = np.clip(reach, 2.0**-24, 65504).astype(np.float16).astype(np.float32)
    zeros = None if symmetric else np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)
    middle = np.float32(1 << (bits - 1)) if zeros is None else zeros[..., None]
    values = np.clip(np.rint(grouped / scales[..., None]) + middle, 0, top).astype(np.uint8)
    return PackedLinear(
        values=pack_nibbles(values) if bits == 4 else values,
        scales=scales,
        zeros=zeros,
        inputs=inputs,
        bits=bits,
        group_size=size,
    )


def assert_same(one: PackedLinear, other: PackedLinear) -> None:
    assert np.array_equal(one.values, other.values)
    assert one.scales.tobytes() == other.scales.tobytes()
    assert (one.zeros is None) == (other.zeros is None)
    assert one.zeros is None or other.zeros is None or np.array_equal(one.zeros, other.zeros)


def error(linear: PackedLinear, weight: Array, importance: Array | None) -> float:
    squares = (linear.dequantise().astype(np.float64) - weight) ** 2
    return float((squares * (1 if importance is None else importance)).sum())


@settings(deadline=None, max_examples=100)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 150).map(lambda half: 2 * half),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
    magnitude=st.integers(-12, 37),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_by_rows_gives_the_bits_of_packing_at_once(
    outputs: int,
    inputs: int,
    bits: Bits,
    group_size: int | None,
    symmetric: bool,
    magnitude: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    weight *= np.float32(10.0**magnitude) * (rng.random(weight.shape) < 0.9)
    one = quantise(
        DenseLinear(weight=weight), bits=bits, group_size=group_size, symmetric=symmetric
    )
    assert_same(one, at_once(weight, bits=bits, group_size=group_size, symmetric=symmetric))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_of_many_chunks_is_packed_in_order(bits: Bits) -> None:
    weight = np.random.default_rng(0).standard_normal((1000, 800), np.float32)
    asked: list[tuple[int, int]] = []

    def read(first: int, after: int) -> Array:
        asked.append((first, after))
        return weight[first:after]

    one = quantise_rows(read, (1000, 800), bits=bits, group_size=64, symmetric=False)
    assert_same(one, at_once(weight, bits=bits, group_size=64, symmetric=False))
    assert len(asked) > 2
    assert sum(after - first for first, after in asked) == 1000


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 100).map(lambda half: 2 * half),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, None]),
    symmetric=st.booleans(),
    weighted=st.booleans(),
    tail=st.floats(0.3, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_clipping_is_never_worse_in_the_error_it_minimises(
    outputs: int,
    inputs: int,
    bits: Bits,
    group_size: int | None,
    symmetric: bool,
    weighted: bool,
    tail: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(tail, (outputs, inputs)).clip(-1e4, 1e4).astype(np.float32)
    importance = rng.exponential(size=inputs).astype(np.float32) ** 4 if weighted else None
    plain = quantise(
        DenseLinear(weight=weight), bits=bits, group_size=group_size, symmetric=symmetric
    )
    clipped = quantise(
        DenseLinear(weight=weight),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        clip=True,
        importance=importance,
    )
    rounding = 1e-12 * error(plain, np.zeros_like(weight), importance)
    assert error(clipped, weight, importance) <= error(plain, weight, importance) + rounding


def test_clipping_helps_ordinary_weights_and_more_where_it_is_told_what_matters() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 512), np.float32)
    importance = rng.exponential(size=512).astype(np.float32) ** 3

    def packed(clip: bool, importance: Array | None) -> PackedLinear:
        return quantise(
            DenseLinear(weight=weight),
            bits=4,
            group_size=128,
            symmetric=True,
            clip=clip,
            importance=importance,
        )

    plain, clipped, told = packed(False, None), packed(True, None), packed(True, importance)
    assert error(clipped, weight, None) < 0.92 * error(plain, weight, None)
    assert error(told, weight, importance) < 0.97 * error(clipped, weight, importance)


@pytest.mark.parametrize(
    ("importance", "problem"),
    [
        (np.ones(31, np.float32), r"shape \(31,\): must be \(32,\)"),
        (np.full(32, -1, np.float32), "at least 0"),
        (np.full(32, np.nan, np.float32), "finite"),
    ],
)
def test_an_importance_that_is_none_is_refused(importance: Array, problem: str) -> None:
    with pytest.raises(ConversionError, match=f"importance: .*{problem}"):
        quantise(
            DenseLinear(weight=np.ones((2, 32), np.float32)),
            bits=4,
            group_size=32,
            symmetric=True,
            clip=True,
            importance=importance,
        )


@settings(deadline=None, max_examples=200)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(outputs=5, inputs=1, bits=8, group_size=32, symmetric=False, seed=3_540_737_017)
def test_every_weight_is_within_half_a_step_of_its_own(
    outputs: int, inputs: int, bits: int, group_size: int | None, symmetric: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((outputs, inputs)) * 10.0 ** rng.integers(-3, 3)).astype(
        np.float32
    )
    if bits == 4 and group_size is None and inputs % 2:
        inputs -= 1
        weight = weight[:, :inputs]
        if not inputs:
            return
    packed = quantise(
        DenseLinear(weight=weight),
        bits=4 if bits == 4 else 8,
        group_size=group_size,
        symmetric=symmetric,
    )
    step = np.repeat(packed.scales, packed.group_size, axis=1)[:, :inputs]
    # A scale is rounded to float16, by 2 ** -11 of itself or, where that is subnormal, by 2 ** -25;
    # a zero-point is rounded to a whole step. The outermost value is clipped by their share.
    rounding = np.maximum(step * 2.0**-11, 2.0**-25) * 2**bits
    zero_point = 0.5 if packed.zeros is not None else 0.0
    allowed = step * (0.5 + zero_point) + rounding + 2.0**-23
    assert (np.abs(packed.dequantise() - weight) <= allowed).all()


def test_zero_stays_exactly_zero() -> None:
    weight = np.zeros((3, 70), np.float32)
    weight[:, ::7] = 5.0
    for symmetric in (False, True):
        packed = quantise(
            DenseLinear(weight=weight), bits=4, group_size=32, symmetric=symmetric
        ).dequantise()
        assert (packed[weight == 0] == 0).all()


def test_nibbles_are_packed_low_first_and_come_back() -> None:
    values = np.array([[1, 2, 3]], np.uint8)
    assert pack_nibbles(values).tolist() == [[0x21, 0x03]]
    assert unpack_nibbles(pack_nibbles(values), 3).tolist() == values.tolist()


def test_an_odd_group_size_is_refused_by_name() -> None:
    with pytest.raises(ConversionError, match="group_size = 48"):
        quantise(
            DenseLinear(weight=np.ones((2, 96), np.float32)), bits=4, group_size=48, symmetric=True
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [True, False])
def test_an_undefined_weight_is_refused_wherever_it_is(value: float, clip: bool) -> None:
    for row in (0, 1999):
        weight = np.ones((2000, 256), np.float32)
        weight[row, 77] = value
        with pytest.raises(ConversionError, match="infinite or undefined"):
            quantise(DenseLinear(weight=weight), bits=4, group_size=64, symmetric=True, clip=clip)
