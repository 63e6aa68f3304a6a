"""What each process of a team runs in tests: a few models, one after another, the same steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from hfcheckpoints import tiny_config
from tinymodel import RandomWeights, tiny_architecture

from tidegate.cloud import team
from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.sharding import Part
from tidegate.cloud.team import Team
from tidegate.converters.rounding.rtn import quantise
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.model.architecture import Architecture
from tidegate.model.packed import DenseLinear, Linear
from tidegate.model.registry import describe

SETTINGS = GpuSettings(
    rows=4, context_tokens=64, step_tokens=64, kv_tokens=256, activations="fp32", device="cpu"
)
WORLD = 2


def models() -> Iterator[tuple[str, Architecture, RandomWeights]]:
    """Of every kind that is cut in its own way; their vocabulary is odd."""
    biased = replace(tiny_architecture(), qkv_bias=True, o_bias=True, mlp_bias=True)
    yield "tied and biased", biased, RandomWeights(biased)
    single = replace(tiny_architecture(tied_head=False), kv_heads=1, qk_norm="head")
    yield "one key/value head", single, RandomWeights(single)
    experts = describe(tiny_config("qwen3_moe"))
    assert isinstance(experts, Architecture)
    yield "experts", experts, RandomWeights(experts)
    packed = tiny_architecture()
    yield "packed", packed, RandomWeights(packed, quantise=_packed)


def _packed(role: str, linear: DenseLinear) -> Linear:
    return quantise(linear, bits=4, group_size=32, symmetric=False)


def steps(vocab: int) -> list[ExecutorStep]:
    """A prompt, a chunk beside a decode, and decode steps of two."""
    rng = np.random.default_rng(2)
    blocks = [np.array(own, np.int32) for own in ((3, 0), (5, 1))]

    def row(request: int, count: int, past: int) -> Row:
        return Row(tokens=rng.integers(0, vocab, count), past=past, blocks=blocks[request])

    return [
        ExecutorStep(rows=(row(0, 11, 0),)),
        ExecutorStep(rows=(row(0, 1, 11), row(1, 20, 0))),
        ExecutorStep(rows=(row(0, 1, 12), row(1, 1, 20))),
        ExecutorStep(rows=(row(0, 1, 13), row(1, 1, 21))),
    ]


def all_logits(executor: GpuExecutor, vocab: int) -> npt.NDArray[np.float32]:
    """The logits of all steps, one below another."""
    return np.concatenate([executor.execute(step).logits for step in steps(vocab)])


def fed_tokens(executor: GpuExecutor, vocab: int) -> npt.NDArray[np.int64]:
    """Tokens of two rows, each step fed with those of the one before without being told them."""
    rng = np.random.default_rng(5)
    blocks = [np.array(own, np.int32) for own in ((3, 0), (5, 1))]
    draw = Draw(params=SamplingParams(max_tokens=8, temperature=0.0), seed=0, position=0)
    found, past = [], (7, 12)
    for ahead in range(4):
        rows = tuple(
            Row(tokens=rng.integers(0, vocab, count), past=0, blocks=own)
            if ahead == 0
            else Row(tokens=np.zeros(1, np.int64), past=count + ahead - 1, blocks=own, fed=place)
            for place, (count, own) in enumerate(zip(past, blocks, strict=True))
        )
        found.append(executor.submit(ExecutorStep(rows=rows), [draw, draw]).result().tokens)
    return np.concatenate(found)


def idle_member(rank: int, meeting: Path) -> None:
    """One process of a team whose exchanges may take a second, and that has none for two."""
    team.TIMEOUT_S = 1.0  # type: ignore[misc]
    mine = Team(Part(rank=rank, world=WORLD), meeting, vocab=203, device=torch.device("cpu"))
    assert mine.union([rank + 1, 5], most=8) == [1, 2, 5]
    if rank:
        assert mine.listen() is None
    else:
        time.sleep(2.5)
        mine.dismiss()
    mine.leave()


def member(rank: int, meeting: Path, folder: Path) -> None:
    """Run as one process of the team; the first writes what it got to `folder`."""
    torch.set_num_threads(1)
    part = Part(rank=rank, world=WORLD)
    mine = Team(part, meeting, vocab=203, device=torch.device("cpu"))
    for name, arch, weights in models():
        executor = GpuExecutor(arch, weights, SETTINGS, team=mine)
        if rank:
            executor.follow()
        else:
            np.save(folder / f"{name.replace('/', ' ')}.npy", all_logits(executor, arch.vocab))
            np.save(folder / f"{name.replace('/', ' ')} fed.npy", fed_tokens(executor, arch.vocab))
            executor.close()
    mine.leave()
