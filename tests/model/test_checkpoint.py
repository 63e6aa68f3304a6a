"""Checkpoints: read lazily and exactly, refused clearly when anything is wrong."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import checkpoint_tensors, safetensors_bytes, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tinymodel import RandomWeights, tiny_architecture

from tidegate.errors import CheckpointError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import DenseLinear
from tidegate.model.safetensors_file import SafetensorsFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arch = tiny_architecture()
    return write_checkpoint(tmp_path / "checkpoint", arch, RandomWeights(arch))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_gives_back_its_architecture_and_weights(
    tmp_path: Path, shards: int, tied: bool
) -> None:
    arch = tiny_architecture(tied_head=tied)
    weights = RandomWeights(arch)
    folder = write_checkpoint(tmp_path / "checkpoint", arch, weights, shards=shards)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.architecture == arch
        read = checkpoint.weights().linear("layers.1.down")
        original = weights.linear("layers.1.down")
        assert isinstance(read, DenseLinear)
        assert isinstance(original, DenseLinear)
        # bfloat16 keeps 8 bits of the significand.
        assert np.allclose(read.weight, original.weight, rtol=2.0**-8)
        norm = checkpoint.weights().vector("final_norm")
        assert np.allclose(norm, weights.vector("final_norm"), rtol=2.0**-8)


def test_tensors_are_the_ones_the_reference_reader_sees(folder: Path) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as reference, SafetensorsFile(path) as ours:
        assert set(ours.entries) == set(reference.keys())
        for name in ours.entries:
            assert np.array_equal(ours.read(name), reference.get_tensor(name).float().numpy())


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_every_float_type_is_widened(tmp_path: Path, dtype: str) -> None:
    values = np.array([[1.5, -2.0, 0.25]], np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"x": values}, dtype=dtype))
    with SafetensorsFile(path) as file:
        assert np.array_equal(file.read("x"), values)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(folder)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused_but_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, framed: bool
) -> None:
    if framed:
        data = len(data).to_bytes(8, "little") + data
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    with suppress(CheckpointError):
        SafetensorsFile(path).close()


@settings(deadline=None, max_examples=150)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    data = bytearray(safetensors_bytes({"a": np.ones((2, 3)), "b": np.ones(5)}))
    data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz-header.safetensors"
    path.write_bytes(data)
    with suppress(CheckpointError), SafetensorsFile(path) as file:
        for name in file.entries:
            file.read(name)


def test_an_unknown_model_type_is_refused_with_the_known_ones(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    with pytest.raises(CheckpointError, match=r"model_type = .mamba.: must be one of .*llama"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("hidden_act", "mish"),
        ("rope_scaling", 3),
        ("rms_norm_eps", None),
    ],
)
def test_a_config_it_cannot_honour_is_refused_by_key(folder: Path, key: str, value: object) -> None:
    if key == "rms_norm_eps":
        value = -1
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        Checkpoint.open(folder)


def test_a_shape_that_disagrees_with_the_config_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: shape \(192, 128\)"):
        Checkpoint.open(folder)


def test_no_folder_no_config_and_no_weights_are_each_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_shard_index_cannot_point_outside(tmp_path: Path) -> None:
    arch = tiny_architecture()
    folder = write_checkpoint(tmp_path / "c", arch, RandomWeights(arch), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint.open(folder)


def test_biases_must_be_there_when_the_config_says_so_and_have_their_shape(folder: Path) -> None:
    edit_config(folder, attention_bias=True)
    with pytest.raises(
        CheckpointError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"
    ):
        Checkpoint.open(folder)
    edit_config(folder, attention_bias=False)
    arch = tiny_architecture()
    tensors = checkpoint_tensors(arch, RandomWeights(arch))
    tensors["model.layers.0.self_attn.k_proj.bias"] = np.ones(7, np.float32)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(CheckpointError, match=r"k_proj\.bias: shape \(7,\)"):
        Checkpoint.open(folder)


def test_a_number_beyond_any_float_is_refused(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=10**400)
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        Checkpoint.open(folder)
