"""The OpenVINO executor against the torch reference: any step shape, any placement, any packing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from everylogit import reference_logits
from openvinomodels import PACKINGS, SETTINGS, Packing, biased, export
from tinymodel import RandomWeights, tiny_architecture

from tidegate.edge.executors.openvino import OpenVinoExecutor
from tidegate.edge.executors.openvino_model import OPENVINO, KvPrecision, check_library
from tidegate.engine.executor import Blocks, ExecutorStep, Logits, PagedGeometry, Row, Tokens
from tidegate.engine.spill import KvUnit, SpillingKv
from tidegate.errors import BundleError, ConfigError, ExecutionError
from tidegate.model.architecture import Activation, Architecture, LayerKind
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.rope import Rope

ARCH = tiny_architecture()
TOLERANCE = 1e-4
"""On logits of scale 7; the measured difference is 2e-5."""

TUNED = replace(SETTINGS, exact=False, native="off")
"""OpenVINO's own products; `test_openvino_native` is about the others."""

BLOCKS = SETTINGS.kv_tokens // 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def weights(folder: Path) -> RandomWeights:
    return export(ARCH, folder, Packing())


@pytest.fixture
def executor(folder: Path, weights: RandomWeights) -> Iterator[OpenVinoExecutor]:
    executor = OpenVinoExecutor(folder, ARCH, SETTINGS)
    yield executor
    executor.close()


def tokens_of(count: int, seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, ARCH.vocab, count)


def blocks_of(*ids: int) -> Blocks:
    return np.array(ids, np.int32)


def row(tokens: Tokens, past: int, end: int, blocks: Blocks, *, logits: int = 1) -> Row:
    """The part of a request from token `past` to `end`."""
    return Row(tokens=tokens[past:end], past=past, blocks=blocks, logits=logits)


def step(executor: OpenVinoExecutor, *rows: Row) -> Logits:
    return executor.execute(ExecutorStep(rows=rows)).logits


def decode(executor: OpenVinoExecutor, tokens: Tokens, blocks: Blocks) -> Logits:
    """Logits after every token, one step each."""
    steps = [step(executor, row(tokens, i, i + 1, blocks)) for i in range(len(tokens))]
    return np.concatenate(steps)


