"""LoRA adapters in PEFT's layout: merged exactly, and nothing of one is ever left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.lora import Lora
from tidegate.converters.recipe import make_recipe
from tidegate.converters.rounding.rtn import quantise
from tidegate.errors import CheckpointError, ConversionError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.lora import read_lora_config
from tidegate.model.packed import DenseLinear
from tidegate.model.registry import Source
from tidegate.model.roles import roles
from tidegate.model.safetensors_writer import write_safetensors

PREFIX = "base_model.model.model.layers."

# What PEFT 0.17 writes for a plain adapter.
CONFIG: dict[str, object] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "some/model",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}

Matrices = dict[str, tuple[np.ndarray, np.ndarray]]


def matrices(rank: int = 4) -> Matrices:
    """A and B of a few layers of the tiny model, by path."""
    rng = np.random.default_rng(3)
    shapes = {
        "0.self_attn.q_proj": (128, 128),
        "1.self_attn.q_proj": (128, 128),
        "1.mlp.down_proj": (128, 192),
    }
    return {
        path: (
            rng.standard_normal((rank, inputs)).astype(np.float32),
            rng.standard_normal((outputs, rank)).astype(np.float32),
        )
        for path, (outputs, inputs) in shapes.items()
    }


def write_adapter(
    folder: Path, found: Matrices, extra: dict[str, np.ndarray] | None = None, **config: object
) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    tensors = dict(extra or {})
    for path, (a, b) in found.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arch = tiny_architecture()
    return write_checkpoint(tmp_path / "checkpoint", arch, RandomWeights(arch))


def differences(checkpoint: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What the merge changed, by role, of all roles."""
    found = {}
    with Checkpoint.open(checkpoint) as opened, Lora.open(adapter) as lora:
        before, after = opened.weights(), lora.merged(opened.weights(), opened.sources)
        for name, role in roles(opened.architecture).items():
            if role.is_linear:
                old, new = before.linear(name), after.linear(name)
                assert isinstance(old, DenseLinear)
                assert isinstance(new, DenseLinear)
                found[name] = new.weight - old.weight
            else:
                found[name] = after.vector(name) - before.vector(name)
    return {name: values for name, values in found.items() if values.any()}


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_every_layer_of_the_adapter_is_added_and_no_other_changes(
    checkpoint: Path, tmp_path: Path, stabilised: bool, scale: float
) -> None:
    parts = matrices()
    adapter = write_adapter(tmp_path / "adapter", parts, use_rslora=stabilised)
    changed = differences(checkpoint, adapter)
    assert set(changed) == {"layers.0.q", "layers.1.q", "layers.1.down"}
    for role, path in (("layers.0.q", "0.self_attn.q_proj"), ("layers.1.down", "1.mlp.down_proj")):
        a, b = (part.astype(np.float64) for part in parts[path])
        np.testing.assert_allclose(changed[role], scale * b @ a, rtol=1e-4, atol=1e-4)


def test_rank_and_alpha_of_single_layers_go_by_the_first_pattern_that_ends_a_path(
    checkpoint: Path, tmp_path: Path
) -> None:
    parts = matrices() | {"1.mlp.down_proj": matrices(rank=2)["1.mlp.down_proj"]}
    adapter = write_adapter(
        tmp_path / "adapter",
        parts,
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 8, "proj": 99, "q_proj": 32},
    )
    changed = differences(checkpoint, adapter)
    scales = {"layers.0.q": 32 / 4, "layers.1.q": 8 / 4, "layers.1.down": 16 / 2}
    for role, path in zip(scales, parts, strict=True):
        a, b = (part.astype(np.float64) for part in parts[path])
        np.testing.assert_allclose(changed[role], scales[role] * b @ a, rtol=1e-4, atol=1e-4)


def test_roles_of_a_fused_layer_get_their_rows_of_b(checkpoint: Path, tmp_path: Path) -> None:
    parts = {path: pair for path, pair in matrices().items() if path == "0.self_attn.q_proj"}
    adapter = write_adapter(tmp_path / "adapter", parts)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    fused = {
        "low": Source(tensor=tensor, rows=(0, 48)),
        "high": Source(tensor=tensor, rows=(48, 128)),
    }
    with Checkpoint.open(checkpoint) as opened, Lora.open(adapter) as lora:
        plain = replace(opened, sources=fused).weights()
        merged = lora.merged(plain, fused)
        whole = lora.merged(opened.weights(), opened.sources).linear("layers.0.q")
        found = [merged.linear(role) for role in ("low", "high")]
    assert isinstance(whole, DenseLinear)
    stacked = np.concatenate([part.weight for part in found if isinstance(part, DenseLinear)])
    np.testing.assert_allclose(stacked, whole.weight, rtol=1e-5, atol=1e-5)


