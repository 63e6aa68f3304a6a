"""The real engine on the GPU executor: batching, chunks, prefix hits and guesses change no token.

Every answer is held against the one that the plain torch executor gives to the prompt alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toydrafter import ForetellingDrafter
from toyengine import Collected, ask, collect, serving
from wordmodel import write_word_checkpoint

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.pending_step import PendingStep
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.engine.drafts import Drafter
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor, ExecutorStep
from tidegate.engine.request import Priority
from tidegate.engine.sampling import Draw
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.text_files import write_text_files

CONTEXT_TOKENS = 256
ANSWER_TOKENS = 16
SETTINGS = GpuSettings(
    rows=4,
    context_tokens=CONTEXT_TOKENS,
    step_tokens=64,
    kv_tokens=1024,
    activations="fp32",
    device="cpu",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_word_checkpoint(folder / "model", context=CONTEXT_TOKENS)
    (folder / "text").mkdir()
    with Checkpoint.open(folder / "model") as checkpoint:
        write_text_files(checkpoint, folder / "text")
    return folder


def executor_of(folder: Path, settings: GpuSettings = SETTINGS) -> GpuExecutor:
    with Checkpoint.open(folder / "model") as checkpoint:
        return GpuExecutor(checkpoint.decoder, checkpoint.weights(), settings)


@pytest.fixture(scope="module")
def executor(folder: Path) -> Iterator[GpuExecutor]:
    executor = executor_of(folder)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    """What the plain walk answers to each prompt alone."""
    with Checkpoint.open(folder / "model") as checkpoint:
        settings = TorchSettings(slots=1, context_tokens=CONTEXT_TOKENS)
        plain = TorchExecutor(checkpoint.decoder, checkpoint.weights(), settings)
        return asyncio.run(one_by_one(engine_on(plain, folder)))


def engine_on(
    executor: Executor,
    folder: Path,
    *,
    drafters: Sequence[Drafter] = (),
    settings: EngineSettings | None = None,
) -> Engine:
    text = TextModel.load(folder / "text", context_tokens=CONTEXT_TOKENS)
    return Engine(executor, text, model_id="tiny", drafters=drafters, settings=settings)


def prompts() -> list[tuple[int, ...]]:
    """Four of different lengths, the longest far beyond one chunk."""
    rng = np.random.default_rng(4)
    return [tuple(rng.integers(5, 261, n).tolist()) for n in (3, 40, 90, 150)]


async def answer(
    engine: Engine, name: str, prompt: tuple[int, ...], priority: Priority = Priority.NORMAL
) -> Collected:
    """Greedy for two of the prompts, drawn for the others."""
    warm = len(prompt) in (40, 150)
    request = ask(
        name,
        prompt,
        max_tokens=ANSWER_TOKENS,
        temperature=0.8 if warm else 0.0,
        top_p=0.9 if warm else 1.0,
        ignore_eos=True,
        priority=priority,
    )
    async with asyncio.timeout(60):
        return await collect(engine.submit(request))


async def one_by_one(engine: Engine) -> list[tuple[int, ...]]:
    async with serving(engine):
        return [(await answer(engine, "one", prompt)).tokens for prompt in prompts()]


async def together(engine: Engine) -> list[tuple[int, ...]]:
    async with serving(engine):
        answers = [answer(engine, f"r{i}", prompt) for i, prompt in enumerate(prompts())]
        return [one.tokens for one in await asyncio.gather(*answers)]


def test_answers_are_those_of_the_plain_walk_alone_and_together(
    executor: GpuExecutor, folder: Path, expected: list[tuple[int, ...]]
) -> None:
    assert asyncio.run(one_by_one(engine_on(executor, folder))) == expected
    assert asyncio.run(together(engine_on(executor, folder))) == expected


def test_steps_planned_ahead_change_no_token(
    executor: GpuExecutor,
    folder: Path,
    expected: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fed: list[int] = []
    submit = executor.submit

    def counted(step: ExecutorStep, draws: Sequence[Draw]) -> PendingStep:
        fed.append(sum(row.fed is not None for row in step.rows))
        return submit(step, draws)

    monkeypatch.setattr(executor, "submit", counted)
    settings = EngineSettings(speculation=False)
    assert asyncio.run(together(engine_on(executor, folder, settings=settings))) == expected
    assert sum(fed) > 40


def test_a_cached_prefix_changes_no_token(
    executor: GpuExecutor, folder: Path, expected: list[tuple[int, ...]]
) -> None:
    async def twice() -> list[tuple[int, ...]]:
        found = []
        async with serving(engine_on(executor, folder)) as engine:
            for prompt in prompts():
                await answer(engine, "first", prompt)
                again = await answer(engine, "again", prompt)
                assert (again.finished.usage.cached_tokens > 0) == (len(prompt) >= 40)
                found.append(again.tokens)
        return found

    assert asyncio.run(twice()) == expected


def test_guesses_change_no_token(
    executor: GpuExecutor, folder: Path, expected: list[tuple[int, ...]]
) -> None:
    drafter = ForetellingDrafter(dict(zip(prompts(), expected, strict=True)), right=0.85)
    engine = engine_on(executor, folder, drafters=[drafter])
    assert asyncio.run(one_by_one(engine)) == expected
    assert engine.snapshot().accepted_draft_tokens > 15


def test_who_is_preempted_goes_on_with_the_same_tokens(
    folder: Path, expected: list[tuple[int, ...]]
) -> None:
    """The cache holds the longest request and not the others beside it, who come first."""
    executor = executor_of(folder, replace(SETTINGS, kv_tokens=CONTEXT_TOKENS))
    engine = engine_on(executor, folder)

    async def crowded() -> list[tuple[int, ...]]:
        *others, longest = prompts()
        async with serving(engine):
            last = asyncio.create_task(answer(engine, "last", longest, Priority.BACKGROUND))
            while engine.snapshot().generated_tokens < 3:
                await asyncio.sleep(0)
            first = [answer(engine, f"r{i}", one) for i, one in enumerate(others)]
            return [one.tokens for one in await asyncio.gather(*first, last)]

    assert asyncio.run(crowded()) == expected
    assert engine.snapshot().preemptions > 0