def assert_close(actual: Logits, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


def test_chunks_and_decode_steps_over_shuffled_blocks_give_the_reference(
    executor: OpenVinoExecutor, weights: RandomWeights
) -> None:
    tokens, blocks = tokens_of(100, 1), blocks_of(7, 23, 0, 12)
    expected = reference_logits(ARCH, weights, tokens)
    past = 0
    for count in (41, 1, 1, 20, 1, 31, 5):
        logits = step(executor, row(tokens, past, past + count, blocks))
        past += count
        assert_close(logits, expected[past - 1 : past])


def test_a_ragged_step_gives_every_row_what_it_gets_alone(
    executor: OpenVinoExecutor, weights: RandomWeights
) -> None:
    placed = [blocks_of(5, 2), blocks_of(9), blocks_of(1, 8, 3), blocks_of(20)]
    parts = [(30, 47), (0, 3), (70, 71), (11, 12)]
    requests = [tokens_of(end, 10 + i) for i, (_, end) in enumerate(parts)]
    for tokens, blocks, (past, _) in zip(requests, placed, parts, strict=True):
        for begin in range(0, past, 50):
            step(executor, row(tokens, begin, min(begin + 50, past), blocks))
    rows = [
        row(tokens, past, end, blocks)
        for tokens, blocks, (past, end) in zip(requests, placed, parts, strict=True)
    ]
    together = step(executor, *rows)
    expected = [reference_logits(ARCH, weights, tokens)[-1] for tokens in requests]
    assert_close(together, np.stack(expected))
    alone = np.concatenate([step(executor, part) for part in rows])
    assert (alone.argmax(-1) == together.argmax(-1)).all()


def test_requests_share_the_blocks_of_a_common_prefix(
    executor: OpenVinoExecutor, weights: RandomWeights
) -> None:
    first, other = tokens_of(45, 2), tokens_of(45, 3)
    other[:32] = first[:32]
    step(executor, row(first, 0, 45, blocks_of(4, 17)))
    logits = step(
        executor, row(other, 32, 45, blocks_of(4, 6)), row(first, 44, 45, blocks_of(4, 17))
    )
    expected = [reference_logits(ARCH, weights, tokens)[-1] for tokens in (other, first)]
    assert_close(logits, np.stack(expected))


def test_rows_that_want_no_logits_get_none(
    executor: OpenVinoExecutor, weights: RandomWeights
) -> None:
    tokens, blocks = tokens_of(40, 4), blocks_of(3, 1)
    silent = row(tokens, 0, 39, blocks, logits=0)
    assert step(executor, silent).shape == (0, ARCH.vocab)
    asleep = row(tokens_of(9, 5), 0, 9, blocks_of(2), logits=0)
    logits = step(executor, asleep, row(tokens, 39, 40, blocks))
    assert_close(logits, reference_logits(ARCH, weights, tokens)[-1:])
    assert step(executor).shape == (0, ARCH.vocab)


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_every_packing_gives_the_reference_on_the_same_integers(
    packing: Packing, tied_head: bool, tmp_path: Path
) -> None:
    # One layer has every product; models of more of them are below, in fewer packings.
    arch = tiny_architecture(layers=1, tied_head=tied_head)
    check_exact(arch, export(arch, tmp_path, packing), tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_do_not_fill_their_last_group_are_exact(bits: int, tmp_path: Path) -> None:
    arch = tiny_architecture(layers=1, width=160)
    packing = Packing(bits=4 if bits == 4 else 8, group_size=128, symmetric=False)
    check_exact(arch, export(arch, tmp_path, packing), tmp_path)


def test_biases_are_added_to_merged_and_single_layers(tmp_path: Path) -> None:
    pack = biased(Packing(), ("q", "v", "o", "gate", "down"))
    check_exact(ARCH, export(ARCH, tmp_path, pack), tmp_path)


def test_layers_of_different_bits_share_an_input(tmp_path: Path) -> None:
    def pack(role: str, linear: DenseLinear) -> Linear:
        wide = role.endswith((".v", ".down", "embed"))
        return Packing(bits=8 if wide else 4, group_size=32)(role, linear)

    check_exact(ARCH, export(ARCH, tmp_path, pack), tmp_path)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_other_activations_give_the_reference(activation: Activation, tmp_path: Path) -> None:
    arch = replace(ARCH, layers=1, activation=activation)
    check_exact(arch, export(arch, tmp_path, Packing()), tmp_path)


def test_positions_far_into_a_long_context_are_exact(tmp_path: Path) -> None:
    arch = tiny_architecture(layers=1, context=4096)
    weights = export(arch, tmp_path, Packing())
    settings = replace(SETTINGS, kv_tokens=4096, context_tokens=4096, step_tokens=1024, step_rows=1)
    executor = OpenVinoExecutor(tmp_path, arch, settings)
    tokens, blocks = tokens_of(4096, 6), np.arange(128, dtype=np.int32)[::-1].copy()
    for begin in range(0, 4096, 1024):
        logits = step(executor, row(tokens, begin, begin + 1024, blocks))
    assert_close(logits, reference_logits(arch, weights, tokens)[-1:])


def check_exact(arch: Architecture, weights: RandomWeights, folder: Path) -> None:
    """Compare a prefill chunk and five decode steps with the reference."""
    executor = OpenVinoExecutor(folder, arch, SETTINGS)
    tokens, blocks = tokens_of(40, 8), blocks_of(3, 1)
    expected = reference_logits(arch, weights, tokens)
    assert_close(step(executor, row(tokens, 0, 35, blocks)), expected[34:35])
    for place in range(35, 40):
        logits = step(executor, row(tokens, place, place + 1, blocks))
        assert_close(logits, expected[place : place + 1])


@pytest.mark.parametrize(
    "packing",
    [
        Packing(group_size=32, symmetric=False),
        Packing(group_size=64),
        Packing(group_size=128),
        Packing(bits=8, group_size=32),
        Packing(bits=8, group_size=64, symmetric=False),
    ],
    ids=str,
)
def test_the_default_multiplies_int8_activations_of_matching_groups(
    packing: Packing, tmp_path: Path
) -> None:
    """Against a model of its arithmetic; float activations would be off by 0.07 (rms) here."""
    if not multiplies_integers():
        pytest.skip("this processor has no integer dot product")
    weights = export(ARCH, tmp_path, packing)
    settings = replace(TUNED, kv_precision="f32")
    tokens = tokens_of(200, 9)
    logits = decode(OpenVinoExecutor(tmp_path, ARCH, settings), tokens, ascending(200))
    group = 32 if packing.group_size == 32 else 64
    expected = reference_logits(ARCH, weights, tokens, activation_group=group)
    # A sum that rounds to the other int8 now and then is what remains.
    assert rms(logits - expected) < 0.02
    assert agreement(logits, expected) >= 0.98


def test_the_default_differs_from_the_reference_only_where_two_tokens_are_close(
    folder: Path, weights: RandomWeights
) -> None:
    """A random model's top two are often close: half the gaps are under 0.4, of deviation 1.7."""
    tokens = tokens_of(250, 11)
    logits = decode(OpenVinoExecutor(folder, ARCH, TUNED), tokens, ascending(250))
    expected = reference_logits(ARCH, weights, tokens)
    assert agreement(logits, expected) >= 0.9
    top = np.sort(expected, axis=-1)
    gaps = (top[:, -1] - top[:, -2])[logits.argmax(-1) != expected.argmax(-1)]
    assert (gaps < 0.5).all()
    clear = top[:, -1] - top[:, -2] > 0.15
    assert agreement(logits[clear], expected[clear]) >= 0.95


def agreement(logits: Logits, expected: Array) -> float:
    return float((logits.argmax(-1) == expected.argmax(-1)).mean())


def rms(difference: Array) -> float:
    return float(np.sqrt((difference**2).mean()))


def ascending(tokens: int) -> Blocks:
    return np.arange(-(-tokens // 32), dtype=np.int32)


def multiplies_integers() -> bool:
    flags = Path("/proc/cpuinfo")
    return not flags.exists() or "vnni" in flags.read_text() or "asimddp" in flags.read_text()


def test_kv_memory_is_what_the_compiled_graph_asks_for(
    folder: Path, weights: RandomWeights
) -> None:
    heads = ARCH.layers * ARCH.kv_heads
    expected = {
        "f32": 2 * 32 * 4,
        "f16": 2 * 32 * 2,
        # Scale and zero-point of 4 bytes each per token, for its key and for its value.
        "u8": 32 + 8 + 32 + 8,
        "u4": 16 + 8 + 16 + 8,
    }
    for precision in ("f32", "f16", "u8", "u4"):
        settings = replace(TUNED, kv_precision=precision, kv_tokens=65)
        assert OpenVinoExecutor(folder, ARCH, settings).kv == PagedGeometry(
            block_tokens=32, blocks=3, bytes_per_token=heads * expected[precision]
        )


@pytest.mark.parametrize("precision", ["u8", "u4"])
def test_logits_do_not_change_with_chunks_nor_with_tokens_taken_back(
    precision: KvPrecision, tmp_path: Path
) -> None:
    """Heads of 64 values, whose keys have two scales each."""
    kinds = (LayerKind(rope=Rope.plain(10000.0, 64)),)
    arch = replace(ARCH, heads=2, kv_heads=1, head_size=64, kinds=kinds)
    export(arch, tmp_path, Packing())
    executor = OpenVinoExecutor(tmp_path, arch, replace(TUNED, kv_precision=precision))
    tokens, other, blocks = tokens_of(50, 15), tokens_of(50, 16), blocks_of(3, 1)
    step(executor, row(tokens, 0, 45, blocks))
    expected = decode_from(executor, tokens, 45, blocks)
    for begin in range(0, 45, 9):
        step(executor, row(tokens, begin, begin + 9, blocks))
    # Guesses that turn out wrong: their keys are written, then overwritten.
    step(executor, row(other, 45, 50, blocks))
    np.testing.assert_array_equal(decode_from(executor, tokens, 45, blocks), expected)


def decode_from(executor: OpenVinoExecutor, tokens: Tokens, begin: int, blocks: Blocks) -> Logits:
    """Logits of tokens from `begin` on, one step each."""
    steps = [step(executor, row(tokens, i, i + 1, blocks)) for i in range(begin, len(tokens))]
    return np.concatenate(steps)


@pytest.mark.parametrize(("context", "step", "rows"), [(1, 1, 1), (2, 64, 4), (256, 3, 4)])
def test_the_narrowest_limits_still_load(
    context: int, step: int, rows: int, folder: Path, weights: RandomWeights
) -> None:
    settings = replace(
        SETTINGS, kv_tokens=1, context_tokens=context, step_tokens=step, step_rows=rows
    )
    executor = OpenVinoExecutor(folder, ARCH, settings)
    assert executor.kv.blocks == 1
    assert executor.limits.step_rows == rows


PLAIN = Row(tokens=np.array([1, 2]), past=0, blocks=blocks_of(5))

BAD_ROWS = {
    "row 0: token 203: must be below 203": replace(PLAIN, tokens=np.array([5, 203])),
    "row 0: token -1: must be below 203": replace(PLAIN, tokens=np.array([-1])),
    "row 0: 0 tokens after 0: must be some, up to 256": replace(
        PLAIN, tokens=np.array([], np.int64)
    ),
    "row 0: 2 tokens after 255: must be some, up to 256": replace(PLAIN, past=255),
    "row 0: 2 tokens after -1: must be some, up to 256": replace(PLAIN, past=-1),
    "row 0: 0 blocks: 2 tokens need 1": replace(PLAIN, blocks=None),
    "row 0: 1 blocks: 34 tokens need 2": replace(PLAIN, past=32),
    f"row 0: block {BLOCKS}: must be below {BLOCKS}": replace(PLAIN, blocks=blocks_of(BLOCKS)),
    "row 0: block -1: must be below": replace(PLAIN, blocks=blocks_of(-1)),
    "65 tokens in a step: at most 64": replace(
        PLAIN, tokens=np.zeros(65, np.int64), blocks=blocks_of(1, 2, 3)
    ),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_row_outside_the_limits_is_refused_and_the_others_live_on(
    message: str, executor: OpenVinoExecutor
) -> None:
    good = row(tokens_of(40, 13), 0, 40, blocks_of(3, 1))
    before = step(executor, good)
    with pytest.raises(ExecutionError, match=re.escape(message)):
        step(executor, BAD_ROWS[message])
    np.testing.assert_array_equal(step(executor, good), before)


def test_too_many_rows_and_any_copies_are_refused(executor: OpenVinoExecutor) -> None:
    with pytest.raises(ExecutionError, match="5 rows in a step: at most 4"):
        step(executor, *[PLAIN] * 5)
    with pytest.raises(ExecutionError, match="copies"):
        executor.execute(ExecutorStep(rows=(PLAIN,), copies=((0, 1, 2),)))


def test_a_closed_executor_names_the_step_it_could_not_run(executor: OpenVinoExecutor) -> None:
    executor.close()
    with pytest.raises(ExecutionError, match="1 rows and 2 tokens: the executor is closed"):
        step(executor, PLAIN)


BAD_SETTINGS = {
    "kv_tokens = 0": replace(SETTINGS, kv_tokens=0),
    "kv_tokens = 1000000000000: must be what fits": replace(SETTINGS, kv_tokens=10**12),
    "step_tokens = 0": replace(SETTINGS, step_tokens=0),
    "step_rows = 0": replace(SETTINGS, step_rows=0),
    "context_tokens = 257": replace(SETTINGS, context_tokens=257),
    "threads = 0": replace(SETTINGS, threads=0),
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_a_setting_out_of_range_is_named(
    message: str, folder: Path, weights: RandomWeights
) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenVinoExecutor(folder, ARCH, BAD_SETTINGS[message])


@pytest.mark.parametrize("version", ["2026.3.0", "2026.5.0-1234-abcdef", "2027.4.0", "2026.41"])
def test_another_minor_version_of_the_library_is_refused(version: str) -> None:
    check_library(f"{OPENVINO}.1")
    with pytest.raises(ConfigError, match=re.escape(f"openvino = {version!r}")):
        check_library(version)


def test_a_graph_of_another_version_or_model_is_refused(
    folder: Path, weights: RandomWeights, tmp_path: Path
) -> None:
    for other in (replace(ARCH, layers=3), replace(ARCH, kv_heads=4), replace(ARCH, vocab=204)):
        with pytest.raises(BundleError, match="not a graph of the manifest's architecture"):
            OpenVinoExecutor(folder, other, SETTINGS)
    text = (folder / "model.xml").read_text()
    (tmp_path / "model.bin").write_bytes((folder / "model.bin").read_bytes())
    (tmp_path / "model.xml").write_text(text.replace(f'value="{OPENVINO}.', 'value="2026.3.'))
    with pytest.raises(BundleError, match=r"written by OpenVINO 2026\.3\..*must be 2026\.4"):
        OpenVinoExecutor(tmp_path, ARCH, SETTINGS)
    (tmp_path / "model.xml").write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match="cannot read it"):
        OpenVinoExecutor(tmp_path, ARCH, SETTINGS)


def test_memory_is_flat_over_two_hundred_steps_of_any_shape(
    executor: OpenVinoExecutor,
) -> None:
    rng = np.random.default_rng(14)
    for total in range(1, 33):
        step(executor, random_row(rng, total, 0))
    for _ in range(100):
        step(executor, *random_rows(rng))
    before = resident_bytes()
    for _ in range(200):
        step(executor, *random_rows(rng))
    assert resident_bytes() - before < 4 << 20


def random_rows(rng: np.random.Generator) -> list[Row]:
    count = int(rng.integers(1, SETTINGS.step_rows + 1))
    return [random_row(rng, int(rng.integers(1, 9)), index) for index in range(count)]


def random_row(rng: np.random.Generator, count: int, index: int) -> Row:
    past = int(rng.integers(0, 150))
    blocks = np.arange(6 * index, 6 * index + 6, dtype=np.int32)
    tokens = rng.integers(0, ARCH.vocab, count)
    return Row(
        tokens=tokens, past=past, blocks=blocks, logits=int(rng.integers(0, min(count, 4) + 1))
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_executor_loads_neither_torch_nor_the_converters() -> None:
    program = (
        "import sys, tidegate.edge.executors.openvino\n"
        "print([n for n in ('torch', 'openvino', 'onnxruntime', 'tidegate.converters')"
        " if n in sys.modules])"
    )
    paths = [path for path in sys.path if path.endswith(("runtime", "edge"))]
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("precision", ["u8", "u4", "f16"])
def test_kv_copied_to_other_blocks_of_another_executor_gives_the_same_logits(
    folder: Path, precision: KvPrecision
) -> None:
    settings = replace(TUNED, kv_precision=precision)
    one, other = (OpenVinoExecutor(folder, ARCH, settings) for _ in range(2))
    assert isinstance(one, SpillingKv)
    assert one.kv_layout == other.kv_layout
    tokens = tokens_of(70, 5)
    for past in (0, 48):
        expected = step(one, row(tokens, past, min(past + 48, 70), blocks_of(3, 11, 7)))
    step(other, row(tokens_of(64, 6), 0, 64, blocks_of(2, 9)))
    step(other, row(tokens, 64, 70, blocks_of(20, 5, 8)))
    for source, target in ((3, 20), (11, 5)):
        data = one.read_kv(KvUnit(home=source))
        assert len(data) == one.unit_bytes
        other.write_kv(KvUnit(home=target), data)
        assert other.read_kv(KvUnit(home=target)) == data
    # The same chunks: how a step is cut changes the last bits.
    first = step(one, row(tokens, 64, 70, blocks_of(3, 11, 1)))
    np.testing.assert_array_equal(step(other, row(tokens, 64, 70, blocks_of(20, 5, 8))), first)
    np.testing.assert_allclose(first, expected, atol=0.5)
    one.close()
    other.close()


def test_units_that_are_not_there_are_refused(executor: OpenVinoExecutor) -> None:
    data = executor.read_kv(KvUnit(home=0))
    with pytest.raises(ExecutionError, match="whole block below 24"):
        executor.read_kv(KvUnit(home=24))
    with pytest.raises(ExecutionError, match="whole block"):
        executor.write_kv(KvUnit(home=0, first=32), data)
    with pytest.raises(ExecutionError, match=f"must be {len(data)}"):
        executor.write_kv(KvUnit(home=0), data[1:])
    executor.close()
    with pytest.raises(ExecutionError, match="closed"):
        executor.read_kv(KvUnit(home=0))


def test_kv_of_another_precision_has_another_layout(
    folder: Path, executor: OpenVinoExecutor
) -> None:
    other = OpenVinoExecutor(folder, ARCH, TUNED)
    assert other.kv_layout != executor.kv_layout
    other.close()