def test_what_the_adapter_leaves_alone_is_still_read_by_rows(
    checkpoint: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", matrices())
    with Checkpoint.open(checkpoint) as opened, Lora.open(adapter) as lora:
        merged = lora.merged(opened.weights(), opened.sources)
        table = merged.linear("embed")
        found = merged.by_rows("embed")
        assert found is not None
        assert isinstance(table, DenseLinear)
        assert np.array_equal(found[0](3, 9), table.weight[3:9])
        assert merged.by_rows("layers.0.q") is None
        memory = lora.merged(RandomWeights(tiny_architecture()), opened.sources)
        assert memory.by_rows("embed") is None


def test_a_weight_that_the_adapter_brings_takes_the_place_of_the_checkpoints(
    checkpoint: Path, tmp_path: Path
) -> None:
    parts = {"0.self_attn.q_proj": matrices()["0.self_attn.q_proj"]}
    name = f"{PREFIX}0.self_attn.q_proj.base_layer.weight"
    adapter = write_adapter(tmp_path / "a", parts, {name: np.ones((128, 128), np.float32)})
    with Checkpoint.open(checkpoint) as opened, Lora.open(adapter) as lora:
        found = lora.merged(opened.weights(), opened.sources).linear("layers.0.q")
    assert isinstance(found, DenseLinear)
    a, b = parts["0.self_attn.q_proj"]
    np.testing.assert_allclose(found.weight, 1 + 4 * b @ a, rtol=1e-4, atol=1e-4)
    adapter = write_adapter(tmp_path / "b", parts, {name: np.ones((130, 128), np.float32)})
    with pytest.raises(ConversionError, match=r"base_layer\.weight: shape \(130, 128\)"):
        differences(checkpoint, adapter)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.weight",
        f"{PREFIX}7.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}0.self_attn.k_proj.lora_A.weight",
        f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector",
    ],
)
def test_a_tensor_that_belongs_to_no_layer_is_an_error_that_names_it(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    extra = {name: np.ones((4, 128), np.float32)}
    adapter = write_adapter(tmp_path / "adapter", matrices(), extra)
    with pytest.raises(CheckpointError, match=rf"no linear layer of the model: {name}$"):
        differences(checkpoint, adapter)


def test_an_adapter_without_a_layer_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor"):
        differences(checkpoint, write_adapter(tmp_path / "adapter", {}))


def test_a_rank_other_than_the_config_says_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", matrices(rank=3))
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight: shape \(3, 128\)"):
        differences(checkpoint, adapter)


def test_an_adapter_of_another_model_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    parts = {"0.self_attn.q_proj": matrices()["1.mlp.down_proj"]}
    with pytest.raises(ConversionError, match=r"is for a weight \(128, 192\): layers\.0\.q is"):
        differences(checkpoint, write_adapter(tmp_path / "adapter", parts))


def test_a_layer_that_is_quantised_already_is_not_merged(checkpoint: Path, tmp_path: Path) -> None:
    weights = RandomWeights(
        tiny_architecture(),
        quantise=lambda _, dense: quantise(dense, bits=4, group_size=32, symmetric=False),
    )
    adapter = write_adapter(tmp_path / "adapter", matrices())
    with Checkpoint.open(checkpoint) as opened, Lora.open(adapter) as lora:
        merged = lora.merged(weights, opened.sources)
        assert merged.linear("layers.0.k") is weights.linear("layers.0.k")
        with pytest.raises(ConversionError, match=r"layers\.0\.q: is quantised"):
            merged.linear("layers.0.q")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 4]]),
        ("something_new", "yes"),
        ("r", 0),
        ("lora_alpha", "high"),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(?i)q_proj": 4}),
        ("alpha_pattern", ["q_proj"]),
    ],
)
def test_a_setting_that_it_cannot_honour_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"^adapter_config\.json: {key} = "):
        read_lora_config(CONFIG | {key: value})


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder with an adapter"):
        Lora.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        Lora.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        Lora.open(tmp_path)


def test_a_conversion_merges_the_adapter_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", matrices())
    plan = ConversionPlan(
        model_id="tiny",
        targets=("onnx",),
        recipe=make_recipe(bits=8, group_size=32, symmetric=False),
    )
    plain = convert(checkpoint, tmp_path / "plain", plan)
    merged = convert(checkpoint, tmp_path / "merged", replace(plan, lora=adapter))
    (said,) = merged.manifest.recipe.passes
    assert (said.kind, said.options["folder"]) == ("lora", "adapter")
    files = [bundle.manifest.files["onnx/model.onnx.data"] for bundle in (plain, merged)]
    assert files[0].sha256 != files[1].sha256
    assert files[0].size_bytes == files[1].size_bytes
    rank_one = {path: (a[:1], b[:, :1]) for path, (a, b) in matrices().items()}
    other = write_adapter(tmp_path / "other", rank_one)
    with pytest.raises(CheckpointError, match="must have rank 4"):
        convert(checkpoint, tmp_path / "refused", replace(plan, lora=other))
