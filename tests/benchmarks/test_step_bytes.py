"""The weights of one decode step, counted in the files of a real bundle."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe

synthetic: Any = import_module("converters.synthetic")
step_bytes: Any = import_module("peers.step_bytes")


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_counts_only_where_it_is_the_head_as_well(tied: bool, tmp_path: Path) -> None:
    shape = replace(synthetic.SHAPES["tiny"], layers=1, tied=tied)
    checkpoint = synthetic.write_checkpoint(tmp_path / "checkpoint", shape)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="m", targets=("onnx", "openvino"), recipe=recipe)
    bundle = convert(checkpoint, tmp_path / "bundle", plan)
    folder, whole = bundle.folder, bundle.manifest.memory.weight_bytes
    table = shape.vocab * (shape.width + 3)
    for found in (
        step_bytes.openvino_step_bytes(folder / "openvino" / "model.xml"),
        step_bytes.onnx_step_bytes(folder / "onnx" / "model.onnx"),
    ):
        expected = whole if tied else whole - table
        assert found == pytest.approx(expected, rel=0.03)
