"""What a step may not do once everything is warm: take memory, or ask for a compilation.

The kernels' launches are recorded and not run; what is launched does not depend on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import gpus
import numpy as np
import pytest
import torch
from hfcheckpoints import tiny_config
from launches import Allocations, Launch, recorded
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.converters.rounding.rtn import quantise
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.kernels.kernel_set import triton_kernels
from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear, Linear, LowRankLinear
from tidegate.model.registry import describe

pytestmark = pytest.mark.skipif(gpus.DEVICE == "cuda", reason="needs Triton's interpreter")

SETTINGS = GpuSettings(
    rows=12,
    context_tokens=700,
    step_tokens=1100,
    kv_tokens=12 * 704,
    activations="fp16",
    device="cpu",
)


def four_bits(role: str, linear: DenseLinear) -> Linear:
    """Gate and up packed differently, so that they are not merged, and an output of two factors."""
    if role.endswith(".o"):
        first = DenseLinear(weight=linear.weight[:24])
        second = DenseLinear(weight=np.ascontiguousarray(linear.weight[:, :24]))
        return LowRankLinear(first=first, second=second)
    bits = 8 if role.endswith(".up") or role == "embed" else 4
    return quantise(linear, bits=bits, group_size=32, symmetric=role.endswith("v"))  # type: ignore[arg-type]


def four_bits_of_experts(role: str, linear: DenseLinear) -> Linear:
    if role.endswith(".router"):
        return linear
    return quantise(linear, bits=4, group_size=32, symmetric=False)


def eight_bits(role: str, linear: DenseLinear) -> Linear:
    return quantise(linear, bits=8, group_size=32, symmetric=True)


def _described(model_type: str) -> Architecture:
    arch = describe(tiny_config(model_type))
    assert isinstance(arch, Architecture)
    return replace(arch, context=1024)


def _wide() -> Architecture:
    return tiny_architecture(layers=1, context=1024)


Quantise = Callable[[str, DenseLinear], Linear] | None
CASES: dict[str, tuple[Callable[[], Architecture], Quantise, dict[str, object]]] = {
    "dense with biases": (lambda: replace(_wide(), qkv_bias=True, mlp_bias=True), None, {}),
    "4 bits": (_wide, four_bits, {}),
    "4 bits in one order": (_wide, four_bits, {"deterministic": True}),
    "8 bits": (lambda: replace(_wide(), tied_head=False), eight_bits, {"int8_activations": True}),
    "8-bit keys": (_wide, None, {"kv_precision": "int8"}),
    "cuts, caps and scales": (
        lambda: replace(
            _wide(), qk_norm="row", qkv_clip=0.8, attention_softcap=2.0, head_softcap=3.0,
            embed_scale=3.0, residual_scale=0.3, head_scale=0.5, norm_after=True,
        ),
        None,
        {},
    ),
    "a window": (lambda: replace(_wide(), kinds=(replace(_wide().kinds[0], window=40),)), None, {}),
    "experts": (lambda: _described("qwen3_moe"), None, {}),
    "packed experts": (lambda: _described("qwen3_moe"), four_bits_of_experts, {}),
}  # fmt: skip


def opened(case: str) -> tuple[GpuExecutor, Architecture]:
    make, quantised, changes = CASES[case]
    arch = make()
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    weights = RandomWeights(arch, quantise=quantised)
    return GpuExecutor(arch, weights, settings, kernels=triton_kernels(), warm=True), arch


def draws(vocab: int) -> list[Draw]:
    """Of every depth, with biases and masks among them."""
    mask = np.full(-(-vocab // 32), 2**32 - 1, np.uint32)
    kinds = (
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=9, temperature=0.7),
        SamplingParams(max_tokens=9, temperature=0.7, top_p=0.9),
        SamplingParams(max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1),
        SamplingParams(max_tokens=9, temperature=0.0, logit_bias=((1, 2.0),)),
    )
    plain = [Draw(params=params, seed=7, position=3) for params in kinds]
    return plain + [replace(one, allowed=mask) for one in plain]


def steps(vocab: int) -> Iterator[tuple[ExecutorStep, list[Draw]]]:
    """Prompts, chunks, guesses and decode steps of many sizes, each with its draws."""
    kinds, blocks = draws(vocab), np.arange(12 * 44, dtype=np.int32).reshape(12, 44)

    def step(*rows: tuple[int, int, int]) -> tuple[ExecutorStep, list[Draw]]:
        made = tuple(
            Row(tokens=np.zeros(new, np.int64), past=past, blocks=own, logits=logits)
            for (new, past, logits), own in zip(rows, blocks, strict=False)
        )
        count = sum(logits for _, _, logits in rows)
        first = sum(new for new, _, _ in rows)
        return ExecutorStep(rows=made), [kinds[(first + n) % len(kinds)] for n in range(count)]

    for count in (1, 2, 3, 5, 7, 12):
        for past in (0, 15, 130, 511, 600):
            yield step(*[(1, past, 1)] * count)
    for new in (1, 2, 3, 4, 5, 8, 9, 16, 31, 33, 64, 65, 100, 129, 250, 513, 699):
        yield step((new, 0, 1))
        yield step((new, 0, 0))
        yield step((new, 1, min(new, 8)), (1, 300, 1), (3, 77, 3))
    for new in (2, 5, 8):
        yield step(*[(new, 40, new if new < 3 else 2)] * 11)
    for draw in kinds:
        yield ExecutorStep(rows=step((1, 5, 1))[0].rows), [draw]


@pytest.mark.parametrize("case", CASES)
def test_serving_launches_no_kernel_in_a_way_that_was_not_compiled_at_start(case: str) -> None:
    with recorded() as warm:
        executor, arch = opened(case)
    with recorded() as serving:
        for step, wishes in steps(arch.vocab):
            submit(executor, step, wishes)
    new = serving - warm
    assert serving
    assert not new, "\n".join(f"{name}: {nearest(name, way, warm)}" for name, way in new)


def submit(executor: GpuExecutor, step: ExecutorStep, wishes: Sequence[Draw]) -> None:
    if wishes:
        executor.submit(step, wishes)
    else:
        executor.execute(step)


def nearest(name: str, way: tuple[tuple[str, str], ...], warm: set[Launch]) -> str:
    """What sets a way apart from the one that is most like it."""
    alike = [set(way) ^ set(other) for kernel, other in warm if kernel == name]
    return str(min(alike, key=len, default="never launched"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_no_memory(case: str) -> None:
    with recorded():
        executor, arch = opened(case)
        for step, wishes in [one for one in steps(arch.vocab) if one[1]][::5]:
            executor.submit(step, wishes)
            with Allocations() as counted:
                executor.submit(step, wishes)
            assert counted.found == [], step


def test_both_would_be_noticed() -> None:
    arch = _wide()
    weights = RandomWeights(arch, quantise=four_bits)
    with recorded() as warm:
        executor = GpuExecutor(arch, weights, SETTINGS, kernels=triton_kernels(), warm=False)
    with recorded() as serving:
        for step, wishes in steps(arch.vocab):
            submit(executor, step, wishes)
    missed = {name for name, _ in serving - warm}
    assert {"few_kernel", "decode", "search", "draw_tokens"} <= missed
    with Allocations() as counted:
        torch.cat([torch.ones(2), torch.ones(2)])
        torch.ones(4).view(2, 2).add_(1)
    assert counted.found == ["aten.ones.default"] * 2 + ["aten.cat.default", "aten.ones.default"]
