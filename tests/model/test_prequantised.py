"""GPTQ and AWQ checkpoints: the very integers, scales and zero-points, or a refusal by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prequantisedcheckpoints import (
    Known,
    Tensors,
    awq,
    awq_config,
    gptq,
    gptq_config,
    known,
    write_quantised_checkpoint,
)

from tidegate.errors import CheckpointError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import DenseLinear, PackedLinear
from tidegate.model.prequantised import find_prequantised
from tidegate.model.registry import Source
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_writer import write_safetensors


def read(
    folder: Path, tensors: Tensors, config: dict[str, object], rows: tuple[int, int] | None = None
) -> PackedLinear:
    path = folder / "model.safetensors"
    write_safetensors(path, {f"x.{name}": values for name, values in tensors.items()})
    with SafetensorsFile(path) as file:
        found = find_prequantised(
            {"quantization_config": config}, dict.fromkeys(file.entries, file)
        )
        return found["x.weight"].read(rows)


def assert_same(found: PackedLinear, expected: Known) -> None:
    outputs, inputs = expected.integers.shape
    integers = found.integers().reshape(outputs, -1)
    assert np.array_equal(integers[:, :inputs], expected.integers)
    assert found.zeros is not None
    assert np.array_equal(found.zeros, expected.zeros)
    assert np.array_equal(
        integers[:, inputs:], found.zeros[:, -1:].repeat(integers.shape[1] - inputs, axis=1)
    )
    assert np.array_equal(found.scales, expected.scales)
    # A product of a 9 and an 11 bit number is exact in float32.
    assert np.array_equal(found.dequantise(), expected.weight())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_every_integer_scale_and_zero_point(
    tmp_path: Path, bits: int, group_size: int, offset: int
) -> None:
    weight = known(24, 256, bits=bits, group_size=256 if group_size == -1 else group_size)
    layout = "gptq" if offset else "gptq_v2"
    config = gptq_config(bits, group_size, checkpoint_format=layout)
    assert_same(read(tmp_path, gptq(weight, bits, offset=offset), config), weight)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_awq_keeps_every_integer_scale_and_zero_point(tmp_path: Path, group_size: int) -> None:
    weight = known(24, 256, bits=4, group_size=256 if group_size == -1 else group_size)
    assert_same(read(tmp_path, awq(weight), awq_config(group_size)), weight)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_input_that_leaves_a_group_half_full_is_padded_with_nothing(
    tmp_path: Path, method: str
) -> None:
    weight = known(16, 96, bits=4, group_size=64)
    tensors = gptq(weight, 4) if method == "gptq" else awq(weight)
    config = gptq_config(4, 64) if method == "gptq" else awq_config(64)
    assert_same(read(tmp_path, tensors, config), weight)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_some_rows_of_a_fused_weight_are_those_rows(tmp_path: Path, method: str) -> None:
    weight = known(24, 128, bits=4, group_size=32)
    tensors = gptq(weight, 4) if method == "gptq" else awq(weight)
    config = gptq_config(4, 32) if method == "gptq" else awq_config(32)
    part = replace(
        weight,
        integers=weight.integers[5:19],
        zeros=weight.zeros[5:19],
        scales=weight.scales[5:19],
    )
    assert_same(read(tmp_path, tensors, config, rows=(5, 19)), part)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_in_the_middle_make_a_symmetric_layer(tmp_path: Path, bits: int) -> None:
    weight = known(16, 128, bits=bits, group_size=64, middle=True)
    found = read(tmp_path, gptq(weight, bits), gptq_config(bits, 64, sym=True))
    assert found.zeros is None
    assert np.array_equal(found.dequantise(), weight.weight())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_point_that_two_readers_understand_differently_is_refused(
    tmp_path: Path, bits: int
) -> None:
    weight = known(16, 128, bits=bits, group_size=64)
    weight.zeros[3, 1] = 1 << bits
    with pytest.raises(CheckpointError, match=rf"x\.qzeros: .* means {1 << bits}: must be at most"):
        read(tmp_path, gptq(weight, bits), gptq_config(bits, 64))


def test_an_order_of_activations_is_refused_unless_groups_lie_side_by_side(tmp_path: Path) -> None:
    weight = known(16, 128, bits=4, group_size=64)
    config = gptq_config(4, 64, desc_act=True)
    tensors = gptq(weight, 4)
    assert_same(read(tmp_path, tensors, config), weight)
    tensors["g_idx"] = tensors["g_idx"][::-1].copy()
    with pytest.raises(CheckpointError, match=r"x\.g_idx: desc_act"):
        read(tmp_path, tensors, config)


def test_scales_that_a_bundle_would_round_are_refused(tmp_path: Path) -> None:
    tensors = awq(known(16, 128, bits=4, group_size=64))
    tensors["scales"] = tensors["scales"].astype(np.float32) * np.float32(1.0001)
    with pytest.raises(CheckpointError, match=r"x\.scales: must be finite and fit float16"):
        read(tmp_path, tensors, awq_config(64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method = 'bitsandbytes': must be gptq or awq"),
        ({"quant_method": None}, "quant_method"),
        ({"bits": 3}, r"bits = 3: must be 4 or 8"),
        ({"group_size": 32.0}, r"group_size = 32\.0"),
        ({"group_size": 16}, r"group_size = 16: must be one of \(32, 64, 128\), or -1"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format = 'marlin'"),
        ({"dynamic": {"-:.*down.*": {}}}, "dynamic"),
        ({"quant_method": "awq", "bits": 8}, r"bits = 8: must be 4"),
        ({"quant_method": "awq", "version": "gemv"}, r"version = 'gemv': must be gemm"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point"),
    ],
)
def test_another_way_of_quantising_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    tensors = gptq(known(16, 128, bits=4, group_size=64), 4)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, tensors, gptq_config(4, 64) | changes)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("scales", None, r"no tensor 'x\.scales'"),
        ("qzeros", None, r"no tensor 'x\.qzeros'"),
        ("scales", np.ones((1, 16), np.float16), r"x\.scales: shape \(1, 16\): must be \(2, 16\)"),
        ("qzeros", np.ones((2, 16), np.int32), r"x\.qzeros: shape \(2, 16\): must be \(2, 2\)"),
        ("qweight", np.ones((16, 16), np.float16), r"x\.qweight: F16"),
        ("g_idx", np.zeros(64, np.int32), r"x\.g_idx: shape \(64,\): must be \(128,\)"),
        ("weight", np.ones((16, 128), np.float16), "both a weight and a qweight"),
    ],
)
def test_a_missing_or_odd_tensor_is_refused_by_name(
    tmp_path: Path, name: str, values: np.ndarray | None, message: str
) -> None:
    tensors = gptq(known(16, 128, bits=4, group_size=64), 4)
    if values is None:
        del tensors[name]
    else:
        tensors[name] = values
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, tensors, gptq_config(4, 64))


def test_a_quantised_checkpoint_opens_and_its_table_stays_dense(
    tmp_path: Path,
) -> None:
    down = write_quantised_checkpoint(tmp_path, "awq")["model.layers.1.mlp.down_proj"]
    with Checkpoint.open(tmp_path) as checkpoint:
        weights = checkpoint.weights()
        found = weights.linear("layers.1.down")
        assert isinstance(found, PackedLinear)
        assert_same(found, down)
        assert isinstance(weights.linear("embed"), DenseLinear)


def test_quantised_tensors_without_a_word_in_the_config_are_refused(
    tmp_path: Path,
) -> None:
    write_quantised_checkpoint(tmp_path, "awq", quantization_config=None)
    with pytest.raises(CheckpointError, match="quantization_config: is missing"):
        Checkpoint.open(tmp_path)


def test_a_quantised_weight_of_another_shape_than_the_config_asks_for_is_refused(
    tmp_path: Path,
) -> None:
    write_quantised_checkpoint(tmp_path, "awq", intermediate_size=224)
    with pytest.raises(CheckpointError, match=r"qweight: stands for a weight \(192, 128\)"):
        Checkpoint.open(tmp_path)


def test_a_fused_quantised_tensor_gives_each_role_its_rows_and_its_part_of_the_bias(
    tmp_path: Path,
) -> None:
    write_quantised_checkpoint(tmp_path, "awq")
    with Checkpoint.open(tmp_path) as checkpoint:
        name = "model.layers.0.self_attn.q_proj.weight"
        whole = checkpoint.prequantised[name].read()
        fused = replace(
            checkpoint,
            sources={"half": Source(tensor=name, rows=(64, 128), bias="model.norm.weight")},
        )
        found = fused.weights().linear("half")
        norm = checkpoint.weights().vector("final_norm")
    assert isinstance(found, PackedLinear)
    assert np.array_equal(found.values, whole.values[64:])
    assert found.bias is not None
    assert np.array_equal(found.bias, norm[64:])
