"""The ONNX lowering against the torch reference on the same integers, and what the files hold."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from tinymodel import RandomWeights, tiny_architecture
from torchreference import TorchReference

from tidegate.converters.onnx.graph import OnnxGraph
from tidegate.converters.onnx.linear import FLOAT_ACTIVATIONS, regrouped
from tidegate.converters.onnx.ops import DATA, EXACT_GRAPH, GRAPH, OnnxOps, export_onnx
from tidegate.converters.rounding.rtn import quantise
from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.errors import ConversionError
from tidegate.model.architecture import Activation, Architecture, AttentionSpec
from tidegate.model.packed import Array, Bits, DenseLinear, Linear, PackedLinear
from tidegate.model.walk import Weights

TOLERANCE = 1e-4
"""On logits of scale 6; the measured difference is 2e-5."""

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

Quantise = Callable[[str, DenseLinear], Linear]


def packed(bits: Bits, group_size: int | None, *, symmetric: bool) -> Quantise:
    return lambda role, dense: quantise(
        dense, bits=bits, group_size=group_size, symmetric=symmetric
    )


def plan(arch: Architecture) -> list[ExecutorStep]:
    """A chunked prefill beside decode rows of other lengths, over three slots."""
    rng = np.random.default_rng(5)

    def row(slot: int, past: int, count: int) -> Row:
        return Row(tokens=rng.integers(0, arch.vocab, count), past=past, slot=slot)

    return [
        ExecutorStep(rows=(row(0, 0, 7), row(2, 0, 3))),
        ExecutorStep(rows=(row(1, 0, 11), row(0, 7, 1), row(2, 3, 1))),
        ExecutorStep(rows=(row(1, 11, 6),)),
        ExecutorStep(rows=(row(2, 4, 1), row(0, 8, 1), row(1, 17, 1))),
    ]


def assert_equal_to_reference(arch: Architecture, weights: Weights, folder: Path) -> None:
    export_onnx(arch, weights, folder)
    settings = OnnxSettings(slots=3, context_tokens=32, step_tokens=32, threads=1, exact=True)
    executor = OnnxExecutor(folder, arch, settings)
    reference = TorchReference(arch, weights, slots=3, tokens=32)
    for step in plan(arch):
        logits = executor.execute(step).logits
        np.testing.assert_allclose(logits, reference.execute(step), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_of_every_format_give_the_reference_logits(
    tmp_path: Path, bits: Bits, group_size: int | None, symmetric: bool
) -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch, quantise=packed(bits, group_size, symmetric=symmetric))
    assert_equal_to_reference(arch, weights, tmp_path)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_of_its_own_and_inputs_that_leave_a_group_half_full_are_exact(
    tmp_path: Path, bits: Bits, symmetric: bool
) -> None:
    arch = dataclasses.replace(tiny_architecture(tied_head=False, width=144), inner=200)
    weights = RandomWeights(arch, quantise=packed(bits, 64, symmetric=symmetric))
    assert_equal_to_reference(arch, weights, tmp_path)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_table_that_leaves_a_group_half_full_is_exact(
    tmp_path: Path, bits: Bits, symmetric: bool
) -> None:
    arch = tiny_architecture(width=144)
    weights = RandomWeights(arch, quantise=packed(bits, 64, symmetric=symmetric))
    assert_equal_to_reference(arch, weights, tmp_path)


def test_a_tied_table_small_enough_to_stay_in_the_graph_is_exact(tmp_path: Path) -> None:
    arch = dataclasses.replace(tiny_architecture(width=32), vocab=8)
    weights = RandomWeights(arch, quantise=packed(4, 32, symmetric=False))
    assert_equal_to_reference(arch, weights, tmp_path)


@pytest.mark.parametrize("tied_head", [True, False])
def test_dense_weights_give_the_reference_logits(tmp_path: Path, tied_head: bool) -> None:
    arch = tiny_architecture(tied_head=tied_head)
    assert_equal_to_reference(arch, RandomWeights(arch), tmp_path)


def test_a_role_in_another_format_than_its_neighbours_is_exact(tmp_path: Path) -> None:
    def mixed(role: str, dense: DenseLinear) -> Linear:
        kind = role.rsplit(".", 1)[-1]
        if kind in ("k", "up", "embed"):
            return dense
        return quantise(dense, bits=8 if kind == "q" else 4, group_size=32, symmetric=kind == "v")

    arch = tiny_architecture(tied_head=False)
    assert_equal_to_reference(arch, RandomWeights(arch, quantise=mixed), tmp_path)


@pytest.mark.parametrize("dense", [True, False])
def test_biases_are_added_and_a_missing_one_of_a_merged_group_counts_as_zero(
    tmp_path: Path, dense: bool
) -> None:
    rng = np.random.default_rng(3)

    def biased(role: str, linear: DenseLinear) -> Linear:
        if role.rsplit(".", 1)[-1] in ("q", "v", "up", "down"):
            bias = rng.standard_normal(linear.outputs).astype(np.float32)
            linear = dataclasses.replace(linear, bias=bias)
        if dense:
            return linear
        return quantise(linear, bits=4, group_size=32, symmetric="0" in role)

    arch = dataclasses.replace(tiny_architecture(), qkv_bias=True, o_bias=True, mlp_bias=True)
    assert_equal_to_reference(arch, RandomWeights(arch, quantise=biased), tmp_path)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_other_activations_are_exact(tmp_path: Path, activation: Activation) -> None:
    arch = dataclasses.replace(tiny_architecture(), activation=activation)
    assert_equal_to_reference(arch, RandomWeights(arch), tmp_path)


class Unrotated(Architecture):
    """A Llama without position embedding in its second layer."""

    def attention(self, layer: int) -> AttentionSpec:
        spec = Architecture.attention(self, layer)
        return dataclasses.replace(spec, rope=None, scale=0.1) if layer == 1 else spec


def test_a_layer_without_rotation_and_with_its_own_scale_is_exact(tmp_path: Path) -> None:
    tiny = tiny_architecture()
    arch = Unrotated(**{f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny)})
    assert_equal_to_reference(arch, RandomWeights(arch), tmp_path)


def test_merged_linears_can_be_used_apart_and_a_sum_without_a_norm(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=0, tied_head=False)
    rng = np.random.default_rng(0)

    def linear(outputs: int, inputs: int) -> PackedLinear:
        weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
        return quantise(DenseLinear(weight=weight), bits=4, group_size=32, symmetric=True)

    table, left, right = (linear(n, arch.width) for n in (arch.vocab, arch.width, arch.width))
    with (tmp_path / DATA).open("wb") as data:
        graph = OnnxGraph(data, DATA)
        ops = OnnxOps(arch, graph)
        one, other = ops.linears(ops.embed(table), [left, right])
        both = ops.add(one, other)
        ops.finish(ops.head(ops.gather_rows(ops.add(both, both)), table))
    graph.save(tmp_path / GRAPH, accuracy_level=FLOAT_ACTIVATIONS)
    session = onnxruntime.InferenceSession(str(tmp_path / GRAPH))
    feed = {
        "input_ids": np.array([[3, 4]]),
        "sampled": np.array([1, 0]),
        "seqlens_k": np.array([1], np.int32),
        "total_sequence_length": np.array(2, np.int32),
    }
    (logits,) = session.run(["logits"], feed)
    weight = table.dequantise()
    expected = 2 * weight[[4, 3]] @ (left.dequantise() + right.dequantise()).T @ weight.T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-2)


def read(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_graph_is_made_of_the_fused_operators(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=3)
    export_onnx(arch, RandomWeights(arch, quantise=packed(4, 32, symmetric=False)), tmp_path)
    assert kinds(read(tmp_path / GRAPH)) == {
        "GatherBlockQuantized": 1,
        "SimplifiedLayerNormalization": 1,
        "SkipSimplifiedLayerNormalization": 6,
        "GroupQueryAttention": 3,
        # qkv, o, gate, up and down of every layer, and the head.
        "MatMulNBits": 16,
        # Float16 scales of those and of the table, widened once when the graph is loaded.
        "Cast": 16,
        "QuickGelu": 3,
        "Mul": 3,
        # The sampled rows of both halves of the last residual sum.
        "Reshape": 2,
        "Gather": 2,
        "Identity": 1,
    }


def test_no_weight_is_stored_as_floats_and_the_tied_table_is_stored_once(tmp_path: Path) -> None:
    arch = tiny_architecture(width=256)
    weights = RandomWeights(arch, quantise=packed(4, 32, symmetric=False))
    export_onnx(arch, weights, tmp_path)
    initializers = read(tmp_path / GRAPH).graph.initializer
    largest = max(np.prod(t.dims) for t in initializers if t.data_type == TensorProto.FLOAT)
    # Scales of the merged gate or of the rotary table; the smallest weight matrix has 16384.
    assert largest <= max(arch.vocab * arch.width / 32, arch.context * arch.head_size / 2)
    spans = {
        (entries["offset"], entries["length"])
        for tensor in initializers
        if (entries := {entry.key: entry.value for entry in tensor.external_data})
    }
    values = sum(
        weights.linear(role).outputs * weights.linear(role).inputs // 2
        for role in ["embed", *[f"layers.{i}.{r}" for i in (0, 1) for r in LINEARS]]
    )
    scales_and_zeros = values / 16 * 4.5
    stored = sum(int(length) for _, length in spans)
    assert values <= stored <= 1.1 * (values + scales_and_zeros) + 40_000


def test_the_exact_graph_differs_in_nothing_but_the_accuracy_level(tmp_path: Path) -> None:
    arch = tiny_architecture()
    export_onnx(arch, RandomWeights(arch, quantise=packed(8, 64, symmetric=True)), tmp_path)
    shipped, exact = read(tmp_path / GRAPH), read(tmp_path / EXACT_GRAPH)
    changed = 0
    for node in exact.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 0
                attribute.i, changed = 4, changed + 1
    assert changed == kinds(exact)["MatMulNBits"]
    assert shipped == exact
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([GRAPH, EXACT_GRAPH, DATA])


def test_an_export_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    arch = tiny_architecture()
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        export_onnx(arch, RandomWeights(arch, quantise=packed(4, 32, symmetric=True)), folder)
    for name in (GRAPH, EXACT_GRAPH, DATA):
        one, two = (folder / name for folder in folders)
        assert one.read_bytes() == two.read_bytes()


class Generated:
    """Packed weights that exist only while they are asked for."""

    def __init__(self, arch: Architecture) -> None:
        kv = arch.kv_heads * arch.head_size
        widths = {"q": arch.width, "k": kv, "v": kv, "o": arch.width, "down": arch.width}
        self._arch, self._outputs = arch, {**widths, "embed": arch.vocab}

    def linear(self, role: str) -> PackedLinear:
        kind = role.rsplit(".", 1)[-1]
        inputs = self._arch.inner if kind == "down" else self._arch.width
        outputs = self._outputs.get(kind, self._arch.inner)
        return PackedLinear(
            values=np.full((outputs, inputs // 32, 16), 0x79, np.uint8),
            scales=np.full((outputs, inputs // 32), 0.01, np.float32),
            zeros=np.full((outputs, inputs // 32), 8, np.uint8),
            inputs=inputs,
            bits=4,
            group_size=32,
        )

    def vector(self, role: str) -> Array:
        return np.ones(self._arch.width, np.float32)


def test_an_export_holds_a_layer_at_a_time_and_reports_each(tmp_path: Path) -> None:
    arch = dataclasses.replace(
        tiny_architecture(layers=24, width=512), heads=16, kv_heads=4, inner=1536
    )
    seen: list[tuple[str, int, int]] = []
    tracemalloc.start()
    export_onnx(arch, Generated(arch), tmp_path, progress=lambda *news: seen.append(news))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    layer = (tmp_path / DATA).stat().st_size / arch.layers
    assert layer > 1e6
    assert peak < 2 * layer
    assert seen == [("layers", done, 24) for done in range(25)]


def test_a_failed_export_leaves_no_graph_behind(tmp_path: Path) -> None:
    arch = tiny_architecture()
    export_onnx(arch, RandomWeights(arch), tmp_path)
    with pytest.raises(KeyError):
        export_onnx(dataclasses.replace(arch, layers=3), RandomWeights(arch), tmp_path)
    assert not (tmp_path / GRAPH).exists()
    assert not (tmp_path / EXACT_GRAPH).exists()


def test_a_group_size_that_nothing_divides_is_refused_by_name(tmp_path: Path) -> None:
    linear = PackedLinear(
        values=np.zeros((2, 3, 12), np.uint8),
        scales=np.ones((2, 3), np.float32),
        zeros=None,
        inputs=72,
        bits=4,
        group_size=24,
    )
    with pytest.raises(ConversionError, match="group_size = 24"):
        regrouped(linear)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 96), (8, 1024), (4, 512)])
def test_cutting_large_groups_changes_no_weight(bits: Bits, group_size: int) -> None:
    rng = np.random.default_rng(1)
    groups = 2
    linear = PackedLinear(
        values=rng.integers(0, 256, (5, groups, group_size * bits // 8)).astype(np.uint8),
        scales=rng.random((5, groups)).astype(np.float32),
        zeros=rng.integers(0, 16, (5, groups)).astype(np.uint8),
        inputs=group_size + 7,
        bits=bits,
        group_size=group_size,
    )
    cut = regrouped(linear)
    assert cut.group_size < group_size
    np.testing.assert_array_equal(cut.dequantise(), linear.dequantise())


def test_scales_that_a_float16_cannot_hold_stay_as_they_are(tmp_path: Path) -> None:
    arch = tiny_architecture()

    def odd(role: str, linear: DenseLinear) -> Linear:
        rounded = quantise(linear, bits=4, group_size=32, symmetric=True)
        return dataclasses.replace(rounded, scales=rounded.scales * np.float32(1.0001))

    assert_equal_to_reference(arch, RandomWeights(arch, quantise=odd), tmp_path)
    assert "Cast" not in kinds(read(tmp_path / GRAPH))
