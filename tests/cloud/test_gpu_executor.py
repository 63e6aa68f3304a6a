"""The GPU executor's control flow, with the references in the kernels' place, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import write_checkpoint
from hfcheckpoints import tiny_config
from packedlinears import random_packed
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud import gpu_executor
from tidegate.cloud.draw_buffers import AskShape, DrawBuffers
from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.graphs import Graphs
from tidegate.cloud.step_buffers import StepBuffers, StepShape
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.converters.rounding.rtn import quantise
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.errors import CheckpointError, ConfigError, ExecutionError
from tidegate.kernels.kernel_set import triton_kernels
from tidegate.kernels.linear import Int8Linear, TiledLinear
from tidegate.kernels.linear.workspace import single_weights
from tidegate.kernels.paged_kv import KvPrecision
from tidegate.kernels.pointwise import PackedTable
from tidegate.kernels.sampling.asks import SamplingAsks
from tidegate.kernels.weight_loading import load_weights
from tidegate.model.architecture import Architecture
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear, dense_weight
from tidegate.model.registry import describe, known_model_types
from tidegate.model.resident import ResidentWeights

SETTINGS = GpuSettings(
    rows=4, context_tokens=64, step_tokens=64, kv_tokens=256, activations="fp32", device="cpu"
)
TOLERANCE = 2e-5
"""On logits of scale 10: float32 sums in another order."""
DECODERS = [name for name in known_model_types() if name not in ("bert", "distilbert")]

Logits = npt.NDArray[np.float32]
Chunks = tuple[tuple[int, int, int], ...]
"""(request, tokens, logits) of each row of a step."""

STEPS: tuple[Chunks, ...] = (
    ((0, 13, 1), (1, 1, 1), (2, 7, 0)),
    ((2, 11, 2), (0, 1, 1), (3, 17, 1)),
    ((0, 1, 1), (1, 1, 1), (3, 1, 1)),
    ((1, 20, 0),),
    ((3, 3, 3), (0, 1, 1), (1, 1, 1), (2, 1, 1)),
)
"""Prompts, chunks of them, decode and guesses; all four requests at once in the last."""
BLOCKS = ((0, 9, 3), (7, 2, 11), (5, 1, 4), (6, 10, 8))


def run(executor: Executor, vocab: int, steps: tuple[Chunks, ...] = STEPS) -> list[Logits]:
    """What each step gives; a request's place is its slot, or blocks in no order."""
    past, found = [0, 0, 0, 0], []
    rng = np.random.default_rng(1)
    paged = executor.kv.kind == "paged"
    for step in steps:
        rows = []
        for request, tokens, logits in step:
            rows.append(
                Row(
                    tokens=rng.integers(0, vocab, tokens),
                    past=past[request],
                    blocks=np.array(BLOCKS[request], np.int32) if paged else None,
                    slot=None if paged else request,
                    logits=logits,
                )
            )
            past[request] += tokens
        found.append(executor.execute(ExecutorStep(rows=tuple(rows))).logits)
    return found


def reference(arch: Architecture, weights: RandomWeights) -> list[Logits]:
    settings = TorchSettings(slots=4, context_tokens=64, step_tokens=64)
    return run(TorchExecutor(arch, weights, settings), arch.vocab)


def differences(one: list[Logits], other: list[Logits]) -> list[float]:
    assert [len(logits) for logits in one] == [sum(row[2] for row in step) for step in STEPS]
    return [float(np.abs(a - b).max()) if len(a) else 0.0 for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("model_type", DECODERS)
def test_ragged_steps_give_the_logits_of_the_plain_walk(model_type: str) -> None:
    arch = _described(model_type)
    weights = RandomWeights(arch)
    found = run(GpuExecutor(arch, weights, SETTINGS), arch.vocab)
    assert max(differences(found, reference(arch, weights))) < TOLERANCE


CHANGES: dict[str, Callable[[Architecture], Architecture]] = {
    "a window": lambda arch: replace(arch, kinds=(replace(arch.kinds[0], window=5),)),
    "no rotation": lambda arch: replace(arch, kinds=(replace(arch.kinds[0], rope=None),)),
    "softcaps": lambda arch: replace(arch, attention_softcap=2.0, head_softcap=3.0),
    "biases": lambda arch: replace(arch, qkv_bias=True, o_bias=True, mlp_bias=True),
    "row norms and a cut": lambda arch: replace(arch, qk_norm="row", qkv_clip=0.8),
    "head norms and a cut": lambda arch: replace(arch, qk_norm="head", qkv_clip=0.8),
    "a cut alone": lambda arch: replace(arch, qkv_clip=0.5),
    "norms behind": lambda arch: replace(arch, norm_before=False, norm_after=True),
    "norms on both sides": lambda arch: replace(arch, norm_after=True),
    "scales": lambda arch: replace(arch, embed_scale=3.0, residual_scale=0.3, head_scale=0.5),
    "an own head": lambda arch: replace(arch, tied_head=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_feature_of_an_architecture_gives_the_logits_of_the_plain_walk(change: str) -> None:
    arch = CHANGES[change](tiny_architecture())
    weights = RandomWeights(arch)
    found = run(GpuExecutor(arch, weights, SETTINGS), arch.vocab)
    assert max(differences(found, reference(arch, weights))) < TOLERANCE


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.25), ("fp8", 1.2)])
def test_eight_bit_keys_and_values_stay_near(precision: KvPrecision, most: float) -> None:
    """On logits whose standard deviation is 7: the widest found is 0.11 and 0.6."""
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    executor = GpuExecutor(arch, weights, replace(SETTINGS, kv_precision=precision))
    found = differences(run(executor, arch.vocab), reference(arch, weights))
    assert 0 < max(found) < most
    assert executor.kv.bytes_per_token == 2 * 2 * 2 * (32 + 4)


