"""Rounding to nearest: the error is at most half a step, whatever the shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidegate.converters.rtn import quantise
from tidegate.errors import ConversionError
from tidegate.model.packed import DenseLinear, pack_nibbles, unpack_nibbles


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


def test_an_undefined_weight_is_refused() -> None:
    weight = np.full((2, 32), np.nan, np.float32)
    with pytest.raises(ConversionError, match="infinite or undefined"):
        quantise(DenseLinear(weight=weight), bits=8, group_size=None, symmetric=True)
