"""The GPU executor on a GPU: recorded steps, fed on the device, choose what plain ones do."""

from __future__ import annotations

import numpy as np
import pytest
from gpus import DEVICE
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.graphs import CudaRecorder, Graphs
from tidegate.converters.rounding.rtn import quantise
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.model.packed import DenseLinear, Linear

pytestmark = pytest.mark.gpu

SETTINGS = GpuSettings(
    rows=4, context_tokens=64, step_tokens=64, kv_tokens=256, deterministic=True, device=DEVICE
)
PROMPTS = (7, 12, 1, 30)


def packed(role: str, linear: DenseLinear) -> Linear:
    return quantise(linear, bits=4, group_size=32, symmetric=False)


def draws(ahead: int) -> list[Draw]:
    """Two take the likeliest token, the others draw one."""
    kinds = [
        SamplingParams(max_tokens=40, temperature=warmth, top_p=top_p)
        for warmth, top_p in ((0.0, 1.0), (0.8, 0.9), (0.0, 1.0), (1.2, 1.0))
    ]
    return [
        Draw(params=params, seed=row, position=PROMPTS[row] + ahead)
        for row, params in enumerate(kinds)
    ]


def answers(graphs: Graphs, *, four_bits: bool) -> list[list[int]]:
    """The tokens of every step, each launched before those of the one before it are known."""
    arch = tiny_architecture()
    weights = RandomWeights(arch, quantise=packed if four_bits else None)
    executor = GpuExecutor(arch, weights, SETTINGS, graphs=graphs)
    rng = np.random.default_rng(6)
    blocks = np.arange(16, dtype=np.int32).reshape(4, 4)
    first = tuple(
        Row(tokens=rng.integers(0, arch.vocab, count), past=0, blocks=own)
        for count, own in zip(PROMPTS, blocks, strict=True)
    )
    pending, found = executor.submit(ExecutorStep(rows=first), draws(0)), []
    for ahead in range(1, 20):
        rows = tuple(
            Row(tokens=np.zeros(1, np.int64), past=count + ahead - 1, blocks=own, fed=place)
            for place, (count, own) in enumerate(zip(PROMPTS, blocks, strict=True))
        )
        behind = executor.submit(ExecutorStep(rows=rows), draws(ahead))
        found.append(pending.result().tokens.tolist())
        pending = behind
    found.append(pending.result().tokens.tolist())
    executor.close()
    return found


@pytest.mark.parametrize("four_bits", [False, True])
def test_recorded_steps_choose_the_tokens_of_plain_ones(four_bits: bool) -> None:
    recording = Graphs(CudaRecorder())
    plain = answers(Graphs(), four_bits=four_bits)
    assert answers(recording, four_bits=four_bits) == plain
    assert all(token >= 0 for step in plain for token in step)


def test_a_decode_step_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    answers(Graphs(CudaRecorder()), four_bits=True)
    assert not [record for record in caplog.records if record.name == "tidegate.cloud.graphs"]
