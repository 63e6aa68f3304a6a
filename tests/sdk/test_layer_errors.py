"""Errors of the residual stream, on a graph whose weights are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cli.layer_errors import layer_errors
from tidegate.converters.onnx.ops import export_onnx
from tidegate.converters.rounding.rtn import quantise
from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear, Linear

ARCH = tiny_architecture(layers=4)
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9]]


SCALED = dataclasses.replace(ARCH, embed_scale=12.0, residual_scale=0.22)


@pytest.mark.parametrize("arch", [ARCH, SCALED])
def test_a_graph_of_the_checkpoint_itself_has_no_error_behind_any_layer(
    tmp_path: Path, arch: Architecture
) -> None:
    weights = RandomWeights(arch, seed=1)
    export_onnx(arch, weights, tmp_path)
    found = layer_errors(arch, weights, tmp_path, TEXTS, exact=True)
    assert [one.layer for one in found] == [0, 1, 2]
    assert max(one.error for one in found) < 1e-5


def test_the_layer_that_was_rounded_is_where_the_error_begins(tmp_path: Path) -> None:
    def rounded(role: str, linear: DenseLinear) -> Linear:
        if not role.startswith("layers.1."):
            return linear
        return quantise(linear, bits=4, group_size=32, symmetric=True)

    export_onnx(ARCH, RandomWeights(ARCH, seed=1, quantise=rounded), tmp_path)
    found = layer_errors(ARCH, RandomWeights(ARCH, seed=1), tmp_path, TEXTS, exact=True)
    errors = np.array([one.error for one in found])
    assert errors[0] < 1e-5
    assert errors[1] > 0.01
    assert errors[2] == pytest.approx(errors[1], rel=1.0)
