"""The packed target: the same integers as the other targets, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import byte_tokenizer, write_checkpoint
from encodercheckpoints import EMBEDDING, write_encoder
from hfcheckpoints import write_hf_checkpoint
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import RecipeWeights, make_recipe
from tidegate.converters.recipe_file import load_recipe, parse_recipe
from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.engine.executor import ExecutorStep, PagedGeometry, Row
from tidegate.errors import BundleError
from tidegate.model.architecture import Architecture
from tidegate.model.archive import pack, unpack
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.cuts import Cut
from tidegate.model.manifest import DEVICE_TARGETS, TARGETS, DeviceTarget, Target
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, PackedLinear
from tidegate.model.packed_target import FORMS, PackedWeights
from tidegate.model.recipe import Format, FormatRule, Recipe
from tidegate.model.registry import AnyArchitecture
from tidegate.model.roles import roles
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_writer import write_safetensors
from tidegate.model.walk import Weights

RTN = make_recipe(bits=4, group_size=32, symmetric=False)
RECIPES: dict[str, Recipe] = {
    "4 bits": RTN,
    "8 bits, symmetric": make_recipe(bits=8, group_size=64, symmetric=True),
    "dense": Recipe(
        name="float32",
        formats=(FormatRule(match=("*",), format=Format(bits=32, group_size=None)),),
        passes=(),
    ),
}
LOW_RANK = """
name = "factors"
[[formats]]
match = ["*"]
group_size = 32
[[passes]]
kind = "low_rank"
match = ["*.down"]
rank = 16
"""
PROMPT, LOGITS = np.random.default_rng(5).integers(2, 200, 21), 16


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plan(recipe: Recipe = RTN, targets: tuple[Target, ...] = ("packed",)) -> ConversionPlan:
    return ConversionPlan(model_id="tiny", targets=targets, recipe=recipe)


def biased(*, tied_head: bool = False) -> Architecture:
    return replace(
        tiny_architecture(tied_head=tied_head), qkv_bias=True, o_bias=True, mlp_bias=True
    )


def write(folder: Path, arch: Architecture) -> Path:
    return write_checkpoint(folder, arch, RandomWeights(arch))


def opened(folder: Path) -> PackedWeights:
    bundle = Bundle.open(folder)
    return PackedWeights(bundle.target_folder("packed"), bundle.manifest.architecture)


def arrays(linear: Linear) -> Iterator[npt.NDArray[np.generic] | None]:
    match linear:
        case LowRankLinear():
            yield from arrays(linear.first)
            yield from arrays(linear.second)
        case DenseLinear():
            yield from (linear.weight, linear.bias)
        case PackedLinear():
            yield from (linear.values, linear.scales, linear.zeros, linear.bias)


def assert_same(one: Weights, other: Weights, arch: AnyArchitecture) -> None:
    for name, role in roles(arch).items():
        if not role.is_linear:
            assert np.array_equal(one.vector(name), other.vector(name)), name
            continue
        found, expected = one.linear(name), other.linear(name)
        assert type(found) is type(expected), name
        for left, right in zip(arrays(found), arrays(expected), strict=True):
            assert (left is None) == (right is None), name
            if left is not None and right is not None:
                assert left.dtype == right.dtype, name
                assert np.array_equal(left, right), name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied_head", [True, False])
def test_every_number_is_what_the_recipe_makes(name: str, tied_head: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "in", biased(tied_head=tied_head))
    convert(folder, tmp_path / "b", plan(RECIPES[name]))
    with Checkpoint.open(folder) as checkpoint:
        made = RecipeWeights(checkpoint.weights(), RECIPES[name])
        assert_same(opened(tmp_path / "b"), made, checkpoint.architecture)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma2"])
def test_experts_and_models_with_norms_of_their_own_go_the_same_way(
    model_type: str, tmp_path: Path
) -> None:
    folder = write_hf_checkpoint(tmp_path / "in", model_type)
    convert(folder, tmp_path / "b", plan())
    with Checkpoint.open(folder) as checkpoint:
        made = RecipeWeights(checkpoint.weights(), RTN)
        assert_same(opened(tmp_path / "b"), made, checkpoint.architecture)


def test_an_encoder_goes_the_same_way(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "in", "bert", EMBEDDING)
    with Checkpoint.open(folder) as checkpoint:
        byte_tokenizer(203).save(str(folder / "tokenizer.json"))
        convert(folder, tmp_path / "b", plan())
        made = RecipeWeights(checkpoint.weights(), RTN)
        assert_same(opened(tmp_path / "b"), made, checkpoint.architecture)


def test_numbers_of_a_checkpoint_in_16_bits_take_16_bits(tmp_path: Path) -> None:
    convert(write(tmp_path / "in", tiny_architecture()), tmp_path / "b", plan(RECIPES["dense"]))
    with SafetensorsFile(tmp_path / "b/packed/layers.0.safetensors") as file:
        assert file.entries["layers.0.q:weight"].dtype == "BF16"
    found = opened(tmp_path / "b")
    stored, whole = found.stored("layers.0.down"), found.linear("layers.0.down")
    assert stored is not None
    assert isinstance(whole, DenseLinear)
    assert stored.bfloat
    assert np.array_equal(stored.values, (whole.weight.view(np.uint32) >> 16).astype(np.uint16))
    assert found.stored("layers.0.down", Cut(columns=(32, 64))) is not None


@pytest.mark.parametrize("low_rank", [False, True])
def test_logits_are_those_of_the_other_targets(low_rank: bool, tmp_path: Path) -> None:
    recipe = parse_recipe(LOW_RANK, "factors") if low_rank else RTN
    folder = write(tmp_path / "in", biased(tied_head=True))
    bundle = convert(folder, tmp_path / "b", plan(recipe, TARGETS))
    weights = opened(tmp_path / "b")
    assert isinstance(weights.linear("layers.1.down"), LowRankLinear) == low_rank
    executor = TorchExecutor(
        bundle.manifest.decoder, weights, TorchSettings(slots=1, context_tokens=64)
    )
    row = Row(tokens=PROMPT, past=0, slot=0, logits=LOGITS)
    packed = executor.execute(ExecutorStep(rows=(row,))).logits
    for target in DEVICE_TARGETS:
        found = device_logits(bundle, target)
        # Float sums in another order; widest seen 4e-6.
        np.testing.assert_allclose(found, packed, atol=5e-5)


def device_logits(bundle: Bundle, target: DeviceTarget) -> npt.NDArray[np.float32]:
    executor = open_executor(bundle, ExecutorSettings(choice=target, rows=1, threads=1, exact=True))
    paged = isinstance(executor.kv, PagedGeometry)
    blocks = np.arange(2, dtype=np.int32) if paged else None
    row = Row(tokens=PROMPT, past=0, slot=None if paged else 0, blocks=blocks, logits=LOGITS)
    found = np.array(executor.execute(ExecutorStep(rows=(row,))).logits)
    executor.close()
    return found


def test_parts_are_what_lies_in_the_whole(tmp_path: Path) -> None:
    convert(write(tmp_path / "in", biased()), tmp_path / "b", plan())
    weights = opened(tmp_path / "b")
    whole = weights.linear("layers.0.down")
    assert isinstance(whole, PackedLinear)
    assert whole.zeros is not None
    part = weights.part("layers.0.down", Cut(rows=(3, 70), columns=(64, 160)))
    assert isinstance(part, PackedLinear)
    assert part.zeros is not None
    assert part.bias is not None
    assert whole.bias is not None
    assert np.array_equal(part.values, whole.values[3:70, 2:5])
    assert np.array_equal(part.scales, whole.scales[3:70, 2:5])
    assert np.array_equal(part.zeros, whole.zeros[3:70, 2:5])
    assert np.array_equal(part.bias, whole.bias[3:70])
    assert np.array_equal(part.dequantise(), whole.dequantise()[3:70, 64:160])
    assert weights.part("layers.0.down", Cut(columns=(0, 48))) is None


def test_the_archive_and_the_manifest_take_it_as_any_target(tmp_path: Path) -> None:
    made = convert(write(tmp_path / "in", tiny_architecture()), tmp_path / "b", plan())
    assert made.manifest.targets == ("packed",)
    assert made.manifest.toolchain == {"packed": "1"}
    assert set(made.manifest.files) >= {
        "packed/embed.safetensors",
        "packed/layers.0.safetensors",
        "packed/layers.1.safetensors",
        "packed/final.safetensors",
    }
    pack(made, tmp_path / "b.tar.zst")
    unpack(tmp_path / "b.tar.zst", tmp_path / "again")
    with Checkpoint.open(tmp_path / "in") as checkpoint:
        assert_same(opened(tmp_path / "again"), opened(tmp_path / "b"), checkpoint.architecture)
    other = convert(tmp_path / "in", tmp_path / "c", plan())
    assert other.manifest.files == made.manifest.files


def test_what_was_interrupted_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", tiny_architecture())
    expected = convert(folder, tmp_path / "a", plan()).manifest
    told: list[str] = []

    def until_the_second(what: str, done: int, total: int) -> None:
        told.append(what)
        if what == "packed: blocks" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "b", plan(), until_the_second)
    assert not (tmp_path / "b").exists()
    told.clear()
    again = convert(folder, tmp_path / "b", plan(), lambda what, *_: told.append(what))
    assert set(told) == {"packed: blocks"}
    assert again.manifest.files == expected.files


def test_a_device_says_that_it_cannot_run_it(tmp_path: Path) -> None:
    made = convert(write(tmp_path / "in", tiny_architecture()), tmp_path / "b", plan())
    with pytest.raises(BundleError, match="holds no target that a device can run"):
        open_executor(made, ExecutorSettings())


def test_a_changed_or_truncated_file_is_named(tmp_path: Path) -> None:
    made = convert(write(tmp_path / "in", tiny_architecture()), tmp_path / "b", plan())
    path = made.folder / "packed/layers.1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    late = Bundle.open(made.folder, every_target=False)
    with pytest.raises(BundleError, match=r"packed/layers\.1\.safetensors: was changed"):
        late.target_folder("packed")
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"packed/layers\.1\.safetensors: \d+ bytes"):
        Bundle.open(made.folder)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The packed target of a tiny model whose head is tied."""
    made = convert(write(tmp_path / "in", tiny_architecture()), tmp_path / "b", plan())
    return made.target_folder("packed")


