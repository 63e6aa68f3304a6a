"""The native layer in the graph: the same logits, whatever runs beside; and why it does not run."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
from everylogit import reference_logits
from nativebuild import native_folder
from nativelinear import twin
from openvino.utils.node_factory import NodeFactory
from openvinomodels import SETTINGS, Packing, biased, export
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.openvino import graph
from tidegate.converters.openvino.linear import LinearLayers
from tidegate.converters.openvino.weights import ConstantFile
from tidegate.converters.rounding.rtn import quantise
from tidegate.edge.energy.own_modes import LiveThreads
from tidegate.edge.executors.native import NativeUnavailable, find_native
from tidegate.edge.executors.openvino import OpenVinoExecutor, OpenVinoSettings
from tidegate.edge.executors.openvino_model import openvino_release
from tidegate.edge.executors.openvino_native import Swapped, swap_products
from tidegate.engine.executor import ExecutorStep, Logits, Row, Tokens
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture, Experts, LayerKind
from tidegate.model.packed import Array, Bits, DenseLinear, Linear, LowRankLinear
from tidegate.model.rope import Rope

ARCH = tiny_architecture()


@pytest.fixture(scope="module")
def settings() -> OpenVinoSettings:
    return replace(SETTINGS, exact=False, native="on", native_folder=native_folder())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def weights(folder: Path) -> RandomWeights:
    return export(ARCH, folder, Packing())


def tokens_of(count: int, seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, ARCH.vocab, count)


def chunk(tokens: Tokens, past: int, end: int, place: int = 0, *, logits: int = 1) -> Row:
    """Part of a request whose blocks are the eight at `place`."""
    blocks = np.arange(8 * place, 8 * place + 8, dtype=np.int32)[::-1].copy()
    return Row(tokens=tokens[past:end], past=past, blocks=blocks, logits=logits)


def step(executor: OpenVinoExecutor, *rows: Row) -> Logits:
    return executor.execute(ExecutorStep(rows=rows)).logits


def every_logit(executor: OpenVinoExecutor, tokens: Tokens) -> Logits:
    """One token at a time."""
    return np.concatenate([step(executor, chunk(tokens, i, i + 1)) for i in range(len(tokens))])


def mixed(role: str, linear: DenseLinear) -> Linear:
    wide = role.endswith((".v", ".down", "embed"))
    return Packing(bits=8 if wide else 4, group_size=32, symmetric=not wide)(role, linear)


def uneven(role: str, linear: DenseLinear) -> Linear:
    return Packing(bits=8 if role.endswith(".up") else 4)(role, linear)


PACKS: dict[str, tuple[int, Callable[[str, DenseLinear], Linear], int]] = {
    "4-bit-g32-sym": (128, Packing(group_size=32), 32),
    "4-bit-g64-asym": (128, Packing(symmetric=False), 64),
    "4-bit-g128-asym": (128, Packing(group_size=128, symmetric=False), 64),
    "8-bit-g64-asym": (128, Packing(bits=8, symmetric=False), 64),
    "five groups in a row": (160, Packing(group_size=32, symmetric=False), 32),
    "biased": (128, biased(Packing(symmetric=False), ("q", "v", "o", "gate", "down")), 64),
    "mixed bits": (128, mixed, 32),
}


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
def test_the_native_graph_gives_the_reference_with_int8_activations(
    name: str, tied_head: bool, tmp_path: Path, settings: OpenVinoSettings
) -> None:
    """The same arithmetic as OpenVINO's own; float activations would be off by 0.07 (rms)."""
    width, pack, group = PACKS[name]
    arch = tiny_architecture(width=width, tied_head=tied_head)
    weights = export(arch, tmp_path, pack)
    executor = OpenVinoExecutor(tmp_path, arch, replace(settings, kv_precision="f32"))
    # Five products per layer at most, and the head.
    assert executor.facts.linear.startswith("native ")
    assert "openvino for the others" not in executor.facts.linear
    tokens = tokens_of(100, 1)
    expected = reference_logits(arch, weights, tokens, activation_group=group)
    difference = every_logit(executor, tokens) - expected
    assert np.sqrt((difference**2).mean()) < 0.02