def test_a_step_leaves_everything_where_it_is() -> None:
    arch = tiny_architecture()
    executor = GpuExecutor(arch, RandomWeights(arch), SETTINGS)
    before = sorted(executor.addresses())
    run(executor, arch.vocab)
    draw = Draw(params=SamplingParams(max_tokens=1), seed=0, position=1)
    row = Row(tokens=np.array([3]), past=0, blocks=np.array([0], np.int32))
    executor.execute_and_sample(ExecutorStep(rows=(row,)), [draw])
    executor.submit(ExecutorStep(rows=(replace(row, past=1, fed=0),)), [draw]).result()
    assert sorted(executor.addresses()) == before


def test_steps_that_fill_every_limit_need_no_more_than_was_allocated() -> None:
    arch = tiny_architecture()
    executor = GpuExecutor(arch, RandomWeights(arch), SETTINGS)
    most = executor.limits
    each = most.step_tokens // most.step_rows
    run(executor, arch.vocab, (tuple((request, each, 2) for request in range(4)),))
    run(executor, arch.vocab, (((0, 48, 8),),))
    deep = [Row(tokens=np.array([1]), past=63, blocks=np.array([0, 1, 2, 3], np.int32))] * 4
    assert executor.execute(ExecutorStep(rows=tuple(deep))).logits.shape == (4, 203)


class Recording:
    """A recorder that runs the body again at each replay, and counts both."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            body()

        return replay


def test_decode_steps_are_recorded_by_shape_and_replayed_on_new_numbers() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    recorder = Recording()
    executor = GpuExecutor(arch, weights, SETTINGS, graphs=Graphs(recorder))
    decode = (((0, 1, 1), (1, 1, 1), (3, 1, 1)), ((1, 1, 1), (3, 1, 1), (0, 1, 1), (2, 1, 1)))
    steps = (STEPS[0], *decode, *decode)
    settings = TorchSettings(slots=4, context_tokens=64, step_tokens=64)
    expected = run(TorchExecutor(arch, weights, settings), arch.vocab, steps)
    for one, other in zip(run(executor, arch.vocab, steps), expected, strict=True):
        assert np.allclose(one, other, atol=TOLERANCE)
    # Three rows and four are one shape; the first of them is recorded behind its plain run.
    assert (recorder.recorded, recorder.replayed) == (1, 3)


class Refusing:
    """A recorder of a device that can record nothing, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        self.asked += 1
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_recorded_runs_plainly_and_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    recorder = Refusing()
    executor = GpuExecutor(arch, weights, SETTINGS, graphs=Graphs(recorder))
    decode = ((0, 1, 1), (1, 1, 1), (3, 1, 1))
    steps = (STEPS[0], decode, decode)
    settings = TorchSettings(slots=4, context_tokens=64, step_tokens=64)
    expected = run(TorchExecutor(arch, weights, settings), arch.vocab, steps)
    for one, other in zip(run(executor, arch.vocab, steps), expected, strict=True):
        assert np.allclose(one, other, atol=TOLERANCE)
    assert recorder.asked == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_staging_is_written_at_start_before_the_device_has_read_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arch, seen = tiny_architecture(), list[str]()
    fill, load = StepBuffers.fill, DrawBuffers.load

    def filled(self: StepBuffers, rows: Sequence[Row], shape: StepShape, size: int) -> torch.Tensor:
        seen.append("step")
        return fill(self, rows, shape, size)

    def loaded(
        self: DrawBuffers, draws: Sequence[Draw | None], rows: int
    ) -> tuple[AskShape, SamplingAsks]:
        seen.append("draw")
        return load(self, draws, rows)

    monkeypatch.setattr(StepBuffers, "fill", filled)
    monkeypatch.setattr(DrawBuffers, "load", loaded)
    # What a device does late, the references here have done at once.
    monkeypatch.setattr(gpu_executor, "wait_for", lambda at: seen.append("waited"))
    GpuExecutor(arch, RandomWeights(arch), SETTINGS, warm=True).close()
    assert {"step", "draw"} == set(seen[::2])
    assert {"waited"} == set(seen[1::2])