def rewritten(path: Path, change: dict[str, npt.NDArray[np.generic] | None]) -> None:
    """Write a file again with some tensors changed, or left out where None."""
    with SafetensorsFile(path) as file:
        tensors = {name: file.read_raw(name) for name in file.entries}
    for name, values in change.items():
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = values
    write_safetensors(path, tensors)


def forms(path: Path, **change: object) -> npt.NDArray[np.generic]:
    with SafetensorsFile(path) as file:
        body = json.loads(file.read_raw(FORMS).tobytes())
    return np.frombuffer(json.dumps(body | change).encode(), np.uint8)


BYTE = np.zeros(1, np.uint8)
WRONG: dict[str, dict[str, npt.NDArray[np.generic] | None]] = {
    r"has no tensor 'layers\.0\.q:values'": {"layers.0.q:values": None},
    r"has no tensor 'layers\.0\.attention_norm'": {"layers.0.attention_norm": None},
    r"layers\.0\.mlp_norm: F32 \(4,\): the architecture asks for F32 \(128,\)": {
        "layers.0.mlp_norm": np.zeros(4, np.float32)
    },
    r"layers\.0\.k:scales: F32 \(64, 3\): the architecture asks for F16 or F32 \(64, 4\)": {
        "layers.0.k:scales": np.zeros((64, 3), np.float32)
    },
    r"layers\.7\.q:values: is no part of the architecture": {"layers.7.q:values": BYTE},
    r"has no tensor ':forms' of bytes": {FORMS: None},
    r":forms: is not JSON": {FORMS: BYTE},
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_file_that_does_not_fit_is_refused_by_name(problem: str, target: Path) -> None:
    rewritten(target / "layers.0.safetensors", WRONG[problem])
    with pytest.raises(BundleError, match=r"packed/layers\.0\.safetensors: " + problem):
        PackedWeights(target, tiny_architecture())


def test_another_format_is_refused(target: Path) -> None:
    path = target / "embed.safetensors"
    rewritten(path, {FORMS: forms(path, format=2)})
    with pytest.raises(BundleError, match=r"embed\.safetensors: format = 2: this release reads 1"):
        PackedWeights(target, tiny_architecture())


def test_numbers_that_are_none_are_refused(target: Path) -> None:
    scales = np.full((128, 4), np.nan, np.float32)
    rewritten(target / "layers.0.safetensors", {"layers.0.q:scales": scales})
    weights = PackedWeights(target, tiny_architecture())
    with pytest.raises(BundleError, match=r"packed: layers\.0\.q: holds numbers that are not fin"):
        weights.linear("layers.0.q")


def test_files_of_another_architecture_are_refused(target: Path) -> None:
    arch = tiny_architecture()
    for other, problem in (
        (replace(arch, layers=1), r"packed/layers\.1\.safetensors: is no block"),
        (replace(arch, layers=3), r"packed/layers\.2\.safetensors: .*cannot be read"),
        (replace(arch, tied_head=False), r"final\.safetensors: has no tensor 'head:weight'"),
        (replace(arch, kv_heads=1), r"layers\.0\.k:"),
        (replace(arch, inner=224), r"layers\.0\.\w+:"),
    ):
        with pytest.raises(BundleError, match=problem):
            PackedWeights(target, other)


def test_a_recipe_that_looks_at_data_gives_what_the_others_get(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", tiny_architecture())
    bundle = convert(folder, tmp_path / "b", plan(load_recipe("balanced"), ("onnx", "packed")))
    executor = TorchExecutor(
        bundle.manifest.decoder, opened(tmp_path / "b"), TorchSettings(slots=1, context_tokens=64)
    )
    row = Row(tokens=PROMPT, past=0, slot=0, logits=LOGITS)
    packed = executor.execute(ExecutorStep(rows=(row,))).logits
    np.testing.assert_allclose(device_logits(bundle, "onnx"), packed, atol=5e-5)
