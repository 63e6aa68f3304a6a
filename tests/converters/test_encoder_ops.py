"""Exported encoders: equal to torch on the same weights, whatever lies in the padding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from encodercheckpoints import torch_outputs
from encodermodels import (
    CLASSIFIER,
    DISTILLED,
    LINEAR,
    TINY,
    Graph,
    compile_openvino,
    export_encoder,
    open_graph,
    padded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from openvinomodels import PACKINGS, Packing
from tinymodel import RandomWeights

from tidegate.converters.onnx.encoder_ops import export_onnx_encoder
from tidegate.converters.openvino.encoder_ops import export_openvino_encoder
from tidegate.errors import ConversionError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.manifest import DEVICE_TARGETS, DeviceTarget
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, PackedLinear

TOLERANCE = 1e-5
"""On logits that spread by about 2, and embeddings of length 1: float32 sums in another order."""

ARCHITECTURES = {
    "embedding": TINY,
    "classifier": CLASSIFIER,
    "distilled": DISTILLED,
    "linear": LINEAR,
}


def random_texts(*lengths: int, seed: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY.vocab, length).tolist() for length in lengths]


TEXTS = random_texts(7, 1, 40, 23, 2)
"""One of them fills the whole context."""


@pytest.mark.parametrize("target", DEVICE_TARGETS)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_ragged_batch_gives_what_torch_gives(
    target: DeviceTarget, packing: Packing, tmp_path: Path
) -> None:
    weights = RandomWeights(TINY, quantise=packing)
    export_encoder(target, TINY, weights, tmp_path)
    found = open_graph(target, tmp_path)(padded(TEXTS))
    np.testing.assert_allclose(found, torch_outputs(TINY, weights, TEXTS), atol=TOLERANCE)


@pytest.mark.parametrize("target", DEVICE_TARGETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_encoder_gives_what_torch_gives(
    target: DeviceTarget, name: str, tmp_path: Path
) -> None:
    arch = ARCHITECTURES[name]
    weights = RandomWeights(arch, quantise=Packing(bits=8, symmetric=False))
    export_encoder(target, arch, weights, tmp_path)
    found = open_graph(target, tmp_path)(padded(TEXTS))
    assert found.shape == (len(TEXTS), arch.outputs)
    np.testing.assert_allclose(found, torch_outputs(arch, weights, TEXTS), atol=TOLERANCE)


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_integer_activations_turn_an_embedding_by_little(
    target: DeviceTarget, tmp_path: Path
) -> None:
    weights = RandomWeights(TINY, quantise=Packing(bits=8, group_size=32, symmetric=False))
    export_encoder(target, TINY, weights, tmp_path)
    found = open_graph(target, tmp_path, "int8")(padded(TEXTS))
    cosines = (found * torch_outputs(TINY, weights, TEXTS)).sum(axis=1)
    # Not exactly 1, or the activations were not rounded.
    assert 0.999 < cosines.min() < 0.999999


def tiny_graph(target: DeviceTarget, folder: Path) -> Graph:
    export_encoder(target, TINY, RandomWeights(TINY, quantise=Packing(bits=8)), folder)
    return open_graph(target, folder)


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_padding_does_not_leak(
    target: DeviceTarget, tmp_path_factory: pytest.TempPathFactory
) -> None:
    graph = tiny_graph(target, tmp_path_factory.mktemp("graph"))

    @settings(deadline=None, max_examples=40)
    @given(
        lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
        seed=st.integers(0, 1000),
        width=st.integers(0, 40),
        filler=st.integers(0, TINY.vocab - 1),
    )
    def same_alone_and_together(lengths: list[int], seed: int, width: int, filler: int) -> None:
        texts = random_texts(*lengths, seed=seed)
        together = graph(padded(texts, width=width, filler=filler))
        for text, found in zip(texts, together, strict=True):
            np.testing.assert_allclose(found, graph(padded([text]))[0], atol=TOLERANCE)

    same_alone_and_together()


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_a_token_of_the_text_does_count(target: DeviceTarget, tmp_path: Path) -> None:
    graph = tiny_graph(target, tmp_path)
    one, other = graph(padded([[5, 6, 7], [5, 6, 8]]))
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_scores_too_large_for_a_mask_of_ten_thousand_are_masked(
    target: DeviceTarget, tmp_path: Path
) -> None:
    weights = RandomWeights(TINY)
    for role in ("layers.0.q", "layers.0.k"):
        weights.linear(role).weight[:] *= 300  # type: ignore[union-attr]
    export_encoder(target, TINY, weights, tmp_path)
    graph = open_graph(target, tmp_path)
    alone, padding = graph(padded([[5, 6, 7]])), graph(padded([[5, 6, 7]], width=40, filler=9))
    np.testing.assert_allclose(alone, padding, atol=1e-4)


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_low_rank_layers_stay_two_products(target: DeviceTarget, tmp_path: Path) -> None:
    def factors(role: str, linear: DenseLinear) -> Linear:
        if not role.endswith((".q", ".up", "pooler")):
            return linear
        left, sizes, right = np.linalg.svd(linear.weight, full_matrices=False)
        return LowRankLinear(
            first=DenseLinear(weight=(sizes[:9, None] * right[:9]).astype(np.float32)),
            second=DenseLinear(weight=np.ascontiguousarray(left[:, :9]), bias=linear.bias),
        )

    weights = RandomWeights(CLASSIFIER, quantise=factors)
    export_encoder(target, CLASSIFIER, weights, tmp_path)
    found = open_graph(target, tmp_path)(padded(TEXTS))
    np.testing.assert_allclose(found, torch_outputs(CLASSIFIER, weights, TEXTS), atol=TOLERANCE)


def low_rank_table(role: str, linear: DenseLinear) -> Linear:
    if role != "embed":
        return linear
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(shape) for shape in ((TINY.vocab, 9), (9, TINY.width)))
    return LowRankLinear(
        first=DenseLinear(weight=(0.1 * right).astype(np.float32)),
        second=DenseLinear(weight=left.astype(np.float32)),
    )


def test_onnx_refuses_a_low_rank_table(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="low-rank"):
        export_encoder("onnx", TINY, RandomWeights(TINY, quantise=low_rank_table), tmp_path)


def test_openvino_looks_rows_up_in_a_low_rank_table(tmp_path: Path) -> None:
    weights = RandomWeights(TINY, quantise=low_rank_table)
    export_encoder("openvino", TINY, weights, tmp_path)
    found = open_graph("openvino", tmp_path)(padded(TEXTS))
    np.testing.assert_allclose(found, torch_outputs(TINY, weights, TEXTS), atol=TOLERANCE)


def test_onnx_graphs_are_made_of_fused_operators(tmp_path: Path) -> None:
    export_encoder("onnx", TINY, RandomWeights(TINY, quantise=Packing(bits=8)), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    layers = TINY.layers
    assert found["MultiHeadAttention"] == layers
    assert found["SkipLayerNormalization"] == 2 * layers
    # q, k and v are one product; then o, up and down.
    assert found["MatMulNBits"] == 4 * layers
    assert found["GatherBlockQuantized"] == 2


@pytest.mark.parametrize("packing", [Packing(bits=4), Packing(bits=8)], ids=str)
def test_openvino_keeps_every_weight_compressed(packing: Packing, tmp_path: Path) -> None:
    export_encoder("openvino", CLASSIFIER, RandomWeights(CLASSIFIER, quantise=packing), tmp_path)
    found: Counter[tuple[str, str]] = Counter()
    for node in compile_openvino(tmp_path).get_runtime_model().get_ops():
        facts = node.get_rt_info()
        found[facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)] += 1
    products = {precision: n for (kind, precision), n in found.items() if kind == "FullyConnected"}
    # Pooler and classifier beside the four of each layer.
    assert products == {f"u{packing.bits}": 4 * CLASSIFIER.layers + 2}
    assert found["MVN", "f32"] == 2 * CLASSIFIER.layers + 1


@pytest.mark.parametrize(
    ("arch", "name"), [(TINY, "embeddings"), (CLASSIFIER, "logits")], ids=["embedding", "classes"]
)
def test_the_output_says_what_it_is(arch: EncoderArchitecture, name: str, tmp_path: Path) -> None:
    weights = RandomWeights(arch)
    for target in DEVICE_TARGETS:
        (tmp_path / target).mkdir()
        export_encoder(target, arch, weights, tmp_path / target)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert [output.name for output in graph.output] == [name]
    assert compile_openvino(tmp_path / "openvino").output(0).get_names() == {name}


def test_files_hold_each_weight_once(tmp_path: Path) -> None:
    weights = RandomWeights(TINY, quantise=Packing(bits=8, symmetric=False))
    layers = [f"layers.{i}.{part}" for i in range(2) for part in ["q", "k", "v", "o", "up", "down"]]
    packed = [weights.linear(role) for role in ("embed", "positions", *layers)]
    nbytes = sum(linear.nbytes for linear in packed if isinstance(linear, PackedLinear))
    export_encoder("openvino", TINY, weights, tmp_path)
    export_encoder("onnx", TINY, weights, tmp_path)
    assert nbytes <= (tmp_path / "model.bin").stat().st_size <= nbytes + 10_000
    # Scales are float32 there, and tensors begin on pages.
    assert (tmp_path / "model.onnx.data").stat().st_size <= nbytes + 60 * 4096


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_the_same_weights_give_the_same_bytes(target: DeviceTarget, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        export_encoder(target, TINY, RandomWeights(TINY), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_progress_is_told_layer_by_layer(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    weights = RandomWeights(TINY)
    export_onnx_encoder(TINY, weights, tmp_path, progress=lambda *what: told.append(what))
    assert told == [("layers", 0, 2), ("layers", 1, 2), ("layers", 2, 2)]
    told.clear()
    export_openvino_encoder(TINY, weights, tmp_path, progress=lambda *what: told.append(what))
    assert told == [("layers", 1, 2), ("layers", 2, 2), ("write", 0, 1), ("write", 1, 1)]