def test_a_failed_step_says_so_and_the_next_one_works() -> None:
    arch = tiny_architecture()
    executor = GpuExecutor(arch, RandomWeights(arch), SETTINGS)
    wrong = Row(tokens=np.array([999]), past=0, blocks=np.array([0], np.int32))
    with pytest.raises(ExecutionError, match="1 rows and 1 tokens"):
        executor.execute(ExecutorStep(rows=(wrong,)))
    right = replace(wrong, tokens=np.array([9]))
    assert executor.execute(ExecutorStep(rows=(right,))).logits.shape == (1, 203)


def test_memory_that_does_not_suffice_is_refused_with_the_sum() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    settings = replace(SETTINGS, kv_tokens=None, memory_mib=4)
    executor = GpuExecutor(arch, weights, settings)
    assert executor.kv.blocks > 64, "what is left becomes KV"
    with pytest.raises(ConfigError, match=r"memory_mib = 3: must be at least \d+, which is\n  wei"):
        GpuExecutor(arch, weights, replace(settings, memory_mib=3, kv_tokens=4096))
    with pytest.raises(ConfigError, match="the weights alone: 271,744 in fp32"):
        GpuExecutor(arch, weights, replace(settings, memory_mib=1))
    with pytest.raises(ConfigError, match="kv_tokens = 32: must be at least 64"):
        GpuExecutor(arch, weights, replace(settings, kv_tokens=32))
    with pytest.raises(ConfigError, match="kv_tokens = None: must be given"):
        GpuExecutor(arch, weights, replace(settings, memory_mib=None))


def test_a_context_beyond_the_model_is_refused() -> None:
    arch = tiny_architecture(context=128)
    with pytest.raises(ConfigError, match="context_tokens = 4096: must be at most 128"):
        GpuExecutor(arch, RandomWeights(arch), replace(SETTINGS, context_tokens=4096))


def quantised(role: str, linear: DenseLinear) -> Linear:
    """4 and 8 bits with and without zero-points, and an output that is two factors."""
    if role.endswith(".o"):
        first = DenseLinear(weight=linear.weight[:24])
        second = DenseLinear(weight=np.ascontiguousarray(linear.weight[:, :24]))
        return LowRankLinear(first=first, second=second)
    eight = role.endswith("k") or role == "embed"
    return quantise(linear, bits=8 if eight else 4, group_size=32, symmetric=role.endswith("v"))


def test_packed_weights_give_the_logits_of_what_they_stand_for() -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch, quantise=quantised)
    executor = GpuExecutor(arch, weights, SETTINGS)
    assert max(differences(run(executor, arch.vocab), reference(arch, weights))) < TOLERANCE


def eight_bits(role: str, linear: DenseLinear) -> Linear:
    """8 bits, with and without zero-points, and an output that is two factors of them."""
    if role.endswith(".o"):
        first = quantise(
            DenseLinear(weight=linear.weight[:24]), bits=8, group_size=32, symmetric=True
        )
        second = DenseLinear(weight=np.ascontiguousarray(linear.weight[:, :24]), bias=linear.bias)
        return LowRankLinear(
            first=first, second=quantise(second, bits=8, group_size=None, symmetric=True)
        )
    return quantise(linear, bits=8, group_size=32, symmetric=role.endswith("v"))


def test_eight_bits_meet_eight_bits_where_they_are_asked_for() -> None:
    """On logits whose standard deviation is 7: the widest found is 0.7."""
    arch = replace(tiny_architecture(), qkv_bias=True)
    weights = RandomWeights(arch, quantise=eight_bits)
    settings = replace(SETTINGS, int8_activations=True)
    found = differences(
        run(GpuExecutor(arch, weights, settings), arch.vocab), reference(arch, weights)
    )
    assert 0.01 < max(found) < 1.0
    loaded = load_weights(arch, weights, dtype=torch.float32, device="cpu", int8_activations=True)
    kinds = {type(one) for one in single_weights(loaded.products())}
    assert kinds == {Int8Linear, TiledLinear}, "the head is tiled"


