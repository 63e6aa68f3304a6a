"""The executor where there is a GPU: recorded steps, steps fed on the device, memory at rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import gpus
import numpy as np
import pytest
import torch
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.graphs import Graphs
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw

pytestmark = pytest.mark.gpu

SETTINGS = GpuSettings(
    rows=4, context_tokens=256, step_tokens=128, kv_tokens=1024, device=gpus.DEVICE
)
ARCH = replace(tiny_architecture(), head_size=64, qk_norm="head")
PROMPTS = (3, 40, 17)
NEAR = 0.6
"""Of logits whose standard deviation is 7, in bf16: two layers of roundings of 2 ** -9. By rule."""


def opened(*, graphs: Graphs | None = None) -> GpuExecutor:
    return GpuExecutor(ARCH, RandomWeights(ARCH), SETTINGS, graphs=graphs)


def rows(past: Sequence[int], tokens: Sequence[Sequence[int]], fed: bool = False) -> ExecutorStep:
    made = [
        Row(
            tokens=np.array(own),
            past=before,
            blocks=np.arange(place * 16, place * 16 + 16, dtype=np.int32),
            fed=place if fed else None,
        )
        for place, (before, own) in enumerate(zip(past, tokens, strict=True))
    ]
    return ExecutorStep(rows=tuple(made))


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, ARCH.vocab, count).tolist() for count in PROMPTS]


def draws(ahead: int) -> list[Draw]:
    params = [
        SamplingParams(max_tokens=9, temperature=temperature, top_p=top_p)
        for temperature, top_p in ((0.0, 1.0), (0.9, 1.0), (0.9, 0.8))
    ]
    return [
        Draw(params=one, seed=place, position=count + ahead)
        for place, (one, count) in enumerate(zip(params, PROMPTS, strict=True))
    ]


def answered(executor: GpuExecutor, steps: int) -> list[list[int]]:
    """Tokens of every step, each known to the host before the next begins."""
    found = [executor.execute_and_sample(rows([0] * 3, prompts()), draws(0)).tokens.tolist()]
    for step in range(steps):
        past = [count + step for count in PROMPTS]
        one = executor.execute_and_sample(rows(past, [[t] for t in found[-1]]), draws(step + 1))
        found.append(one.tokens.tolist())
    return found


def test_logits_are_near_those_of_the_plain_walk() -> None:
    executor, plain = (
        opened(),
        TorchExecutor(ARCH, RandomWeights(ARCH), TorchSettings(slots=3, context_tokens=256)),
    )
    for past, tokens in (([0] * 3, prompts()), (list(PROMPTS), [[5], [6], [7]])):
        step = rows(past, tokens)
        slots = [replace(row, blocks=None, slot=place) for place, row in enumerate(step.rows)]
        expected = plain.execute(ExecutorStep(rows=tuple(slots))).logits
        assert np.abs(executor.execute(step).logits - expected).max() < NEAR


def test_recorded_steps_give_what_plain_ones_do() -> None:
    executor = opened()
    assert answered(executor, 12) == answered(opened(graphs=Graphs(None)), 12)
    assert answered(executor, 12) == answered(executor, 12)


def test_steps_fed_on_the_device_give_the_same_tokens() -> None:
    executor = opened()
    expected = answered(executor, 8)
    pending = [executor.submit(rows([0] * 3, prompts()), draws(0))]
    found = []
    for step in range(8):
        past = [count + step for count in PROMPTS]
        pending.append(executor.submit(rows(past, [[0]] * 3, fed=True), draws(step + 1)))
        found.append(pending.pop(0).result().tokens.tolist())
    found.append(pending.pop().result().tokens.tolist())
    assert found == expected


@pytest.mark.skipif(gpus.DEVICE == "cpu", reason="a CPU keeps no such book")
def test_a_step_that_was_met_before_allocates_nothing_of_the_device() -> None:
    executor = opened()
    answered(executor, 6)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    answered(executor, 6)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
