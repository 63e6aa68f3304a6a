"""Everything an `Architecture` may ask for, on ONNX Runtime against the torch reference.

Steps are longer than the windows, in one pass, in chunks, and in ragged batches of single tokens,
with rewinds and copied prefixes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tinymodel import RandomWeights, tiny_architecture
from torchreference import TorchReference

from tidegate.converters.onnx.attention import ROTATION_BLOCK, head_layout, rotation
from tidegate.converters.onnx.ops import DATA, EXACT_GRAPH, export_onnx
from tidegate.converters.rounding.rtn import quantise
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.errors import ConversionError
from tidegate.model.architecture import Architecture, Experts, LayerKind
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, PackedLinear
from tidegate.model.roles import roles
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights

TOLERANCE = 1e-4
"""On logits of scale 6; measured 4e-5 at most."""

SLOTS, CONTEXT = 3, 80
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
LLAMA = tiny_architecture()
ROPE = Rope.plain(10000.0, 32)
SLOW_ROPE = Rope.plain(1000000.0, 32)


def changed(**changes: object) -> Architecture:
    """The tiny Llama with some things changed."""
    return dataclasses.replace(LLAMA, **changes)  # type: ignore[arg-type]


def alike(rope: Rope | None = ROPE, window: int | None = None) -> tuple[LayerKind, ...]:
    return (LayerKind(rope=rope, window=window),)


def heads_of(size: int, rotated: int) -> Architecture:
    """Heads of `size` values of which the first are rotated."""
    rope = Rope.plain(10000.0, rotated) if rotated else None
    return changed(head_size=size, attention_scale=size**-0.5, kinds=alike(rope))


WINDOWS_IN_TURN = {
    "layers": 3,
    "kinds": (LayerKind(rope=ROPE, window=7), LayerKind(rope=SLOW_ROPE)),
    "pattern": (0, 1, 0),
}

FEATURES = {
    "window": changed(kinds=alike(window=5)),
    "window of the token alone": changed(kinds=alike(window=1)),
    "window longer than any text": changed(kinds=alike(window=70)),
    "windows in turn": changed(**WINDOWS_IN_TURN),
    "no rotation": changed(kinds=alike(None)),
    "magnitude": changed(kinds=alike(dataclasses.replace(ROPE, magnitude=1.3))),
    "partial rotation": changed(kinds=alike(Rope.plain(10000.0, 16))),
    "attention softcap": changed(attention_softcap=2.0),
    "attention softcap in a window": changed(attention_softcap=2.0, kinds=alike(window=6)),
    "norm of every head": changed(qk_norm="head"),
    "norm of the row": changed(qk_norm="row"),
    "clip": changed(qkv_clip=0.8),
    "clip before a norm": changed(qkv_clip=0.8, qk_norm="head"),
    "embed scale": changed(embed_scale=11.3),
    "residual scale": changed(residual_scale=0.22),
    "head scale": changed(head_scale=0.125),
    "head softcap": changed(head_softcap=3.0),
    "head scale and softcap": changed(head_softcap=3.0, head_scale=0.3, tied_head=False),
    "embed and residual scale": changed(embed_scale=12.0, residual_scale=0.22),
    "norm after": changed(norm_after=True),
    "norm after alone": changed(norm_after=True, norm_before=False),
    "no norm in a layer, residual scale": changed(norm_before=False, residual_scale=0.3),
    "relu": changed(activation="relu"),
    "attention scale": changed(attention_scale=0.05),
    "one key/value head": changed(kv_heads=1),
    "heads that do not fill the width": changed(heads=2, head_size=48),
}


def with_experts(count: int, chosen: int, *, normalised: bool = True) -> Architecture:
    experts = Experts(count=count, chosen=chosen, inner=64, normalised=normalised)
    return changed(kinds=(LayerKind(rope=ROPE, experts=experts),))


EXPERTS = {
    "two of six": with_experts(6, 2),
    "two of six, as they are": with_experts(6, 2, normalised=False),
    "one": with_experts(4, 1),
    "one, as it is": with_experts(4, 1, normalised=False),
    "all": with_experts(3, 3, normalised=False),
    "more than tokens": with_experts(40, 3),
    "gelu": dataclasses.replace(with_experts(5, 2), activation="gelu"),
    "relu": dataclasses.replace(with_experts(5, 2), activation="relu"),
}

MODELS = {
    "gemma2": changed(
        **WINDOWS_IN_TURN,
        activation="gelu_tanh",
        attention_softcap=5.0,
        head_softcap=3.0,
        norm_after=True,
        embed_scale=128**0.5,
        attention_scale=24**-0.5,
    ),
    "gemma3": changed(
        **WINDOWS_IN_TURN,
        activation="gelu_tanh",
        norm_after=True,
        qk_norm="head",
        embed_scale=128**0.5,
    ),
    "granite": changed(
        embed_scale=12.0, residual_scale=0.22, head_scale=1 / 8, attention_scale=1 / 64
    ),
    "olmo2": changed(norm_before=False, norm_after=True, qk_norm="row", tied_head=False),
    "smollm3": changed(
        layers=4, kinds=(LayerKind(rope=ROPE), LayerKind(rope=None)), pattern=(0, 0, 0, 1)
    ),
    "phi3": changed(
        heads=2,
        head_size=96,
        kinds=alike(dataclasses.replace(Rope.plain(10000.0, 72), magnitude=1.19), window=9),
    ),
    "phi4-mini": changed(
        head_size=64,
        kinds=alike(dataclasses.replace(Rope.plain(10000.0, 48), magnitude=1.19)),
    ),
    "qwen2": changed(qkv_bias=True),
    "mixtral": dataclasses.replace(with_experts(8, 2), tied_head=False),
    "olmoe": dataclasses.replace(
        with_experts(16, 4, normalised=False), qk_norm="row", qkv_clip=1.5
    ),
    "granite with experts": dataclasses.replace(
        with_experts(6, 2), embed_scale=12.0, residual_scale=0.22, head_scale=1 / 6
    ),
    "some layers with experts": dataclasses.replace(
        with_experts(6, 2),
        kinds=(*with_experts(6, 2).kinds, LayerKind(rope=ROPE, window=6)),
        pattern=(1, 0, 1, 0),
        layers=4,
        qk_norm="head",
        norm_after=True,
    ),
}


def steps(vocab: int) -> list[ExecutorStep]:
    """A long prompt at once, another in chunks, decoding of all; a copy and a rewind."""
    rng = np.random.default_rng(5)

    def row(slot: int, past: int, count: int) -> Row:
        return Row(tokens=rng.integers(0, vocab, count), past=past, slot=slot)

    return [
        ExecutorStep(rows=(row(0, 0, 23), row(2, 0, 1))),
        ExecutorStep(rows=(row(1, 0, 9), row(0, 23, 1), row(2, 1, 1))),
        ExecutorStep(rows=(row(1, 9, 2), row(2, 2, 4))),
        ExecutorStep(rows=(row(1, 11, 17),)),
        ExecutorStep(rows=(row(2, 6, 1), row(0, 24, 1), row(1, 28, 1))),
        ExecutorStep(rows=(row(2, 7, 1), row(0, 25, 1), row(1, 29, 1))),
        # The windows of what follows reach back before the rewind and into the copy.
        ExecutorStep(rows=(row(2, 20, 1), row(0, 12, 1)), copies=((1, 2, 20),)),
        ExecutorStep(rows=(row(2, 21, 5), row(0, 13, 3), row(1, 30, 1))),
        ExecutorStep(rows=(row(0, 16, 1), row(1, 31, 1))),
        ExecutorStep(rows=(row(1, 32, 40),)),
    ]


def assert_equal_to_reference(arch: Architecture, weights: Weights, folder: Path) -> None:
    export_onnx(arch, weights, folder)
    settings = OnnxSettings(slots=SLOTS, context_tokens=CONTEXT, step_tokens=64, threads=1)
    executor = OnnxExecutor(folder, arch, dataclasses.replace(settings, exact=True))
    reference = TorchReference(arch, weights, slots=SLOTS, tokens=CONTEXT)
    for step in steps(arch.vocab):
        logits = executor.execute(step).logits
        np.testing.assert_allclose(logits, reference.execute(step), atol=TOLERANCE, rtol=0)


def in_four_bits(_: str, dense: DenseLinear) -> PackedLinear:
    return quantise(dense, bits=4, group_size=32, symmetric=False)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_gives_the_reference_logits(tmp_path: Path, feature: str) -> None:
    arch = FEATURES[feature]
    assert_equal_to_reference(arch, RandomWeights(arch, quantise=in_four_bits), tmp_path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_features_of_a_model_give_the_reference_logits(
    tmp_path: Path, model: str, packed: bool
) -> None:
    arch = MODELS[model]
    weights = RandomWeights(arch, quantise=in_four_bits if packed else None)
    assert_equal_to_reference(arch, weights, tmp_path)


def low_rank(share: Callable[[str], bool], *, packed: bool) -> Callable[[str, DenseLinear], Linear]:
    """Turns the layers that `share` picks into products of rank 64."""

    def split(role: str, dense: DenseLinear) -> Linear:
        def stored(weight: DenseLinear) -> DenseLinear | PackedLinear:
            return in_four_bits(role, weight) if packed else weight

        if not share(role):
            return stored(dense)
        rng = np.random.default_rng(len(role))
        left, right = (
            (0.125 * rng.standard_normal(shape)).astype(np.float32)
            for shape in [(dense.outputs, 64), (64, dense.inputs)]
        )
        first, second = DenseLinear(weight=right), DenseLinear(weight=left, bias=dense.bias)
        return LowRankLinear(first=stored(first), second=stored(second))

    return split


FORMATS: dict[str, Callable[[str, DenseLinear], Linear] | None] = {
    "4 bits": in_four_bits,
    "8 bits": lambda _, dense: quantise(dense, bits=8, group_size=64, symmetric=True),
    "float32": None,
    "products": low_rank(lambda role: role.endswith(("gate", "3.up", "down")), packed=True),
    "each its own": lambda role, dense: (
        dense
        if role.endswith(("router", "1.up"))
        else quantise(dense, bits=8 if "down" in role else 4, group_size=32, symmetric=False)
    ),
}


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        *((kind, "4 bits") for kind in EXPERTS),
        *(("two of six", stored) for stored in FORMATS if stored != "4 bits"),
    ],
)
def test_experts_give_the_reference_logits(tmp_path: Path, kind: str, stored: str) -> None:
    weights = RandomWeights(EXPERTS[kind], quantise=FORMATS[stored])
    assert_equal_to_reference(EXPERTS[kind], weights, tmp_path)


class Counted(RandomWeights):
    """Notes the order in which weights are asked for, and how many are alive at a time."""

    asked: list[str]
    alive: int = 0
    most: int = 0

    def linear(self, role: str) -> Linear:
        self.__dict__.setdefault("asked", []).append(role)
        linear = dataclasses.replace(super().linear(role))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(linear, self._ended)
        return linear

    def _ended(self) -> None:
        self.alive -= 1


def test_experts_are_read_one_after_another_and_none_is_held(tmp_path: Path) -> None:
    arch = with_experts(12, 2)
    weights = Counted(arch, quantise=in_four_bits)
    export_onnx(arch, weights, tmp_path)
    expected = [role for role, shape in roles(arch).items() if shape.is_linear]
    assert weights.asked == [*expected, "embed"]
    # The router and one expert, or query, key and value; never two experts.
    assert weights.most <= 6


@pytest.mark.parametrize(
    ("size", "rotated"),
    [(32, 8), (32, 24), (32, 30), (40, 40), (24, 16), (10, 10), (6, 2), (20, 0), (100, 50)],
)
def test_heads_that_the_kernel_does_not_have_are_exact(
    tmp_path: Path, size: int, rotated: int
) -> None:
    arch = heads_of(size, rotated)
    assert_equal_to_reference(arch, RandomWeights(arch, quantise=in_four_bits), tmp_path)


@pytest.mark.parametrize(
    ("size", "rotated", "kept"),
    [(128, 128, 128), (64, 16, 64), (24, 0, 24), (96, 72, 96), (40, 40, 48), (120, 120, 128)],
)
def test_a_head_grows_no_more_than_to_the_next_size_that_the_kernel_has(
    size: int, rotated: int, kept: int
) -> None:
    rope = Rope.plain(10000.0, rotated) if rotated else None
    assert head_layout(size, rope).size == kept


def test_rotation_tables_come_in_blocks_and_are_filled_up_with_no_rotation() -> None:
    rope = dataclasses.replace(Rope.plain(10000.0, 12), magnitude=1.5)
    count = ROTATION_BLOCK + 3
    expected = rope.tables(np.arange(count))
    for blocks, table, idle in zip(rotation(rope, count, 8), expected, (1, 0), strict=True):
        assert [len(block) for block in blocks] == [ROTATION_BLOCK, 3]
        np.testing.assert_array_equal(np.concatenate(blocks)[:, :6], table.astype(np.float32))
        np.testing.assert_array_equal(np.concatenate(blocks)[:, 6:], idle)


def test_the_executor_counts_the_zeros_behind_a_head(tmp_path: Path) -> None:
    arch = changed(
        head_size=40,
        kinds=(LayerKind(rope=Rope.plain(10000.0, 40)), LayerKind(rope=None)),
        pattern=(0, 1),
    )
    export_onnx(arch, RandomWeights(arch), tmp_path)
    settings = OnnxSettings(slots=1, context_tokens=8, step_tokens=8, threads=1)
    # Keys and values of two heads: 48 floats in the rotated layer, 40 in the other.
    assert OnnxExecutor(tmp_path, arch, settings).kv.bytes_per_token == 2 * 2 * (48 + 40) * 4


def test_heads_that_cannot_share_keys_are_refused_by_name(tmp_path: Path) -> None:
    arch = changed(heads=4, kv_heads=3)
    with pytest.raises(ConversionError, match="kv_heads = 3: must divide the 4 heads"):
        export_onnx(arch, RandomWeights(arch), tmp_path)


@pytest.mark.parametrize("model", ["gemma2", "gemma3", "granite", "olmo2", "olmoe"])
def test_int8_activations_move_the_logits_little(tmp_path: Path, model: str) -> None:
    arch = MODELS[model]
    weights = RandomWeights(arch, quantise=in_four_bits)
    export_onnx(arch, weights, tmp_path)
    settings = OnnxSettings(slots=SLOTS, context_tokens=CONTEXT, step_tokens=64, threads=1)
    executor = OnnxExecutor(tmp_path, arch, settings)
    reference = TorchReference(arch, weights, slots=SLOTS, tokens=CONTEXT)
    found, expected = (
        np.concatenate(parts)
        for parts in zip(
            *((executor.execute(s).logits, reference.execute(s)) for s in steps(arch.vocab)),
            strict=True,
        )
    )
    # Measured: 0.007 to 0.034.
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.1 * expected.std()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("parts", ["q k v o gate up down", "k", "q v down", "gate head", "up o"])
def test_products_of_two_small_linears_are_exact(tmp_path: Path, parts: str, packed: bool) -> None:
    arch = changed(tied_head=False, qkv_bias=True, o_bias=True)

    def share(role: str) -> bool:
        return role.rsplit(".", 1)[-1] in parts.split()

    weights = RandomWeights(arch, quantise=low_rank(share, packed=packed))
    assert_equal_to_reference(arch, weights, tmp_path)


def test_a_table_that_is_a_product_is_refused_by_name(tmp_path: Path) -> None:
    weights = RandomWeights(LLAMA, quantise=low_rank(lambda role: role == "embed", packed=False))
    with pytest.raises(ConversionError, match=r"embed: .*product"):
        export_onnx(LLAMA, weights, tmp_path)


def kinds(folder: Path) -> Counter[str]:
    model = onnx.load(folder / EXACT_GRAPH, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def test_of_all_the_scales_of_granite_two_multiplications_are_left(tmp_path: Path) -> None:
    arch = MODELS["granite"]
    export_onnx(arch, RandomWeights(arch, quantise=in_four_bits), tmp_path)
    # One of the embedding, one of the logits, and the gate of each MLP.
    assert kinds(tmp_path)["Mul"] == 2 + arch.layers
    assert kinds(tmp_path)["SkipSimplifiedLayerNormalization"] == 2 * arch.layers


def test_norms_before_and_after_still_fuse_with_the_residual_sum(tmp_path: Path) -> None:
    arch = MODELS["gemma2"]
    export_onnx(arch, RandomWeights(arch, quantise=in_four_bits), tmp_path)
    found = kinds(tmp_path)
    assert found["SkipSimplifiedLayerNormalization"] == 2 * arch.layers
    assert found["SimplifiedLayerNormalization"] == 1 + 2 * arch.layers
    assert "Add" not in found


def test_a_clip_of_merged_projections_is_one_and_leaves_them_merged(tmp_path: Path) -> None:
    arch = changed(qkv_clip=8.0)
    export_onnx(arch, RandomWeights(arch, quantise=in_four_bits), tmp_path)
    assert kinds(tmp_path)["Clip"] == arch.layers
    assert "Split" not in kinds(tmp_path)


def stored_bytes(linear: Linear) -> int:
    """What a layer takes in the data file: float16 scales and zeros packed row by row."""
    if isinstance(linear, LowRankLinear):
        return stored_bytes(linear.first) + stored_bytes(linear.second)
    if isinstance(linear, DenseLinear):
        return linear.weight.nbytes
    zeros = linear.packed_zeros()
    return linear.values.nbytes + linear.scales.nbytes // 2 + (0 if zeros is None else zeros.nbytes)


@pytest.mark.parametrize("model", ["gemma3", "olmoe"])
@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_stored_twice(tmp_path: Path, packed: bool, tied_head: bool, model: str) -> None:
    arch = dataclasses.replace(MODELS[model], width=512, inner=1024, tied_head=tied_head)
    weights = RandomWeights(arch, quantise=in_four_bits if packed else None)
    export_onnx(arch, weights, tmp_path)
    shapes = roles(arch)
    names = [name for name, role in shapes.items() if role.is_linear]
    linears = sum(stored_bytes(weights.linear(name)) for name in names)
    norms = sum(4 * role.shape[0] for role in shapes.values() if not role.is_linear)
    # Each rotation has cosines and sines of half a head for every position.
    rotations = len({kind.rope for kind in arch.kinds})
    tables = rotations * arch.context * arch.head_size * 4
    # A tensor begins on a page, of which half is lost on average; small ones are in the graph.
    pages = 4096 * (3 * len(names) + 20) // 2
    size = (tmp_path / DATA).stat().st_size
    assert 0.98 * (linears + tables) <= size <= linears + tables + norms + pages
    assert pages < 0.4 * linears
