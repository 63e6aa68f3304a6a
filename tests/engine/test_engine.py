"""The loop: one terminal event per request, faults stay with their request, memory is bounded."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toyengine import PAGED, SHAPES, SLOTS, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor, VirtualClock

from tidegate.engine.engine import Engine
from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta
from tidegate.engine.executor import ExecutorStep, Logits, PagedGeometry, SlotGeometry
from tidegate.engine.request import Priority, RequestId
from tidegate.engine.settings import EngineSettings
from tidegate.errors import CapacityError, ConfigError, RequestError, UnavailableError

Shape = PagedGeometry | SlotGeometry

PROMPT = tuple(range(3, 24))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.0005)


def test_an_answer_is_text_then_one_finished_with_its_counts_and_times() -> None:
    async def scenario() -> Collected:
        async with serving(toy_engine(eos=False)) as engine:
            return await collect(engine.submit(ask("r", PROMPT, max_tokens=9)))

    answer = asyncio.run(scenario())
    assert answer.finished.reason == "length"
    assert answer.finished.usage.prompt_tokens == len(PROMPT)
    assert answer.finished.usage.completion_tokens == len(answer.tokens) == 9
    timing = answer.finished.timing
    assert 0 <= timing.first_scheduled_s <= timing.first_token_s <= timing.total_s
    assert answer.text


def test_the_end_token_stops_the_answer_and_is_not_in_it() -> None:
    def ends_at(step: ExecutorStep, logits: Logits) -> Logits:
        if step.rows[0].past >= len(PROMPT) + 4:
            logits[:, 0] = 100
        return logits

    async def scenario(ignore_eos: bool) -> Collected:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(distorts=ends_at))
        async with serving(toy_engine(executor)) as engine:
            request = ask("r", PROMPT, max_tokens=9, ignore_eos=ignore_eos)
            return await collect(engine.submit(request))

    answer = asyncio.run(scenario(False))
    assert answer.finished.reason == "stop"
    assert (answer.finished.usage.completion_tokens, len(answer.tokens)) == (6, 5)
    ignored = asyncio.run(scenario(True))
    assert (ignored.finished.reason, len(ignored.tokens)) == ("length", 9)


def test_a_stop_string_ends_the_answer_before_it() -> None:
    async def scenario(stop: tuple[str, ...]) -> Collected:
        async with serving(toy_engine(eos=False)) as engine:
            return await collect(engine.submit(ask("r", PROMPT, max_tokens=30, stop=stop)))

    whole = asyncio.run(scenario(())).text
    stop = whole[10:14]
    answer = asyncio.run(scenario((stop, "never to be seen")))
    assert answer.finished.reason == "stop"
    assert answer.text == whole[: whole.index(stop)]


def test_an_answer_ends_where_the_context_does() -> None:
    for shape in SHAPES:
        executor = ToyExecutor(shape, context_tokens=32)

        async def scenario(executor: ToyExecutor = executor) -> Collected:
            async with serving(toy_engine(executor, eos=False)) as engine:
                return await collect(engine.submit(ask("r", PROMPT, max_tokens=1000)))

        answer = asyncio.run(scenario())
        assert answer.finished.reason == "length"
        assert len(answer.tokens) == 32 - len(PROMPT)


def test_a_prompt_that_cannot_fit_is_refused_at_submit_with_the_limit() -> None:
    engine = toy_engine(ToyExecutor(PAGED, context_tokens=20))
    with pytest.raises(
        RequestError, match="21 tokens: must be less than the context of 20"
    ) as told:
        engine.submit(ask("r", PROMPT))
    assert told.value.status == 413
    small = toy_engine(ToyExecutor(PagedGeometry(block_tokens=4, blocks=5, bytes_per_token=8)))
    assert small.context_tokens == 20


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    engine = toy_engine()
    for wrong in (-1, 300):
        with pytest.raises(RequestError, match="between 0 and 299"):
            engine.submit(ask("r", (1, wrong)))


def test_a_full_line_is_a_capacity_error_and_the_next_place_is_free_again() -> None:
    async def scenario() -> None:
        engine = toy_engine(settings=EngineSettings(most_waiting=2))
        answers = [engine.submit(ask(f"r{n}", PROMPT)) for n in range(2)]
        with pytest.raises(CapacityError, match="2 requests are waiting") as told:
            engine.submit(ask("r2", PROMPT))
        assert told.value.retry_after_s >= 1
        await answers[0].aclose()
        engine.submit(ask("r2", PROMPT))
        async with serving(engine):
            await collect(answers[1])

    asyncio.run(scenario())


def test_the_line_is_bounded_in_prompt_tokens_too() -> None:
    engine = toy_engine(ToyExecutor(PAGED, context_tokens=20), settings=EngineSettings())
    answers = [engine.submit(ask(f"r{n}", (1,) * 16)) for n in range(20)]
    with pytest.raises(CapacityError, match="336 prompt tokens would be waiting: at most 320"):
        engine.submit(ask("one more", (1,) * 16))
    assert len(answers) == 20


def test_an_id_is_unique_while_it_lives_and_free_afterwards() -> None:
    async def scenario() -> None:
        async with serving(toy_engine()) as engine:
            answer = engine.submit(ask("r", PROMPT))
            with pytest.raises(RequestError, match="already running"):
                engine.submit(ask("r", PROMPT))
            await collect(answer)
            await collect(engine.submit(ask("r", PROMPT)))

    asyncio.run(scenario())


@pytest.mark.parametrize("shape", SHAPES)
def test_cancelling_ends_with_cancelled_and_frees_kv_within_one_step(shape: Shape) -> None:
    async def scenario() -> tuple[Collected, float, int]:
        executor = ToyExecutor(shape)
        async with serving(toy_engine(executor, eos=False)) as engine:
            reading = asyncio.create_task(collect(engine.submit(ask("r", PROMPT, max_tokens=100))))
            await until(lambda: engine.snapshot().generated_tokens > 3)
            assert engine.cancel(RequestId("r"))
            steps = executor.record.steps
            assert not engine.cancel(RequestId("r"))
            answer = await reading
            await until(lambda: engine.snapshot().kv_usage == 0)
            return answer, engine.snapshot().kv_usage, executor.record.steps - steps

    answer, kv_usage, steps = asyncio.run(scenario())
    assert isinstance(answer.terminal, Cancelled)
    assert answer.terminal.usage.completion_tokens >= len(answer.tokens) > 0
    assert kv_usage == 0
    assert steps <= 1


def test_a_request_cancelled_in_flight_gives_its_kv_back_after_the_step_and_hurts_nobody() -> None:
    async def scenario() -> tuple[Collected, Collected]:
        gate = threading.Event()
        executor = ToyExecutor(PAGED, behaviour=Behaviour(gate=gate))
        async with serving(toy_engine(executor)) as engine:
            leaving = asyncio.create_task(collect(engine.submit(ask("leaving", PROMPT))))
            staying = asyncio.create_task(collect(engine.submit(ask("staying", PROMPT))))
            await until(lambda: engine.snapshot().running == 2)
            engine.cancel(RequestId("leaving"))
            left = await leaving
            held = engine.snapshot().kv_usage
            gate.set()
            await until(lambda: engine.snapshot().kv_usage < held)
            return left, await staying

    left, stayed = asyncio.run(scenario())
    assert isinstance(left.terminal, Cancelled)
    assert left.tokens == ()
    assert isinstance(stayed.terminal, Finished)


@pytest.mark.parametrize("leaving", ["close", "drop", "cancel the reader"])
def test_leaving_an_answer_aborts_its_request(leaving: str) -> None:
    async def scenario() -> None:
        async with serving(toy_engine(eos=False)) as engine:
            answer = engine.submit(ask("r", PROMPT, max_tokens=100))
            await anext(answer)
            if leaving == "close":
                await answer.aclose()
            elif leaving == "drop":
                del answer
                gc.collect()
            else:
                reading = asyncio.create_task(collect(answer))
                await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait({reading})
            await until(lambda: engine.snapshot().cancelled == 1)
            await until(lambda: engine.snapshot().kv_usage == 0)
            assert engine.snapshot().generated_tokens < 100

    asyncio.run(scenario())


def test_a_closed_answer_gives_nothing_more() -> None:
    async def scenario() -> None:
        async with serving(toy_engine(eos=False)) as engine:
            answer = engine.submit(ask("r", PROMPT, max_tokens=100))
            await anext(answer)
            await answer.aclose()
            await answer.aclose()
            assert [event async for event in answer] == []

    asyncio.run(scenario())


def test_a_slow_reader_gets_one_joined_delta_and_holds_nobody_back() -> None:
    async def scenario() -> list[object]:
        async with serving(toy_engine(eos=False)) as engine:
            slow = engine.submit(ask("slow", PROMPT, max_tokens=30))
            await collect(engine.submit(ask("fast", PROMPT, max_tokens=60)))
            await until(lambda: engine.snapshot().finished == 2)
            return [event async for event in slow]

    delta, finished = asyncio.run(scenario())
    assert isinstance(delta, TextDelta)
    assert len(delta.tokens) == 30
    assert isinstance(finished, Finished)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_step_ends_only_its_own_requests(shape: Shape) -> None:
    def fails(step: ExecutorStep) -> bool:
        return any(299 in row.tokens for row in step.rows)

    async def scenario() -> tuple[Collected, Collected, Collected]:
        executor = ToyExecutor(shape, step_rows=1, behaviour=Behaviour(fails=fails))
        async with serving(toy_engine(executor)) as engine:
            answers = await asyncio.gather(
                collect(engine.submit(ask("good", PROMPT, ignore_eos=True, max_tokens=5))),
                collect(engine.submit(ask("bad", (*PROMPT, 299)))),
            )
            # The prefix it shared with the one that failed must not be reused.
            after = await collect(engine.submit(ask("good", PROMPT, ignore_eos=True, max_tokens=5)))
            assert engine.snapshot().healthy
            return *answers, after

    good, bad, after = asyncio.run(scenario())
    assert isinstance(bad.terminal, Failed)
    assert (bad.terminal.code, bad.terminal.retryable) == ("execution_failed", False)
    assert good.tokens == after.tokens
    assert good.finished.reason == "length"


@pytest.mark.parametrize("shape", SHAPES)
def test_one_request_that_breaks_its_step_takes_nobody_along(shape: Shape) -> None:
    def fails(step: ExecutorStep) -> bool:
        return any(299 in row.tokens for row in step.rows)

    prompts = {f"r{n}": (*range(3 + n, 20 + n), *([299] if n in (2, 5) else [])) for n in range(9)}

    async def scenario(names: list[str], behaviour: Behaviour) -> dict[str, Collected]:
        async with serving(toy_engine(ToyExecutor(shape, behaviour=behaviour))) as engine:
            answers = (collect(engine.submit(ask(name, prompts[name]))) for name in names)
            return dict(zip(names, await asyncio.gather(*answers), strict=True))

    answers = asyncio.run(scenario(list(prompts), Behaviour(fails=fails)))
    for name, answer in answers.items():
        if 299 in prompts[name]:
            assert isinstance(answer.terminal, Failed)
        else:
            assert answer.tokens == asyncio.run(scenario([name], Behaviour()))[name].tokens


def test_suspects_run_without_anybody_else_until_the_culprit_is_alone() -> None:
    failed: list[int] = []

    def fails(step: ExecutorStep) -> bool:
        if poisoned := any(299 in row.tokens for row in step.rows):
            failed.append(len(step.rows))
        return poisoned

    async def scenario() -> None:
        executor = ToyExecutor(PAGED, step_tokens=256, behaviour=Behaviour(fails=fails))
        async with serving(toy_engine(executor)) as engine:
            asked = [ask(f"r{n}", (*range(9, 20), 299 if n == 5 else n)) for n in range(8)]
            await asyncio.gather(*(collect(engine.submit(one)) for one in asked))

    asyncio.run(scenario())
    assert failed == [8, 4, 2, 1]


def test_a_step_that_fails_once_costs_nobody_an_answer() -> None:
    failures = iter([False, False, True])

    async def scenario(behaviour: Behaviour) -> list[Collected]:
        async with serving(toy_engine(ToyExecutor(PAGED, behaviour=behaviour))) as engine:
            asked = [ask(f"r{n}", tuple(range(3 + n, 20 + n))) for n in range(5)]
            return await asyncio.gather(*(collect(engine.submit(one)) for one in asked))

    shaken = asyncio.run(scenario(Behaviour(fails=lambda step: next(failures, False))))
    assert [one.tokens for one in shaken] == [
        one.tokens for one in asyncio.run(scenario(Behaviour()))
    ]


def test_an_executor_that_always_fails_ends_everything_soon() -> None:
    async def scenario() -> tuple[list[Collected], int]:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(fails=lambda step: True))
        async with serving(toy_engine(executor)) as engine:
            asked = [ask(f"r{n}", tuple(range(3 + n, 20 + n))) for n in range(8)]
            ends = await asyncio.gather(*(collect(engine.submit(one)) for one in asked))
            return ends, executor.record.steps

    ends, steps = asyncio.run(scenario())
    assert all(isinstance(end.terminal, Failed) for end in ends)
    assert steps <= 16


def test_an_executor_that_only_fails_is_unhealthy_until_it_succeeds() -> None:
    broken = True

    async def scenario() -> None:
        nonlocal broken
        executor = ToyExecutor(PAGED, behaviour=Behaviour(fails=lambda step: broken))
        async with serving(toy_engine(executor)) as engine:
            health = []
            for n in range(16):
                health.append(engine.snapshot().healthy)
                await collect(engine.submit(ask(f"r{n}", PROMPT)))
            assert health == [True] * 16
            assert not engine.snapshot().healthy
            assert engine.snapshot().failed_steps == 16
            broken = False
            await collect(engine.submit(ask("r", PROMPT)))
            assert engine.snapshot().healthy

    asyncio.run(scenario())


def test_any_exception_of_the_executor_is_the_steps_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    raised = iter([ZeroDivisionError("secret detail"), None])

    def distorts(step: ExecutorStep, logits: Logits) -> Logits:
        if (error := next(raised, None)) is not None:
            raise error
        return logits

    async def scenario() -> list[Collected]:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(distorts=distorts))
        async with serving(toy_engine(executor)) as engine:
            return [await collect(engine.submit(ask(name, PROMPT))) for name in ("one", "two")]

    with caplog.at_level(logging.CRITICAL):
        bad, good = asyncio.run(scenario())
    assert isinstance(bad.terminal, Failed)
    assert "ZeroDivisionError" in bad.terminal.message
    assert "secret" not in bad.terminal.message
    assert isinstance(good.terminal, Finished)


@pytest.mark.parametrize("worth", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_fail_their_row_and_not_their_neighbour(worth: float) -> None:
    def distorts(step: ExecutorStep, logits: Logits) -> Logits:
        wanting = [row for row in step.rows if row.logits]
        for index, row in enumerate(wanting):
            if 299 in row.tokens:
                logits[index] = worth
        return logits

    async def scenario() -> tuple[Collected, Collected]:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(distorts=distorts))
        async with serving(toy_engine(executor)) as engine:
            return await asyncio.gather(
                collect(engine.submit(ask("good", PROMPT))),
                collect(engine.submit(ask("bad", (*PROMPT, 299)))),
            )

    good, bad = asyncio.run(scenario())
    assert isinstance(good.terminal, Finished)
    assert isinstance(bad.terminal, Failed)
    assert "not numbers" in bad.terminal.message


def test_logits_of_the_wrong_shape_fail_the_step() -> None:
    async def scenario() -> Collected:
        behaviour = Behaviour(distorts=lambda step, logits: logits[:, :7])
        async with serving(toy_engine(ToyExecutor(PAGED, behaviour=behaviour))) as engine:
            return await collect(engine.submit(ask("r", PROMPT)))

    terminal = asyncio.run(scenario()).terminal
    assert isinstance(terminal, Failed)
    assert "shape (1, 7): must be (1, 300)" in terminal.message


def test_draining_finishes_what_runs_and_refuses_what_waits_and_what_comes() -> None:
    async def scenario() -> tuple[bool, list[Collected]]:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(step_s=0.005))
        async with serving(toy_engine(executor, eos=False)) as engine:
            reading = [
                asyncio.create_task(collect(engine.submit(ask(f"r{n}", PROMPT)))) for n in range(12)
            ]
            await until(lambda: engine.snapshot().generated_tokens > 0)
            assert (engine.snapshot().running, engine.snapshot().waiting) == (8, 4)
            draining = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0)
            assert not engine.snapshot().accepting
            with pytest.raises(UnavailableError):
                engine.submit(ask("late", PROMPT))
            return await draining, await asyncio.gather(*reading)

    drained, answers = asyncio.run(scenario())
    assert drained
    assert all(isinstance(answer.terminal, Finished) for answer in answers[:8])
    for answer in answers[8:]:
        assert isinstance(answer.terminal, Failed)
        assert (answer.terminal.code, answer.terminal.retryable) == ("unavailable", True)
        assert not answer.tokens


def test_draining_too_slowly_fails_the_rest_to_be_retried() -> None:
    async def scenario() -> tuple[bool, Collected]:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(step_s=0.01))
        async with serving(toy_engine(executor, eos=False)) as engine:
            reading = asyncio.create_task(collect(engine.submit(ask("r", PROMPT, max_tokens=100))))
            await until(lambda: engine.snapshot().generated_tokens > 0)
            return await engine.drain(0.02), await reading

    drained, answer = asyncio.run(scenario())
    assert not drained
    assert isinstance(answer.terminal, Failed)
    assert answer.terminal.retryable


def test_an_engine_with_nothing_to_do_drains_at_once() -> None:
    assert asyncio.run(toy_engine().drain(0.1))


def test_stopping_the_loop_ends_every_request_and_waits_for_the_step_in_flight() -> None:
    async def scenario() -> list[Collected]:
        executor = ToyExecutor(PAGED, behaviour=Behaviour(step_s=0.02))
        engine = toy_engine(executor, eos=False)
        loop = asyncio.create_task(engine.run())
        reading = [
            asyncio.create_task(collect(engine.submit(ask(f"r{n}", PROMPT, max_tokens=100))))
            for n in range(12)
        ]
        await until(lambda: engine.snapshot().generated_tokens > 0)
        loop.cancel()
        await asyncio.wait({loop})
        assert loop.cancelled()
        executor.close()  # no step may touch it from here on
        with pytest.raises(UnavailableError):
            engine.submit(ask("late", PROMPT))
        assert not engine.snapshot().healthy
        return await asyncio.gather(*reading)

    for answer in asyncio.run(scenario()):
        assert isinstance(answer.terminal, Failed)
        assert (answer.terminal.code, answer.terminal.retryable) == ("unavailable", True)


def test_work_without_progress_is_unhealthy_and_no_work_is_not() -> None:
    async def scenario() -> list[bool]:
        clock, gate = VirtualClock(), threading.Event()
        executor = ToyExecutor(PAGED, behaviour=Behaviour(clock=clock, gate=gate))
        engine = toy_engine(executor, settings=EngineSettings(stall_after_s=5))
        async with serving(engine):
            clock.advance(60)
            health = [engine.snapshot().healthy]
            reading = asyncio.create_task(collect(engine.submit(ask("r", PROMPT))))
            await until(lambda: engine.snapshot().running == 1)
            for seconds in (4, 2):
                clock.advance(seconds)
                health.append(engine.snapshot().healthy)
            gate.set()
            await reading
            return [*health, engine.snapshot().healthy]

    assert asyncio.run(scenario()) == [True, True, False, True]


def test_the_rates_are_those_of_the_executor() -> None:
    async def scenario() -> Engine:
        behaviour = Behaviour(clock=VirtualClock(), step_s=0.25, token_s=0.05)
        engine = toy_engine(ToyExecutor(PAGED, behaviour=behaviour), eos=False)
        async with serving(engine):
            await collect(engine.submit(ask("r", tuple(range(15)), max_tokens=11)))
        return engine

    now = asyncio.run(scenario()).snapshot()
    assert now.prefill_tokens_per_s == pytest.approx(15)
    assert now.decode_step_s == pytest.approx(0.3)
    assert now.request_s == pytest.approx(1.0 + 10 * 0.3)
    assert (now.prompt_tokens, now.generated_tokens, now.steps) == (15, 11, 11)


def test_the_loop_sleeps_while_there_is_nothing_to_do() -> None:
    async def scenario() -> int:
        executor = ToyExecutor(PAGED)
        async with serving(toy_engine(executor)):
            await asyncio.sleep(0.05)
            return executor.record.steps

    assert asyncio.run(scenario()) == 0


def test_deadlines_order_the_line() -> None:
    async def scenario() -> list[str]:
        order: list[str] = []
        engine = toy_engine(ToyExecutor(SLOTS, step_rows=1))

        async def read(name: str, deadline_s: float | None, priority: Priority) -> None:
            request = ask(name, PROMPT, max_tokens=3, deadline_s=deadline_s, priority=priority)
            await collect(engine.submit(request))
            order.append(name)

        normal = Priority.NORMAL
        waiting = [
            asyncio.create_task(read("background", 1.0, Priority.BACKGROUND)),
            asyncio.create_task(read("no deadline", None, normal)),
            asyncio.create_task(read("late", 9.0, normal)),
            asyncio.create_task(read("soon", 5.0, normal)),
            asyncio.create_task(read("interactive", None, Priority.INTERACTIVE)),
        ]
        await asyncio.sleep(0)
        async with serving(engine):
            await asyncio.gather(*waiting)
        return order

    assert asyncio.run(scenario()) == ["interactive", "soon", "late", "no deadline", "background"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_interactive_request_gets_in_even_when_background_ones_hold_all_kv(shape: Shape) -> None:
    rows = 4 if shape is SLOTS else 3
    executor = ToyExecutor(shape, context_tokens=128, step_rows=8)

    async def scenario() -> list[bool]:
        async with serving(toy_engine(executor, eos=False)) as engine:
            background = [
                ask(f"b{n}", (n, *PROMPT), max_tokens=106, priority=Priority.BACKGROUND)
                for n in range(rows)
            ]
            slow = [asyncio.create_task(collect(engine.submit(one))) for one in background]
            full = 0.99 if shape is SLOTS else 0.8
            await until(lambda: engine.snapshot().kv_usage >= full)
            urgent = ask("i", tuple(range(40, 140)), max_tokens=2, priority=Priority.INTERACTIVE)
            await collect(engine.submit(urgent))
            over = [one.done() for one in slow]
            await asyncio.gather(*slow)
            return over

    assert not any(asyncio.run(scenario()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"most_waiting": 0},
        {"chunk_tokens": 0},
        {"prefill_reserve_tokens": -1},
        {"stall_after_s": 0.0},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineSettings(**wrong)


def test_a_defect_of_the_engine_itself_costs_the_requests_it_met_and_not_the_loop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[Collected]:
        async with serving(toy_engine()) as engine:
            kv = engine._batcher.kv
            with monkeypatch.context() as broken:
                broken.setattr(kv, "grow", lambda key, tokens: 1 // 0)
                bad = await collect(engine.submit(ask("bad", PROMPT)))
            return [bad, await collect(engine.submit(ask("good", PROMPT)))]

    with caplog.at_level(logging.CRITICAL):
        bad, good = asyncio.run(scenario())
    assert isinstance(bad.terminal, Failed)
    assert bad.terminal.code == "internal_error"
    assert isinstance(good.terminal, Finished)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([PAGED, SLOTS, replace(PAGED, blocks=34)]),
    step_tokens=st.integers(2, 30),
    fates=st.lists(
        st.tuples(
            st.integers(0, 60),
            st.integers(1, 30),
            st.sampled_from(["read", "read", "cancel", "close", "drop"]),
            st.integers(0, 6),
        ),
        min_size=1,
        max_size=14,
    ),
    failing=st.integers(0, 12),
)
def test_every_request_ends_once_whatever_is_cancelled_and_whatever_fails(
    shape: Shape, step_tokens: int, fates: list[tuple[int, int, str, int]], failing: int
) -> None:
    def fails(step: ExecutorStep) -> bool:
        return (
            bool(failing) and sum(len(row.tokens) + row.past for row in step.rows) % 13 == failing
        )

    async def live(engine: Engine, name: str, fate: tuple[int, int, str, int]) -> None:
        prompt_tokens, most, how, patience = fate
        answer = engine.submit(ask(name, tuple(range(3, 4 + prompt_tokens)), max_tokens=most))
        if how == "read":
            await collect(answer)
            return
        for _ in range(patience):
            await asyncio.sleep(0.0003)
        if how == "cancel":
            engine.cancel(RequestId(name))
            await collect(answer)
        elif how == "close":
            await answer.aclose()

    async def scenario() -> None:
        executor = ToyExecutor(shape, step_tokens=step_tokens, behaviour=Behaviour(fails=fails))
        engine = toy_engine(executor)
        async with serving(engine):
            await asyncio.gather(*(live(engine, f"r{n}", fate) for n, fate in enumerate(fates)))
            gc.collect(0)
            assert await engine.drain(10)
            await until(lambda: engine.snapshot().kv_usage == 0)
            engine._batcher.kv.check_integrity()
            now = engine.snapshot()
            assert now.finished + now.failed + now.cancelled == len(fates)

    asyncio.run(scenario())
