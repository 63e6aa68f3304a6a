"""The torch executor: slots, chunks, copies and failures, as the engine will drive it."""

from __future__ import annotations

import numpy as np
import pytest
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.errors import ConfigError, ExecutionError

SETTINGS = TorchSettings(slots=4, context_tokens=64, step_tokens=64)
PROMPT = list(range(3, 24))


@pytest.fixture
def executor() -> TorchExecutor:
    arch = tiny_architecture()
    return TorchExecutor(arch, RandomWeights(arch), SETTINGS)


def row(tokens: list[int], *, past: int, slot: int, logits: int = 1) -> Row:
    return Row(tokens=np.array(tokens), past=past, slot=slot, logits=logits)


def test_a_prompt_in_chunks_ends_in_the_logits_of_the_whole(executor: TorchExecutor) -> None:
    whole = executor.execute(ExecutorStep(rows=(row(PROMPT, past=0, slot=1),))).logits
    first = row(PROMPT[:8], past=0, slot=3, logits=0)
    assert executor.execute(ExecutorStep(rows=(first,))).logits.shape == (0, 203)
    rest = executor.execute(ExecutorStep(rows=(row(PROMPT[8:], past=8, slot=3),))).logits
    assert np.allclose(whole, rest, atol=1e-4)


def test_a_copied_prefix_serves_another_slot(executor: TorchExecutor) -> None:
    whole = executor.execute(ExecutorStep(rows=(row(PROMPT, past=0, slot=0),))).logits
    rest = row(PROMPT[-1:], past=len(PROMPT) - 1, slot=2)
    step = ExecutorStep(rows=(rest,), copies=((0, 2, len(PROMPT) - 1),))
    assert np.allclose(whole, executor.execute(step).logits, atol=1e-4)


def test_a_failed_step_says_so_and_the_next_one_works(executor: TorchExecutor) -> None:
    with pytest.raises(ExecutionError, match="1 rows and 1 tokens"):
        executor.execute(ExecutorStep(rows=(row([999], past=0, slot=0),)))
    assert executor.execute(ExecutorStep(rows=(row([9], past=0, slot=0),))).logits.shape == (1, 203)


def test_a_context_beyond_the_model_is_refused() -> None:
    arch = tiny_architecture(context=128)
    with pytest.raises(ConfigError, match="context_tokens = 4096: must be at most 128"):
        TorchExecutor(arch, RandomWeights(arch), TorchSettings(context_tokens=4096))
