"""Conversion as a whole: what comes out, what is refused, and that failures leave nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer, write_checkpoint
from encodercheckpoints import CLASSIFIER, EMBEDDING, write_encoder
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.converters.recipe_file import load_recipe, parse_recipe, with_target
from tidegate.errors import BundleError, CheckpointError, ConfigError
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import PackedLinear
from tidegate.model.recipe import Recipe
from tidegate.model.roles import roles

RECIPE = make_recipe(bits=4, group_size=32, symmetric=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arch = tiny_architecture()
    return write_checkpoint(tmp_path / "checkpoint", arch, RandomWeights(arch))


def plan(recipe: Recipe = RECIPE, context_tokens: int | None = None) -> ConversionPlan:
    return ConversionPlan(
        model_id="tiny",
        targets=("onnx", "openvino"),
        recipe=recipe,
        context_tokens=context_tokens,
    )


def test_a_bundle_says_what_it_holds_and_verifies(tmp_path: Path, checkpoint: Path) -> None:
    told: list[tuple[str, int, int]] = []
    convert(checkpoint, tmp_path / "b", plan(), lambda *one: told.append(one))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.targets == ("onnx", "openvino")
    assert set(manifest.toolchain) == {"onnx", "openvino"}
    assert manifest.tensor_bits["embed"] == 8
    assert manifest.tensor_bits["layers.1.down"] == 4
    assert manifest.architecture == tiny_architecture()
    # 4 bits, plus a float16 scale and a 4-bit zero-point per 32, and 8-bit tables.
    bits = manifest.memory.weight_bytes * 8 / manifest.architecture.parameters
    assert 4.6 < bits < 5.2
    assert {what for what, _, _ in told} >= {"onnx: layers", "openvino: layers"}
    assert all(0 <= done <= total for _, done, total in told)


def test_converting_again_counts_the_version_up(tmp_path: Path, checkpoint: Path) -> None:
    convert(checkpoint, tmp_path / "b", plan())
    assert convert(checkpoint, tmp_path / "b", plan()).manifest.version == 2


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    one = convert(checkpoint, tmp_path / "a", plan()).manifest
    two = convert(checkpoint, tmp_path / "b", plan()).manifest
    assert one.files == two.files


def test_a_tied_table_is_quantised_once_and_shared_by_identity() -> None:
    arch = tiny_architecture()
    weights = RecipeWeights(RandomWeights(arch), RECIPE)
    assert weights.linear("embed") is weights.linear("embed")
    packed = weights.linear("layers.0.q")
    assert isinstance(packed, PackedLinear)
    assert packed.bits == 4


def test_the_tokenizer_must_be_there_and_fit_the_embedding(
    tmp_path: Path, checkpoint: Path
) -> None:
    tokenizer = checkpoint / "tokenizer.json"
    body = json.loads(tokenizer.read_text())
    body["model"]["vocab"]["zebra"] = 9000
    tokenizer.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="token id 9000: the embedding has 203 rows"):
        convert(checkpoint, tmp_path / "b", plan())
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        convert(checkpoint, tmp_path / "b", plan())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_weights_that_are_no_numbers_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    weights.linear("layers.1.up").weight[3, 5] = np.inf  # type: ignore[union-attr]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", arch, weights)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: holds numbers that are not fin"):
        convert(checkpoint, tmp_path / "b", plan())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("auto", [EMBEDDING, CLASSIFIER])
@pytest.mark.parametrize("recipe", ["fast", "balanced", "int8"])
def test_an_encoder_goes_the_same_way(tmp_path: Path, auto: str, recipe: str) -> None:
    torch.set_num_threads(1)
    folder = write_encoder(tmp_path / "checkpoint", "bert", auto)
    byte_tokenizer(203).save(str(folder / "tokenizer.json"))
    with Checkpoint.open(folder) as opened:
        arch = opened.architecture
    made = convert(folder, tmp_path / "b", plan(load_recipe(recipe)))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.architecture == arch
    assert manifest.memory.kv_values_per_token == 0
    assert manifest.tensor_bits["positions"] == 8
    assert (manifest.calibration is None) == (recipe == "fast")
    # Its norms come after the residual sum, so there is little that smoothing could fold into.
    assert (made.notes != {}) == (recipe == "int8")


def test_a_recipe_that_looks_at_text_says_which(tmp_path: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    (tmp_path / "mine.txt").write_text("abcdefgh" * 80)
    wanted = replace(plan(load_recipe("balanced")), text=tmp_path / "mine.txt")
    calibration = convert(checkpoint, tmp_path / "b", wanted).manifest.calibration
    assert calibration is not None
    assert (calibration.text, calibration.tokens) == ("mine.txt", 640)


def test_text_that_nobody_looks_at_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "mine.txt").write_text("the pump is on.")
    with pytest.raises(ConfigError, match=r"text = .*mine\.txt'.* no pass of recipe 'rtn'"):
        convert(checkpoint, tmp_path / "b", replace(plan(), text=tmp_path / "mine.txt"))


def test_further_graphs_come_over_the_same_weights_and_the_manifest_tells(
    tmp_path: Path, checkpoint: Path
) -> None:
    alone = convert(checkpoint, tmp_path / "a", replace(plan(), targets=("onnx",))).manifest
    wanted = replace(plan(), targets=("onnx",), graphs=("int8kv", "fp16"))
    manifest = convert(checkpoint, tmp_path / "b", wanted).manifest
    further = set(manifest.files) - set(alone.files)
    assert further == {"onnx/model.int8kv.onnx", "onnx/model.fp16.onnx"}
    assert all(manifest.files[name] == alone.files[name] for name in alone.files)
    assert [one.kind for one in manifest.recipe.passes] == ["int8kv", "fp16"]
    assert manifest.calibration is not None
    assert manifest.calibration.text == "calibration.txt"


def test_further_graphs_that_cannot_be_are_refused_before_any_work(
    tmp_path: Path, checkpoint: Path
) -> None:
    without = replace(plan(), targets=("openvino",), graphs=("int8kv",))
    with pytest.raises(ConfigError, match=r"graphs = 'int8kv': must be left out without the onnx"):
        convert(checkpoint, tmp_path / "b", without)
    encoder = write_encoder(tmp_path / "encoder", "bert", EMBEDDING)
    byte_tokenizer(203).save(str(encoder / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"graphs = 'fp16': must be left out: bert has no KV"):
        convert(encoder, tmp_path / "b", replace(plan(), graphs=("fp16",)))


def test_a_recipe_that_does_not_fit_the_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    wrong = parse_recipe('name = "x"\n[[formats]]\nmatch = ["layers.9.q"]', "x.toml")
    with pytest.raises(ConfigError, match=r"match = 'layers\.9\.q'"):
        convert(checkpoint, tmp_path / "b", plan(wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_target_is_met_by_mixing_formats(tmp_path: Path, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    recipe = with_target(load_recipe("fast"), 5.5)
    manifest = convert(checkpoint, tmp_path / "b", plan(recipe)).manifest
    assert set(manifest.tensor_bits.values()) == {4, 8}
    linears = sum(
        role.shape[0] * role.shape[1]
        for role in roles(manifest.architecture).values()
        if role.is_linear
    )
    norms = 4 * 5 * tiny_architecture().width
    assert 5.0 < (manifest.memory.weight_bytes - norms) * 8 / linears <= 5.5


def test_a_context_beyond_the_model_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="context = 300: must be from 1 to the model's 256"):
        convert(checkpoint, tmp_path / "b", plan(context_tokens=300))


def test_something_else_at_the_destination_is_kept(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(BundleError, match="not overwritten"):
        convert(checkpoint, tmp_path / "notes", plan())
    assert (tmp_path / "notes" / "a.txt").read_text() == "keep me"


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 48), (16, 64)])
def test_a_recipe_that_no_backend_runs_is_refused(bits: int, group_size: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        make_recipe(bits=bits, group_size=group_size, symmetric=True)


def test_a_chat_template_inside_the_tokenizer_config_is_taken_along(
    tmp_path: Path, checkpoint: Path
) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    bundle = convert(checkpoint, tmp_path / "b", plan())
    assert (bundle.folder / "chat_template.jinja").read_text() == "{{ 1 }}"


def test_the_end_token_is_found_wherever_the_checkpoint_keeps_it(
    tmp_path: Path, checkpoint: Path
) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    bundle = convert(checkpoint, tmp_path / "b", plan())
    settings = json.loads((bundle.folder / "generation_config.json").read_text())
    assert settings == {"temperature": 0.7, "eos_token_id": 1}


def test_token_ids_that_are_no_numbers_do_no_harm(tmp_path: Path, checkpoint: Path) -> None:
    tokenizer = checkpoint / "tokenizer.json"
    body = json.loads(tokenizer.read_text())
    body["added_tokens"].append({"id": "seven", "content": "x"})
    tokenizer.write_text(json.dumps(body))
    assert convert(checkpoint, tmp_path / "b", plan()).manifest.version == 1
