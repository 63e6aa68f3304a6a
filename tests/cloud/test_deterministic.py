"""In deterministic mode a token's logits have the same bits however its step looks.

Through the kernels themselves, interpreted: as a prompt, in chunks, decoded, beside others, and
computed again behind a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from gpus import DEVICE
from hfcheckpoints import tiny_config
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.converters.rounding.rtn import quantise
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.kernels.kernel_set import triton_kernels
from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear
from tidegate.model.registry import describe

SETTINGS = GpuSettings(
    context_tokens=32,
    kv_tokens=33 * 32,
    activations="fp32",
    deterministic=True,
    device=DEVICE,
)
TOKENS = 12
Logits = npt.NDArray[np.float32]


def mixed(role: str, linear: DenseLinear) -> Linear:
    """4 and 8 bits, dense and two factors in one model."""
    if role.endswith(".o"):
        first = DenseLinear(weight=linear.weight[:24])
        return LowRankLinear(
            first=first, second=DenseLinear(weight=np.ascontiguousarray(linear.weight[:, :24]))
        )
    if role.endswith((".gate", ".up")):
        return quantise(linear, bits=8, group_size=32, symmetric=True)
    return linear if role == "embed" else quantise(linear, bits=4, group_size=32, symmetric=False)


def experts() -> Architecture:
    arch = describe(tiny_config("qwen3_moe"))
    assert isinstance(arch, Architecture)
    return replace(arch, layers=1)


def packed() -> Architecture:
    return replace(tiny_architecture(layers=1, width=32), qk_norm="head", attention_softcap=3.0)


class Sequences:
    """Requests on one executor, each with its own blocks, fed as a test wants it."""

    def __init__(self, executor: GpuExecutor, vocab: int) -> None:
        self._executor = executor
        rng = np.random.default_rng(5)
        self._tokens = rng.integers(0, vocab, (32, 32))
        self._tokens[1] = self._tokens[0]
        self._blocks = rng.permutation(32 * 2).astype(np.int32).reshape(32, 2)

    def step(self, rows: Sequence[tuple[int, int, int]]) -> list[Logits]:
        """Logits of every token of each (request, first token, end)."""
        asked = tuple(
            Row(
                tokens=self._tokens[request, first:end],
                past=first,
                blocks=self._blocks[request],
                logits=end - first,
            )
            for request, first, end in rows
        )
        logits = self._executor.execute(ExecutorStep(rows=asked)).logits
        ends = np.cumsum([end - first for _, first, end in rows])
        return np.split(logits, ends[:-1])


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        ("packed", 8),
        pytest.param("packed", 32, marks=pytest.mark.system),
        pytest.param("experts", 32, marks=pytest.mark.system),
    ],
)
def test_a_token_has_the_same_logits_however_it_is_computed(model: str, rows: int) -> None:
    arch = packed() if model == "packed" else experts()
    weights = RandomWeights(arch, quantise=mixed if model == "packed" else None)
    settings = replace(SETTINGS, rows=rows, step_tokens=max(16, rows))
    executor = GpuExecutor(arch, weights, settings, kernels=triton_kernels())
    requests = Sequences(executor, arch.vocab)
    # Request 0: a prompt, then decoded alone.
    decoded = requests.step([(0, 0, TOKENS - 3)])[0]
    for at in range(TOKENS - 3, TOKENS):
        decoded = np.concatenate([decoded, *requests.step([(0, at, at + 1)])])
    # Request 1 has the same tokens: two chunks beside others, then decoded in a full step.
    others = [(number, 0, 1) for number in range(2, rows)]
    chunks = [requests.step([(2, 0, 3), (1, 0, 2)])[1], requests.step([(1, 2, TOKENS - 1)])[0]]
    chunks.append(requests.step([*others, (1, TOKENS - 1, TOKENS)])[-1])
    assert np.array_equal(np.concatenate(chunks), decoded)
    # Request 0 was preempted and comes back: prompt and answer are one prompt now.
    again = requests.step([(0, 0, TOKENS)])[0]
    assert np.array_equal(again, decoded)
