"""Checkpoints: read lazily and exactly, refused clearly when anything is wrong."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    byte_tokenizer,
    checkpoint_tensors,
    safetensors_bytes,
    write_checkpoint,
)
from hfcheckpoints import write_hf_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tinymodel import RandomWeights, tiny_architecture

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import DenseLinear, dense_weight
from tidegate.model.roles import roles
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.text_files import write_text_files


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
    arch = replace(tiny_architecture(), qkv_bias=True, o_bias=True)
    add_tensors(folder, arch, {"model.layers.0.self_attn.k_proj.bias": np.ones(7)})
    with pytest.raises(CheckpointError, match=r"k_proj\.bias: shape \(7,\)"):
        Checkpoint.open(folder)


def add_tensors(folder: Path, arch: Architecture, more: dict[str, np.ndarray]) -> None:
    """Save random weights of `arch` again, with other tensors beside or instead of them."""
    tensors = checkpoint_tensors(arch, RandomWeights(arch)) | more
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, dtype="F32"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.layers.0.self_attn.k_proj.bias", "config.json says that there is no such bias"),
        ("model.norm.bias", "is no part of a llama of this config.json"),
        ("model.layers.1.self_attn.q_norm.weight", "is no part of a llama of this config.json"),
        ("model.layers.2.mlp.up_proj.weight", "is no part of a llama of this config.json"),
        ("lm_head.bias", "is no part of a llama of this config.json"),
    ],
)
def test_a_tensor_that_would_not_be_read_is_refused(folder: Path, name: str, problem: str) -> None:
    add_tensors(folder, tiny_architecture(), {name: np.ones(64)})
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: {problem}")):
        Checkpoint.open(folder)


def test_frequencies_and_heads_for_other_tasks_may_lie_beside(folder: Path) -> None:
    arch = tiny_architecture()
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    add_tensors(folder, arch, {frequencies: np.ones(16), "score.weight": np.ones((2, 128))})
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.architecture == arch


def test_a_tied_head_that_is_saved_must_be_the_embedding(folder: Path) -> None:
    arch = tiny_architecture()
    table = checkpoint_tensors(arch, RandomWeights(arch))["model.embed_tokens.weight"]
    add_tensors(folder, arch, {"lm_head.weight": table})
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.architecture == arch
    other = table.copy()
    other[-1, -1] += 1
    add_tensors(folder, arch, {"lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs .* tie_word_embeddings"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("role", "tensor"),
    [
        ("layers.1.up", "model.layers.1.mlp.up_proj.weight"),
        ("layers.0.attention_norm", "model.layers.0.input_layernorm.weight"),
        ("layers.0.v", "model.layers.0.self_attn.v_proj.bias"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_when_it_is_read(
    folder: Path, role: str, tensor: str, value: float
) -> None:
    edit_config(folder, attention_bias=True)
    arch = replace(tiny_architecture(), qkv_bias=True, o_bias=True)
    damaged = checkpoint_tensors(arch, RandomWeights(arch))[tensor].copy()
    damaged.flat[-1] = value
    add_tensors(folder, arch, {tensor: damaged})
    with Checkpoint.open(folder) as checkpoint:
        weights = checkpoint.weights()
        weights.linear("layers.0.up")
        of = roles(arch)[role]
        refused = re.escape(f"{tensor}: holds numbers that are not finite")
        with pytest.raises(CheckpointError, match=refused):
            (weights.linear if of.is_linear else weights.vector)(role)
        if of.is_linear:
            with pytest.raises(CheckpointError, match=refused):
                weights.by_rows(role)[0](0, of.shape[0])  # type: ignore[index]


def test_weights_whose_squares_overflow_are_still_finite(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    add_tensors(folder, tiny_architecture(), {name: np.full((192, 128), 3e38)})
    with Checkpoint.open(folder) as checkpoint:
        assert dense_weight(checkpoint.weights().linear("layers.1.up")).max() == np.float32(3e38)


def test_a_shard_that_is_missing_or_lacks_its_tensor_is_named(tmp_path: Path) -> None:
    arch = tiny_architecture()
    folder = write_checkpoint(tmp_path / "c", arch, RandomWeights(arch), shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    (folder / "elsewhere").write_bytes(shard.read_bytes())
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: cannot be read"):
        Checkpoint.open(folder)
    shard.write_bytes(safetensors_bytes({"x": np.ones(1)}))
    with pytest.raises(CheckpointError, match="the checkpoint has no tensor 'model"):
        Checkpoint.open(folder)


def test_a_weight_of_whole_numbers_is_refused_by_type(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    name = b'"model.layers.0.mlp.gate_proj.weight": {"dtype": "BF16"'
    assert name in data
    path.write_bytes(data.replace(name, name.replace(b'"BF16"', b' "I16"')))
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"gate_proj\.weight: dtype 'I16': must be one of"),
    ):
        checkpoint.weights().linear("layers.0.gate")


def test_a_fused_tensor_of_another_height_is_refused(tmp_path: Path) -> None:
    folder = write_hf_checkpoint(tmp_path, "phi3")
    edit_config(folder, num_key_value_heads=1)
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight: shape \(96, 48\): .* \(72, 48\)"):
        Checkpoint.open(folder)
    edit_config(folder, num_key_value_heads=2, intermediate_size=81)
    with pytest.raises(CheckpointError, match=r"(gate_up|down)_proj\.weight: shape"):
        Checkpoint.open(folder)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    byte_tokenizer(204).save(str(folder / "tokenizer.json"))
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match="token id 203: the embedding has 203 rows"),
    ):
        write_text_files(checkpoint, tmp_path)


def test_a_number_beyond_any_float_is_refused(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=10**400)
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "mixtral", "qwen3_moe"])
def test_rows_of_a_weight_are_those_of_the_whole_wherever_it_lies(
    tmp_path: Path, model_type: str
) -> None:
    write_hf_checkpoint(tmp_path / model_type, model_type)
    with Checkpoint.open(tmp_path / model_type) as checkpoint:
        weights = checkpoint.weights()
        for name, role in roles(checkpoint.architecture).items():
            if not role.is_linear:
                continue
            whole, found = weights.linear(name), weights.by_rows(name)
            assert isinstance(whole, DenseLinear)
            assert found is not None
            read, bias = found
            assert np.array_equal(read(0, whole.outputs), whole.weight), name
            assert np.array_equal(read(1, 3), whole.weight[1:3]), name
            assert (bias is None) == (whole.bias is None)
            assert bias is None or np.array_equal(bias, whole.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_shard_of_a_name_that_no_file_has_is_refused(folder: Path, name: str) -> None:
    index = {"weight_map": {"x": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    arch = tiny_architecture()
    folder = write_checkpoint(tmp_path / "c", arch, RandomWeights(arch), shards=2)
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    (folder / "more.safetensors").write_bytes((folder / min(shards.values())).read_bytes())
    index.write_text(json.dumps({"weight_map": shards | {"x": "more.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"is in .* and more\.safetensors|is in more"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "t"}], None),
        ("\ud800", None),
        (7, None),
    ],
)
def test_a_chat_template_is_kept_or_refused_and_never_dropped(
    folder: Path, tmp_path: Path, template: object, expected: str | None
) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    out = tmp_path / "out"
    out.mkdir()
    with Checkpoint.open(folder) as checkpoint:
        if expected is None:
            with pytest.raises(CheckpointError, match="chat_template"):
                write_text_files(checkpoint, out)
        else:
            write_text_files(checkpoint, out)
            assert (out / "chat_template.jinja").read_text() == expected