EXPERTS = LayerKind(
    rope=Rope.plain(10000.0, 32), experts=Experts(count=8, chosen=3, inner=48, normalised=True)
)
SPECIAL = {
    "experts": (replace(ARCH, kinds=(EXPERTS,)), 39),
    "capped scores": (replace(ARCH, attention_softcap=2.0), 9),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_experts_that_get_no_token_and_caches_that_the_graph_reads_run_natively(
    name: str, tmp_path: Path, settings: OpenVinoSettings
) -> None:
    arch, products = SPECIAL[name]
    weights = export(arch, tmp_path, Packing(group_size=32, symmetric=False))
    executor = OpenVinoExecutor(tmp_path, arch, replace(settings, kv_precision="f32"))
    assert f"{products} of {products} products" in executor.facts.linear
    tokens = tokens_of(60, 7)
    expected = reference_logits(arch, weights, tokens, activation_group=32)
    difference = every_logit(executor, tokens) - expected
    assert np.sqrt((difference**2).mean()) < 0.03
    together = step(executor, chunk(tokens, 0, 60, 1))
    np.testing.assert_allclose(together[0], expected[-1], atol=0.3)


WIDE_EXPERTS = replace(EXPERTS, experts=Experts(count=8, chosen=3, inner=64, normalised=True))
GATED: dict[str, tuple[Architecture, Callable[[str, DenseLinear], Linear], int]] = {
    "SiLU": (ARCH, Packing(), ARCH.layers),
    "GELU by tanh": (replace(ARCH, activation="gelu_tanh"), Packing(), ARCH.layers),
    "GELU by erf": (replace(ARCH, activation="gelu"), Packing(), 0),
    "a bias before the gate": (ARCH, biased(Packing(), ("gate", "up")), 0),
    "a bias at the end": (ARCH, biased(Packing(), ("down",)), 0),
    "a width of no whole tiles": (
        replace(ARCH, inner=200),
        Packing(bits=8, group_size=None),
        0,
    ),
    "down of other bits": (ARCH, mixed, ARCH.layers),
    "gate and up of different bits": (ARCH, uneven, 0),
    "experts": (replace(ARCH, kinds=(WIDE_EXPERTS,)), Packing(group_size=32), 8 * ARCH.layers),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gated_mlp_is_one_operation_where_it_can_be(
    name: str, tmp_path: Path, settings: OpenVinoSettings
) -> None:
    arch, pack, gated = GATED[name]
    weights = export(arch, tmp_path, pack)
    core = ov.Core()
    core.get_versions("CPU")
    model = core.read_model(tmp_path / "model.xml")
    swapped = swap_products(model, core, find_native(openvino_release(), native_folder()), None)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert (swapped.gated, kinds.count("GatedMlp")) == (gated, gated)
    assert swapped.native == kinds.count("PackedLinear") + 2 * gated
    tokens = tokens_of(40, 3)
    group = 32 if name in ("experts", "down of other bits") else 64
    expected = reference_logits(arch, weights, tokens, activation_group=group)
    executor = OpenVinoExecutor(tmp_path, arch, replace(settings, kv_precision="f32"))
    difference = every_logit(executor, tokens) - expected
    assert np.sqrt((difference**2).mean()) < 0.03


def test_a_prefill_and_its_single_steps_give_the_same_logits(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    executor = OpenVinoExecutor(folder, ARCH, settings)
    tokens = tokens_of(60, 2)
    alone = every_logit(executor, tokens)
    for begin, end in ((0, 33), (33, 34), (34, 60)):
        together = step(executor, chunk(tokens, begin, end, 1, logits=1))
        np.testing.assert_allclose(together, alone[end - 1 : end], atol=1e-4)


def test_a_row_gets_the_same_bits_alone_and_among_others(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    executor = OpenVinoExecutor(folder, ARCH, settings)
    requests = [tokens_of(45, 10 + place) for place in range(3)]
    for place, tokens in enumerate(requests):
        step(executor, chunk(tokens, 0, 40 + place, place))
    rows = [chunk(t, 40 + place, 41 + place, place) for place, t in enumerate(requests)]
    together = step(executor, *rows)
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(step(executor, row)[0], together[place])


@pytest.mark.parametrize("count", [1, 4, 33])
def test_tokens_get_the_same_bits_beside_other_rows_of_any_length(
    count: int, folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    executor = OpenVinoExecutor(folder, ARCH, settings)
    requests = [tokens_of(90, 10 + place) for place in range(3)]
    for place, tokens in enumerate(requests):
        step(executor, chunk(tokens, 0, 40, place))
    row = chunk(requests[0], 40, 40 + count, 0)
    alone = step(executor, row)[0]
    for beside in (1, 5, 30):
        others = [chunk(requests[1], 40, 40 + beside, 1), chunk(requests[2], 40, 41, 2)]
        for place in range(3):
            rows = [*others[:place], row, *others[place:]]
            np.testing.assert_array_equal(step(executor, *rows)[place], alone)


@pytest.mark.parametrize("rows", [1, 3, 8, 21])
@pytest.mark.parametrize(
    ("bits", "inputs", "group", "symmetric"),
    [(4, 192, 64, False), (4, 160, 32, False), (4, 256, 128, True), (8, 96, 32, False)],
)
def test_a_product_equals_its_twin_bit_for_bit(
    rows: int, bits: Bits, inputs: int, group: int, symmetric: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(bits * inputs + rows)
    dense = DenseLinear(weight=normal(rng, 37, inputs), bias=normal(rng, 37))
    packed = quantise(dense, bits=bits, group_size=group, symmetric=symmetric)
    x = normal(rng, rows, inputs)
    with native_product(packed, tmp_path) as product:
        # Scales are half precision in the graph.
        halves = replace(packed, scales=packed.scales.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(product(x), twin(halves, x))


def test_both_factors_of_a_low_rank_layer_are_native(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    first, second = (
        quantise(DenseLinear(weight=normal(rng, *shape)), bits=4, group_size=32, symmetric=False)
        for shape in ((64, 128), (48, 64))
    )
    x = normal(rng, 2, 128)
    with native_product(LowRankLinear(first=first, second=second), tmp_path) as product:
        halves = [
            replace(one, scales=one.scales.astype(np.float16).astype(np.float32))
            for one in (first, second)
        ]
        np.testing.assert_array_equal(product(x), twin(halves[1], twin(halves[0], x)))


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def test_a_rehearsal_leaves_out_the_products_of_its_own_model_only(
    tmp_path: Path, folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    rng = np.random.default_rng(6)
    first = quantise(DenseLinear(weight=normal(rng, 48, 64)), bits=4, group_size=32, symmetric=True)
    x = normal(rng, 2, 64)
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    with (
        swapped_product(first, tmp_path / "one") as (product, swapped),
        swapped_product(first, tmp_path / "other") as (other, _),
    ):
        expected = product(x)
        with swapped.place.rehearsal():
            assert not product(x).any()
            np.testing.assert_array_equal(other(x), expected)
        np.testing.assert_array_equal(product(x), expected)


def test_results_are_the_same_bits_before_and_after_the_tiles_have_moved(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    weight = quantise(
        DenseLinear(weight=normal(rng, 48, 64)), bits=4, group_size=32, symmetric=True
    )
    x = normal(rng, 2, 64)
    file = tmp_path / "model.tiles"
    with swapped_product(weight, tmp_path, file) as (product, swapped):
        assert swapped.place.tiles.mapped
        expected = product(x)
        swapped.place.move_after(0)
        while not swapped.place.moved:
            np.testing.assert_array_equal(product(x), expected)
        np.testing.assert_array_equal(product(x), expected)


@contextmanager
def native_product(weight: Linear, folder: Path) -> Iterator[Callable[[Array], Array]]:
    """Multiplies by a weight that went through the converter's graph and the swap."""
    with swapped_product(weight, folder) as (product, _):
        yield product


@contextmanager
def swapped_product(
    weight: Linear, folder: Path, tiles: Path | None = None
) -> Iterator[tuple[Callable[[Array], Array], Swapped]]:
    """The same, and what became of the graph."""
    with ConstantFile(folder / "scratch") as constants:
        layers = LinearLayers(constants)
        x = graph.parameter("x", 2, ov.Type.f32)
        result = op.result(layers.product(x, layers.store(weight)))
        constants.save(ov.Model([result], [x], "product"), folder / "model.xml")
    core = ov.Core()
    model = core.read_model(folder / "model.xml")
    native = find_native(openvino_release(), native_folder())
    swapped = swap_products(model, core, native, tiles)
    assert swapped.native == swapped.products > 0
    properties = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", properties)
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in layers_of(compiled)}
    assert not kinds & {"FullyConnected", "MatMul", "Eltwise"}
    yield lambda x: np.array(compiled([x])[0]), swapped


def layers_of(compiled: ov.CompiledModel) -> list[ov.Node]:
    return list(compiled.get_runtime_model().get_ops())


def test_a_model_without_packed_weights_says_that_nothing_is_to_swap(
    tmp_path: Path, settings: OpenVinoSettings
) -> None:
    export(ARCH, tmp_path, Packing(bits=None))
    facts = OpenVinoExecutor(tmp_path, ARCH, replace(settings, native="auto")).facts
    assert facts.linear.endswith("it can run none of the model's 0 packed products")


def hand_made(
    *,
    dims: tuple[int, ...] = (48, 2, 32),
    scales: tuple[int, ...] = (48, 2, 1),
    zeros: tuple[int, ...] = (48, 2, 1),
    kind: ov.Type = ov.Type.u8,
    weight: tuple[int, int] = (48, 64),
    floats: ov.Type = ov.Type.f32,
) -> ov.Model:
    """A product as the converter writes it, but for what is asked for otherwise."""
    rng = np.random.default_rng(8)

    def constant(shape: tuple[int, ...], of: ov.Type) -> ov.Node:
        return op.constant(rng.integers(1, 15, shape), of)

    centred = op.subtract(
        op.convert(constant(dims, ov.Type.u8), "f16"), op.convert(constant(zeros, kind), "f16")
    )
    scaled = op.multiply(centred, constant(scales, ov.Type.f16))
    whole = op.reshape(scaled, np.array(weight), False)
    x = op.parameter([-1, weight[1]], floats, "x")
    product = op.matmul(x, op.convert(whole, floats), False, True)
    return ov.Model([op.result(product)], [x], "hand made")


UNLIKE: dict[str, Callable[[], ov.Model]] = {
    "scales for all groups": partial(hand_made, scales=(48, 1, 1)),
    "scales for single inputs": partial(hand_made, scales=(48, 2, 32)),
    "zero-points for all groups": partial(hand_made, zeros=(48, 1, 1)),
    "zero-points of other bits": partial(hand_made, kind=ov.Type.u4),
    "no groups": partial(hand_made, dims=(48, 64), scales=(48, 1), zeros=(48, 1)),
    "rows that cross groups": partial(hand_made, weight=(32, 96)),
    "half precision activations": partial(hand_made, floats=ov.Type.f16),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_product_that_the_converter_does_not_write_is_left_to_openvino(name: str) -> None:
    native = find_native(openvino_release(), native_folder())
    assert swap_products(hand_made(), ov.Core(), native, None).native == 1
    with pytest.raises(NativeUnavailable, match="none of the model's 0 packed products"):
        swap_products(UNLIKE[name](), ov.Core(), native, None)


def operation(x: ov.Node, tiles: ov.Node) -> ov.Node:
    """The operation over 64 inputs and 16 outputs."""
    native = find_native(openvino_release(), native_folder())
    factory = NodeFactory()
    factory.add_extension(str(native.operation))
    attributes = {"inputs": 64, "outputs": 16, "bits": 8, "group": 64, "zeros": 0}
    return factory.create("PackedLinear", [x.output(0), tiles.output(0)], attributes)


@pytest.mark.parametrize(
    ("columns", "nbytes", "reason"),
    [(32, 1088, "x is f32"), (128, 1088, "x is f32"), (64, 1024, "tiles are 1024 bytes")],
)
def test_the_operation_refuses_tensors_that_do_not_fit_where_the_graph_left_that_open(
    columns: int, nbytes: int, reason: str
) -> None:
    node = operation(op.parameter([-1, -1], ov.Type.f32), op.parameter([-1], ov.Type.u8))
    given = [ov.Tensor(ov.Type.f32, [2, columns]), ov.Tensor(ov.Type.u8, [nbytes])]
    with pytest.raises(RuntimeError, match=reason):
        node.evaluate([ov.Tensor(ov.Type.f32, [2, 16])], given)


def test_the_operation_makes_no_rows_of_none() -> None:
    node = operation(op.parameter([-1, 64], ov.Type.f32), op.parameter([1088], ov.Type.u8))
    spare = np.zeros(1088 + 64, np.uint8)
    tiles = spare[-spare.ctypes.data % 64 :][:1088]
    result = ov.Tensor(ov.Type.f32, [3, 16])
    none = ov.Tensor(ov.Type.f32, [0, 64])
    assert node.evaluate([result], [none, ov.Tensor(tiles, shared_memory=True)])
    assert list(result.shape) == [0, 16]


def test_the_operation_takes_no_half_precision_rows() -> None:
    x, tiles = op.parameter([-1, 64], ov.Type.f16), op.parameter([1088], ov.Type.u8)
    with pytest.raises(RuntimeError, match="rows of `inputs` values, f32"):
        operation(x, tiles)


BROKEN: dict[str, tuple[str, bytes | None, str]] = {
    "no operation": ("libtidegate_openvino.so", None, "libtidegate_openvino.so is missing"),
    "no tiler": ("libtidegate_native.so", None, "libtidegate_native.so is missing"),
    "operation of no code": ("libtidegate_openvino.so", b"no code", "cannot be loaded"),
    "tiler of no code": ("libtidegate_native.so", b"no code", "cannot be loaded"),
    "no note": ("tidegate_openvino.json", None, "does not say what it was built for"),
    "note of no JSON": ("tidegate_openvino.json", b"{", "does not say what it was built for"),
    "note of a list": ("tidegate_openvino.json", b"[]", "does not say what it was built for"),
    "another release": (
        "tidegate_openvino.json",
        b'{"openvino": "2026.3.0", "layout": 1}',
        "it was built for OpenVINO 2026.3.0, not ",
    ),
    "another layout": (
        "tidegate_openvino.json",
        f'{{"openvino": "{openvino_release()}", "layout": 7}}'.encode(),
        "its layout is 7, not 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_libraries_that_do_not_fit_are_left_alone_and_the_reason_is_told(
    name: str, tmp_path: Path, folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    file, content, reason = BROKEN[name]
    places = shutil.copytree(native_folder(), tmp_path / "tidegate_native")
    (places / file).unlink()
    if content is not None:
        (places / file).write_bytes(content)
    given = replace(settings, native_folder=places)
    facts = OpenVinoExecutor(folder, ARCH, replace(given, native="auto")).facts
    assert facts.linear.startswith("openvino; the native layer does not run: ")
    assert reason in facts.linear
    with pytest.raises(ConfigError, match=r"native = 'on': must be auto or off here: ") as error:
        OpenVinoExecutor(folder, ARCH, given)
    assert reason in str(error.value)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(NativeUnavailable, match="tidegate-native is not installed"):
        find_native(openvino_release())


def test_an_empty_folder_of_its_name_hides_no_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tidegate_native").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path), str(native_folder().parent)])
    assert find_native(openvino_release()).operation.parent == native_folder()


def test_a_processor_without_a_fast_path_takes_the_library_unless_it_is_told_otherwise(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    tiler = find_native(openvino_release(), native_folder()).library
    tiler.tidegate_native_force_path.argtypes = [ctypes.c_char_p]
    tiler.tidegate_native_force_path(b"portable")
    try:
        facts = OpenVinoExecutor(folder, ARCH, replace(settings, native="auto")).facts
        assert facts.linear.endswith("it has no fast path for this processor")
        assert OpenVinoExecutor(folder, ARCH, settings).facts.linear.startswith("native portable")
    finally:
        tiler.tidegate_native_force_path(b"")


def test_exact_arithmetic_and_off_never_run_it(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    off = OpenVinoExecutor(folder, ARCH, replace(settings, native="off"))
    assert off.facts.linear == "openvino, because it was asked for"
    exact = OpenVinoExecutor(folder, ARCH, replace(settings, native="auto", exact=True))
    assert exact.facts.linear == "openvino, because exact arithmetic was asked for"
    with pytest.raises(ConfigError, match="native = 'on'"):
        OpenVinoExecutor(folder, ARCH, replace(settings, exact=True))


def test_blocks_of_one_path_are_not_those_of_the_other(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    native = OpenVinoExecutor(folder, ARCH, settings)
    assert (
        native.kv_layout
        != OpenVinoExecutor(folder, ARCH, replace(settings, native="off")).kv_layout
    )


def test_a_kept_file_of_tiles_gives_the_same_logits_as_tiles_in_memory(
    tmp_path: Path, folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    kept = replace(settings, tile_file=tmp_path / "cache" / "model.tiles")
    answers, sources = [], []
    for given in (settings, kept, kept):
        executor = OpenVinoExecutor(folder, ARCH, given)
        answers.append(step(executor, chunk(tokens_of(40, 3), 0, 40)))
        sources.append(executor.facts.cache)
    assert sources == ["memory: no cache folder is set", "written to cache", "cache"]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


def busy_s() -> dict[str, float]:
    """Processor seconds of every thread of this process."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # it has ended
            found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def shares_of(work: Callable[[], object]) -> list[float]:
    """What each thread does of some work, most first."""
    before = busy_s()
    work()
    spent = sorted((now - before.get(name, 0.0) for name, now in busy_s().items()), reverse=True)
    return [one / sum(spent) for one in spent]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
def test_threads_are_held_back_while_the_model_stays(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    executor = OpenVinoExecutor(folder, ARCH, replace(settings, threads=2))
    tokens = tokens_of(64, 3)

    def work() -> Logits:
        return [step(executor, chunk(tokens, 0, 64, logits=4)) for _ in range(40)][-1]

    try:
        assert isinstance(executor, LiveThreads)
        assert executor.most_threads == 2
        both = work()
        executor.limit_threads(1)
        one = work()
        # Of the prompt's tokens: attention is summed in another order by other threads.
        np.testing.assert_allclose(one, both, rtol=1e-3, atol=1e-3)
        alone = max(shares_of(work)[0] for _ in range(3))
        assert alone > 0.95, "nobody else works, or waits spinning"
        executor.limit_threads(2)
        np.testing.assert_array_equal(work(), both)
        for threads in (0, 3):
            with pytest.raises(ConfigError, match=r"threads = .: must be from 1 to 2"):
                executor.limit_threads(threads)
    finally:
        executor.close()
    assert executor.most_threads is None


def test_threads_of_openvino_alone_are_fixed(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    executor = OpenVinoExecutor(folder, ARCH, replace(settings, threads=2, native="off"))
    try:
        assert executor.most_threads is None
        with pytest.raises(ConfigError, match="threads are fixed here"):
            executor.limit_threads(1)
    finally:
        executor.close()


def test_an_answer_goes_on_with_the_kv_that_other_threads_wrote(
    folder: Path, weights: RandomWeights, settings: OpenVinoSettings
) -> None:
    tokens = tokens_of(40, 4)
    executor = OpenVinoExecutor(folder, ARCH, replace(settings, threads=2))
    try:
        whole = step(executor, chunk(tokens, 0, 40))
        step(executor, chunk(tokens, 0, 30))
        executor.limit_threads(1)
        rest = step(executor, chunk(tokens, 30, 40))
        np.testing.assert_allclose(rest, whole, rtol=1e-3, atol=1e-3)
    finally:
        executor.close()
