"""Everything an architecture may ask for, in OpenVINO graphs, against the torch reference.

Every graph goes through the real executor: chunks, mixed batches, decode steps, shared prefixes
and rewinds, on texts longer than any window. Arithmetic is exact, so the tolerance is rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from everylogit import reference_logits
from openvinomodels import SETTINGS, Packing, export, kernels
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.openvino.ops import export_openvino
from tidegate.edge.executors.openvino import OpenVinoExecutor
from tidegate.edge.executors.openvino_model import KvPrecision
from tidegate.engine.executor import Blocks, ExecutorStep, Row, Tokens
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture, Experts, LayerKind
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, PackedLinear
from tidegate.model.roles import roles
from tidegate.model.rope import Rope

PLAIN = tiny_architecture()
SINGLE = replace(PLAIN, layers=1)
"""For one feature at a time, as every layer takes time to compile; `TOGETHER` has more."""

ROPE = PLAIN.kinds[0].rope
PARTIAL = Rope.plain(10000.0, 16)
STRETCHED = replace(PARTIAL, magnitude=1.19)
SLOW = Rope.plain(1e6, 32)
EXPERTS = Experts(count=8, chosen=3, inner=48, normalised=True)
TOLERANCE = 2e-5
"""Share of the largest logit; measured are 2e-6."""

PACKED = Packing(group_size=32, symmetric=False)


def of(kind: LayerKind, **changes: object) -> Architecture:
    """The plain architecture with layers of `kind`."""
    return replace(PLAIN, kinds=(kind,), **changes)  # type: ignore[arg-type]


def alone(kind: LayerKind, **changes: object) -> Architecture:
    """A single layer of `kind`."""
    return replace(of(kind, **changes), layers=1)


ALONE = {
    "a window of one": alone(LayerKind(rope=ROPE, window=1)),
    "a window within a block": alone(LayerKind(rope=ROPE, window=7)),
    "a window of a block": alone(LayerKind(rope=ROPE, window=32)),
    "a window across blocks": alone(LayerKind(rope=ROPE, window=40)),
    "no rotation": alone(LayerKind(rope=None)),
    "partial rotation": alone(LayerKind(rope=PARTIAL)),
    "a rotation's magnitude": alone(LayerKind(rope=STRETCHED)),
    "a norm of every head": replace(SINGLE, qk_norm="head"),
    "a norm of the row": replace(SINGLE, qk_norm="row"),
    "clipped": replace(SINGLE, qkv_clip=0.3),
    "multipliers": replace(SINGLE, embed_scale=3.0, residual_scale=0.5, head_scale=0.3),
    "another attention scale": replace(SINGLE, attention_scale=0.05),
    "capped logits": replace(SINGLE, head_softcap=3.0),
    "capped scores": replace(SINGLE, attention_softcap=2.0),
    "capped scores in a window": alone(LayerKind(rope=ROPE, window=9), attention_softcap=2.0),
    "norms behind": replace(SINGLE, norm_before=False, norm_after=True),
    "four norms": replace(SINGLE, norm_after=True),
    "relu": replace(SINGLE, activation="relu"),
    "biases": replace(SINGLE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "one key head for sixteen": replace(SINGLE, heads=16, kv_heads=1),
    "a key head for each": replace(SINGLE, kv_heads=4),
    "experts": alone(LayerKind(rope=ROPE, experts=EXPERTS)),
    "experts of other weights": alone(
        LayerKind(rope=ROPE, experts=replace(EXPERTS, normalised=False, inner=40))
    ),
    "one expert of many": alone(
        LayerKind(rope=ROPE, experts=Experts(count=17, chosen=1, inner=16, normalised=True))
    ),
}

TOGETHER = {
    "gemma3": replace(
        PLAIN,
        layers=3,
        kinds=(LayerKind(rope=ROPE, window=9), LayerKind(rope=SLOW)),
        pattern=(0, 1, 0),
        qk_norm="head",
        norm_after=True,
        embed_scale=11.3,
        attention_scale=0.2,
        activation="gelu_tanh",
    ),
    "gemma2": replace(
        PLAIN,
        layers=3,
        heads=6,
        kinds=(LayerKind(rope=ROPE, window=9), LayerKind(rope=ROPE)),
        pattern=(0, 1, 0),
        norm_after=True,
        embed_scale=11.3,
        attention_scale=0.2,
        attention_softcap=3.0,
        head_softcap=4.0,
        activation="gelu_tanh",
    ),
    "granite": replace(
        PLAIN, embed_scale=12.0, residual_scale=0.22, head_scale=1 / 6, attention_scale=0.0156
    ),
    "olmo2": replace(PLAIN, norm_before=False, norm_after=True, qk_norm="row"),
    "smollm3": replace(
        PLAIN, layers=3, kinds=(LayerKind(rope=ROPE), LayerKind(rope=None)), pattern=(0, 0, 1)
    ),
    "phi3": of(LayerKind(rope=STRETCHED, window=33), tied_head=False),
    "mixtral": of(LayerKind(rope=ROPE, window=21, experts=EXPERTS), tied_head=False),
    "olmoe": of(
        LayerKind(rope=ROPE, experts=replace(EXPERTS, normalised=False)),
        qk_norm="row",
        qkv_clip=0.5,
        tied_head=False,
    ),
    "mixed layers": replace(
        PLAIN,
        layers=3,
        kinds=(
            LayerKind(rope=None, experts=EXPERTS),
            LayerKind(rope=PARTIAL, window=3),
            LayerKind(rope=STRETCHED, window=50),
        ),
        pattern=(1, 0, 2),
        qk_norm="head",
        head_softcap=5.0,
    ),
}

HEAD_SIZES = (4, 12, 20, 36, 40, 64, 80, 96, 100, 128, 256)


@pytest.mark.parametrize("name", ALONE)
def test_each_feature_alone_gives_the_reference(name: str, tmp_path: Path) -> None:
    check(ALONE[name], PACKED, tmp_path)


@pytest.mark.parametrize("name", TOGETHER)
def test_features_together_give_the_reference(name: str, tmp_path: Path) -> None:
    check(TOGETHER[name], PACKED, tmp_path)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_heads_of_any_size_give_the_reference(head_size: int, tmp_path: Path) -> None:
    rope = Rope.plain(10000.0, head_size)
    kind, scale = LayerKind(rope=rope, window=37), head_size**-0.5
    check(alone(kind, head_size=head_size, attention_scale=scale), PACKED, tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "olmoe", "mixed layers"])
def test_dense_layers_among_packed_ones_give_the_reference(name: str, tmp_path: Path) -> None:
    def pack(role: str, linear: DenseLinear) -> Linear:
        dense = role.endswith((".k", ".gate", "router")) or role.startswith("layers.1.")
        return linear if dense else PACKED(role, linear)

    check(TOGETHER[name], pack, tmp_path)


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_low_rank_layers_beside_others_give_the_reference(
    name: str, tied_head: bool, tmp_path: Path
) -> None:
    pack = low_rank("q", "o", "up", "router", "embed", "head")
    check(replace(TOGETHER[name], tied_head=tied_head), pack, tmp_path)


def test_low_rank_layers_of_padded_inputs_give_the_reference(tmp_path: Path) -> None:
    check(tiny_architecture(width=100), low_rank("v", "gate", "down", "embed"), tmp_path)


@pytest.mark.parametrize("qk_norm", ["head", "row"])
def test_norms_of_query_and_key_are_single_kernels(qk_norm: str, tmp_path: Path) -> None:
    arch = replace(PLAIN, qk_norm="head" if qk_norm == "head" else "row", norm_after=True)
    export(arch, tmp_path, PACKED)
    found = by_kind(arch, tmp_path)
    assert found["RMS"] == 6 * arch.layers + 1
    assert found["RoPE"] == 2 * arch.layers


def test_a_partial_rotation_is_a_single_kernel(tmp_path: Path) -> None:
    arch = ALONE["a rotation's magnitude"]
    export(arch, tmp_path, PACKED)
    assert by_kind(arch, tmp_path)["RoPE"] == 2 * arch.layers


def test_weights_of_experts_stay_compressed(tmp_path: Path) -> None:
    arch = ALONE["experts"]
    export(arch, tmp_path, PACKED)
    found = kernels(tmp_path, arch)
    products = {kind: count for kind, count in found.items() if kind[0] in ("FullyConnected",)}
    # q, k, v; o; the router; gate and up of an expert; its down: and the head.
    expected = arch.layers * (3 + 2 * EXPERTS.count) + 1
    assert products == {("FullyConnected", "u4"): expected}
    assert "MatMul" not in by_kind(arch, tmp_path)


def test_low_rank_layers_stay_compressed(tmp_path: Path) -> None:
    export(PLAIN, tmp_path, low_rank("q", "up"))
    found = kernels(tmp_path, PLAIN)
    # q twice, k and v; o; gate; up twice; down: and the head.
    assert found["FullyConnected", "u4"] == 8 * PLAIN.layers + 1
    assert found["FullyConnected", "f32"] == 0


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_no_weight_is_stored_twice_nor_wider_than_packed(name: str, tmp_path: Path) -> None:
    arch = TOGETHER[name]
    weights = export(arch, tmp_path, PACKED)
    linear = [weights.linear(role) for role, of in roles(arch).items() if of.is_linear]
    packed = sum(weight.nbytes for weight in linear if isinstance(weight, PackedLinear))
    ropes = {kind.rope for kind in arch.kinds if kind.rope is not None}
    # 257 positions of cosines and sines; norms; up to 63 bytes to align each of three constants.
    tables = sum(257 * 4 * rope.size for rope in ropes)
    vectors = [weights.vector(role) for role, of in roles(arch).items() if not of.is_linear]
    rest = tables + sum(vector.nbytes + 64 for vector in vectors) + 192 * len(linear)
    small_bytes = 8192  # shapes, axes and other numbers of the graph
    assert packed <= (tmp_path / "model.bin").stat().st_size <= packed + rest + small_bytes


def test_experts_are_read_once_each_and_one_at_a_time(tmp_path: Path) -> None:
    arch = replace(ALONE["experts"], layers=1)
    asked: list[str] = []

    class Watched(RandomWeights):
        def linear(self, role: str) -> Linear:
            asked.append(role)
            return super().linear(role)

    export_openvino(arch, Watched(arch), tmp_path)
    parts = [role for role in asked if ".experts." in role]
    assert parts == [
        f"layers.0.experts.{number}.{part}"
        for number in range(EXPERTS.count)
        for part in ("gate", "up", "down")
    ]


@pytest.mark.parametrize("precision", [None, "f16", "f32"])
def test_capped_scores_are_near_the_reference_in_any_precision_they_can_be_read_in(
    precision: KvPrecision | None, tmp_path: Path
) -> None:
    """With float16 keys and values; the linear layers are dense, so nothing else is rounded."""
    arch = TOGETHER["gemma2"]
    weights = export(arch, tmp_path, Packing(bits=None))
    settings = replace(SETTINGS, exact=False, kv_precision=precision)
    executor = OpenVinoExecutor(tmp_path, arch, settings)
    request = Request(arch, weights, 1, 7, 23, 0, 12)
    for past, end in ((0, 50), (50, 51), (51, 100)):
        row, expected = request(past, end)
        logits = executor.execute(ExecutorStep(rows=(row,))).logits[0]
        # Half of a unit in float16's last place, over 100 keys and three layers.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.01)
    bytes_per_value = 4 if precision == "f32" else 2
    assert executor.kv.bytes_per_token == arch.kv_values_per_token * bytes_per_value


@pytest.mark.parametrize("precision", ["u8", "u4"])
def test_a_cache_that_capped_scores_cannot_be_read_from_is_refused(
    precision: KvPrecision, tmp_path: Path
) -> None:
    arch = TOGETHER["gemma2"]
    export(arch, tmp_path, PACKED)
    with pytest.raises(ConfigError, match=f"kv_precision = '{precision}': must be f16 or f32"):
        OpenVinoExecutor(tmp_path, arch, replace(SETTINGS, exact=False, kv_precision=precision))


def low_rank(*kinds: str) -> Callable[[str, DenseLinear], Linear]:
    """Packs, and makes those layers a product of rank 20, which does not fill its last group."""
    rank, rng = 20, np.random.default_rng(3)

    def pack(role: str, linear: DenseLinear) -> Linear:
        if role.rsplit(".", 1)[-1] not in kinds:
            return PACKED(role, linear)
        first, second = (
            (rng.standard_normal(shape) * 0.15**0.5 / rank**0.25).astype(np.float32)
            for shape in ((rank, linear.inputs), (linear.outputs, rank))
        )
        return LowRankLinear(
            first=packed_part(DenseLinear(weight=first)),
            second=packed_part(DenseLinear(weight=second, bias=linear.bias)),
        )

    return pack


def packed_part(linear: DenseLinear) -> PackedLinear:
    packed = PACKED("", linear)
    assert isinstance(packed, PackedLinear)
    return packed


def by_kind(arch: Architecture, folder: Path) -> Counter[str]:
    """How many kernels of each kind the compiled graph has."""
    found: Counter[str] = Counter()
    for (kind, _), count in kernels(folder, arch).items():
        found[kind] += count
    return found


def check(arch: Architecture, pack: Callable[[str, DenseLinear], Linear], folder: Path) -> None:
    """Run two requests in steps of every shape and compare every row with the reference."""
    weights = export(arch, folder, pack)
    executor = OpenVinoExecutor(folder, arch, SETTINGS)
    first, second = Request(arch, weights, 1, 7, 23, 0, 12), Request(arch, weights, 2, 5, 2, 9, 1)
    # The third shares the first one's first block and goes on in its own way.
    third = Request(arch, weights, 3, 7, 14, 3, 6, prefix=first.tokens[:32])
    for step in (
        [first(0, 41)],
        [first(41, 42), second(0, 30)],
        [first(42, 64), second(30, 31)],
        [first(64, 65), third(32, 70), second(31, 50)],
        [second(50, 51), first(65, 66)],
        [third(70, 71)],
        [first(66, 100), second(51, 80)],
        # Taken back, as after a rejected guess, and computed again.
        [first(50, 60), third(66, 90)],
        [first(60, 100)],
        [second(80, 100)],
    ):
        logits = executor.execute(ExecutorStep(rows=tuple(row for row, _ in step))).logits
        expected = np.stack([wanted for _, wanted in step])
        np.testing.assert_allclose(
            logits, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max())
        )
    executor.close()


class Request:
    """A text of 100 tokens in blocks of its own, and the reference's logits after each."""

    def __init__(
        self,
        arch: Architecture,
        weights: RandomWeights,
        seed: int,
        *blocks: int,
        prefix: Tokens | None = None,
    ) -> None:
        self.tokens = np.random.default_rng(seed).integers(0, arch.vocab, 100)
        if prefix is not None:
            self.tokens[: len(prefix)] = prefix
        self._blocks: Blocks = np.array(blocks, np.int32)
        self._expected = reference_logits(arch, weights, self.tokens)

    def __call__(self, past: int, end: int) -> tuple[Row, np.ndarray]:
        """A row of the tokens from `past` to `end`, and the logits it should give."""
        row = Row(tokens=self.tokens[past:end], past=past, blocks=self._blocks)
        return row, self._expected[end - 1]
