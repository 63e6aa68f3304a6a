"""The native gated MLP against its numpy twin, bit for bit, on every path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nativelinear import NativeLibrary, exponential, gated, gated_mlp_twin

from tidegate.converters.rounding.rtn import quantise
from tidegate.model.packed import Array, Bits, DenseLinear, PackedLinear


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An MLP and how many rows go through it."""

    inputs: int
    width: int
    outputs: int
    rows: int
    gate: int = 0
    bits: Bits = 4
    group_size: int = 32
    symmetric: bool = False
    seed: int = 0


def weights_of(problem: Problem) -> tuple[PackedLinear, PackedLinear]:
    rng = np.random.default_rng(problem.seed)
    shapes = ((2 * problem.width, problem.inputs), (problem.outputs, problem.width))
    gate_up, down = (
        quantise(
            DenseLinear(weight=rng.normal(0, 0.3, shape).astype(np.float32)),
            bits=problem.bits,
            group_size=problem.group_size,
            symmetric=problem.symmetric,
        )
        for shape in shapes
    )
    return halved(gate_up), halved(down)


def halved(weight: PackedLinear) -> PackedLinear:
    """With scales of half precision, as the library has them."""
    scales = weight.scales.astype(np.float16).astype(np.float32)
    return PackedLinear(
        values=weight.values,
        scales=scales,
        zeros=weight.zeros,
        bias=None,
        inputs=weight.inputs,
        bits=weight.bits,
        group_size=weight.group_size,
    )


def rows_of(problem: Problem) -> Array:
    rng = np.random.default_rng(problem.seed + 1)
    return rng.normal(0, 2, (problem.rows, problem.inputs)).astype(np.float32)


problems = st.builds(
    Problem,
    inputs=st.integers(1, 200),
    width=st.integers(1, 40).map(lambda tiles: 16 * tiles),
    outputs=st.integers(1, 70),
    rows=st.integers(1, 19),
    gate=st.sampled_from([0, 1]),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=40, deadline=None)
@given(problem=problems)
@example(problem=Problem(inputs=64, width=1040, outputs=33, rows=1))
@example(problem=Problem(inputs=64, width=544, outputs=16, rows=9, gate=1, bits=8))
def test_every_path_equals_the_twin_bit_for_bit(native: NativeLibrary, problem: Problem) -> None:
    gate_up, down = weights_of(problem)
    x = rows_of(problem)
    expected = gated_mlp_twin(gate_up, down, problem.gate, x)
    first, second = native.tile(gate_up), native.tile(down)
    for path in native.paths():
        native.force_path(path)
        for threads in (1, 3):
            y = native.gated_mlp(first, second, problem.gate, x, threads=threads)
            assert (y.view(np.int32) == expected.view(np.int32)).all(), f"{path}, {threads} threads"
    native.force_path("")


def test_a_row_does_not_depend_on_the_others(native: NativeLibrary) -> None:
    problem = Problem(inputs=96, width=320, outputs=50, rows=21)
    gate_up, down = (native.tile(weight) for weight in weights_of(problem))
    x = rows_of(problem)
    for path in native.paths():
        native.force_path(path)
        whole = native.gated_mlp(gate_up, down, 0, x, threads=2)
        for first, last in ((0, 1), (7, 8), (3, 14)):
            part = native.gated_mlp(gate_up, down, 0, x[first:last], threads=2)
            np.testing.assert_array_equal(part, whole[first:last])
    native.force_path("")


@pytest.mark.parametrize("gate", [0, 1])
def test_a_gate_is_near_its_definition(gate: int) -> None:
    g = np.linspace(-12, 12, 20001).astype(np.float32)
    exact = g.astype(np.float64)
    t = exact if gate == 0 else 2 * np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    expected = exact / (1 + np.exp(-t))
    np.testing.assert_allclose(gated(g, np.ones_like(g), gate), expected, rtol=1e-4, atol=1e-7)


def test_the_exponential_is_within_two_units_in_the_last_place() -> None:
    x = np.linspace(-86.9, 87.9, 200001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exponential(x) - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()


@pytest.mark.parametrize(
    ("width", "rows_of_first", "gate", "reason"),
    [
        (24, 48, 0, "down.inputs = 24: must be a multiple of 16"),
        (32, 48, 0, "gate_up.outputs = 48: must be 64"),
        (32, 64, 2, "gate = 2: must be 0 .silu. or 1 .gelu_tanh."),
    ],
)
def test_what_does_not_fit_is_refused(
    native: NativeLibrary, width: int, rows_of_first: int, gate: int, reason: str
) -> None:
    rng = np.random.default_rng(0)
    first, second = (
        native.tile(
            quantise(
                DenseLinear(weight=rng.normal(size=shape).astype(np.float32)),
                bits=4,
                group_size=32,
                symmetric=True,
            )
        )
        for shape in ((rows_of_first, 32), (8, width))
    )
    x = np.zeros((1, 32), np.float32)
    with pytest.raises(ValueError, match=reason):
        native.gated_mlp(first, second, gate, x)