def test_eight_bit_activations_are_refused_by_name_where_no_weight_takes_them() -> None:
    arch, settings = tiny_architecture(), replace(SETTINGS, int8_activations=True)
    with pytest.raises(ConfigError, match="int8_activations = True: must be off for a model"):
        GpuExecutor(arch, RandomWeights(arch), settings)

    def narrow(role: str, linear: DenseLinear) -> Linear:
        return random_packed(linear.outputs, linear.inputs, 16, bits=8)

    with pytest.raises(ConfigError, match="group_size = 16: must be a multiple of 32"):
        GpuExecutor(arch, RandomWeights(arch, quantise=narrow), settings)


def test_a_packed_table_is_kept_packed_and_once_where_it_is_the_head_too() -> None:
    for tied in (True, False):
        arch = tiny_architecture(tied_head=tied)
        weights = RandomWeights(arch, quantise=quantised)
        loaded = load_weights(arch, weights, dtype=torch.float32, device="cpu")
        table = loaded.table(loaded.linear("embed"))
        assert isinstance(table, TiledLinear if tied else PackedTable)
        executor = GpuExecutor(arch, weights, SETTINGS)
        found = differences(run(executor, arch.vocab), reference(arch, weights))
        assert max(found) < TOLERANCE


KERNEL_CASES: dict[str, Callable[[], Architecture]] = {
    "packed": lambda: replace(
        tiny_architecture(layers=1, width=32), qk_norm="head", attention_softcap=3.0
    ),
    "experts": lambda: replace(
        _described("qwen3_moe"), layers=1, embed_scale=3.0, residual_scale=0.5, head_softcap=5.0
    ),
}


def _described(model_type: str) -> Architecture:
    arch = describe(tiny_config(model_type))
    assert isinstance(arch, Architecture)
    return arch


def test_the_kernels_of_eight_bits_give_what_their_references_do() -> None:
    arch = replace(tiny_architecture(layers=1, width=32), tied_head=False)
    weights = RandomWeights(arch, quantise=eight_bits)
    settings = replace(SETTINGS, step_tokens=32, int8_activations=True)
    found = run(GpuExecutor(arch, weights, settings, kernels=triton_kernels()), arch.vocab)
    expected = run(GpuExecutor(arch, weights, settings), arch.vocab)
    # A value between two integers may be rounded to either: one 127th of a token's largest.
    assert max(differences(found, expected)) < 0.2
    assert float(np.median(differences(found, expected))) < TOLERANCE


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_kernels_give_what_their_references_do(case: str) -> None:
    """In float32 through Triton's interpreter."""
    arch = KERNEL_CASES[case]()
    weights = RandomWeights(arch, quantise=quantised if case == "packed" else None)
    settings = replace(SETTINGS, step_tokens=32)
    executor = GpuExecutor(arch, weights, settings, kernels=triton_kernels())
    assert max(differences(run(executor, arch.vocab), reference(arch, weights))) < TOLERANCE


def test_weights_of_16_bits_go_to_the_device_as_they_are_in_the_file(tmp_path: Path) -> None:
    arch = replace(tiny_architecture(), qkv_bias=False)
    folder = write_checkpoint(tmp_path / "model", arch, RandomWeights(arch), shards=2)
    settings = replace(SETTINGS, activations="bf16")
    with Checkpoint.open(folder) as checkpoint:
        weights = checkpoint.weights()
        stored = weights.stored("layers.0.q")
        assert stored is not None
        assert stored.bfloat
        bits = stored.values.astype(np.uint32) << 16
        assert np.array_equal(bits.view(np.float32), dense_weight(weights.linear("layers.0.q")))
        found = run(GpuExecutor(checkpoint.decoder, weights, settings), arch.vocab)
        widened = ResidentWeights(weights)  # has no `stored`
        expected = run(GpuExecutor(checkpoint.decoder, widened, settings), arch.vocab)
        loaded = [
            load_weights(checkpoint.decoder, one, dtype=torch.bfloat16, device="cpu")
            for one in (weights, widened)
        ]
    assert max(differences(found, expected)) == 0
    assert loaded[0].nbytes == loaded[1].nbytes, "a table that is the head too is counted once"


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    arch = tiny_architecture()
    weights = RandomWeights(arch)
    broken = weights.linear("layers.1.down")
    assert isinstance(broken, DenseLinear)
    broken.weight[3, 5] = np.inf
    folder = write_checkpoint(tmp_path / "model", arch, weights)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.1\.down: holds numbers that are not finite"),
    ):
        GpuExecutor(checkpoint.decoder, checkpoint.weights(), SETTINGS)
