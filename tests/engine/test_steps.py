"""What an engine tells of its steps: all that was computed and sampled, once, to its request."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from toyengine import SHAPES, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor, VirtualClock

from tidegate.engine.events import Failed
from tidegate.engine.executor import PagedGeometry, SlotGeometry
from tidegate.engine.request import RequestId
from tidegate.engine.settings import EngineSettings
from tidegate.engine.steps import StepReport

PLAIN = EngineSettings(prefix_reuse=False, speculation=False)
PROMPTS = {"a": tuple(range(5, 40)), "b": (7, 8, 9), "c": tuple(range(60, 5, -1))}


def told(
    executor: ToyExecutor, settings: EngineSettings = PLAIN
) -> tuple[list[StepReport], dict[str, Collected]]:
    """Every report of an engine that answers `PROMPTS` at once, and the answers."""
    reports: list[StepReport] = []

    async def run() -> dict[str, Collected]:
        async with serving(toy_engine(executor, settings=settings, watcher=reports.append)) as one:
            answers = [one.submit(ask(name, prompt)) for name, prompt in PROMPTS.items()]
            ended = await asyncio.gather(*(collect(answer) for answer in answers))
            return dict(zip(PROMPTS, ended, strict=True))

    return reports, asyncio.run(run())


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_add_up_to_prompts_and_answers(shape: PagedGeometry | SlotGeometry) -> None:
    reports, answers = told(ToyExecutor(shape, step_tokens=16))
    prompts, computed, sampled = Counter[str](), Counter[str](), Counter[str]()
    for report in reports:
        for one in report.shares:
            assert one.past_tokens == prompts[one.request_id] + computed[one.request_id]
            (prompts if one.is_prompt else computed)[one.request_id] += one.computed_tokens
            sampled[one.request_id] += one.sampled_tokens
    assert prompts == {name: len(prompt) for name, prompt in PROMPTS.items()}
    tokens = {name: answer.finished.usage.completion_tokens for name, answer in answers.items()}
    assert sampled == tokens
    # The last token of an answer is never computed.
    assert computed == {name: count - 1 for name, count in tokens.items() if count > 1}


def test_guessed_tokens_are_sampled_ones_where_they_held() -> None:
    reports, answers = told(ToyExecutor(SHAPES[0]), EngineSettings())
    for name, answer in answers.items():
        shares = [share for report in reports for share in report.shares]
        sampled = sum(share.sampled_tokens for share in shares if share.request_id == name)
        assert sampled == answer.finished.usage.completion_tokens


def test_a_step_says_how_long_it_took() -> None:
    clock = VirtualClock()
    behaviour = Behaviour(clock=clock, step_s=0.25, token_s=0.01)
    reports, _ = told(ToyExecutor(SHAPES[0], behaviour=behaviour))
    for report in reports:
        tokens = sum(one.computed_tokens for one in report.shares)
        assert report.elapsed_s == pytest.approx(0.25 + 0.01 * tokens)
    assert sum(report.elapsed_s for report in reports) == pytest.approx(clock.now_s)
    assert reports[-1].ended_s == clock.now_s


def test_a_step_that_failed_took_time_and_gave_nothing() -> None:
    clock = VirtualClock()
    behaviour = Behaviour(clock=clock, step_s=0.25, fails=lambda step: True)
    reports, answers = told(ToyExecutor(SHAPES[0], behaviour=behaviour))
    assert all(isinstance(answer.terminal, Failed) for answer in answers.values())
    assert reports
    assert all(not one.sampled_tokens for report in reports for one in report.shares)
    assert {one.request_id for report in reports for one in report.shares} == {
        RequestId(name) for name in PROMPTS
    }
