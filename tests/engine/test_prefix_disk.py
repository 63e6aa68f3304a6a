"""The disk tier: what was computed before a restart is loaded, and never changes an answer."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memorystore import MemoryStore
from toyengine import PAGED, SHAPES, SLOTS, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor

from tidegate.engine.engine import Engine
from tidegate.engine.executor import ExecutorStep, PagedGeometry, SlotGeometry
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.request import Constraint, GenerationRequest
from tidegate.engine.settings import EngineSettings
from tidegate.engine.spill import KvUnit
from tidegate.errors import ExecutionError

Shape = PagedGeometry | SlotGeometry
PREFIX = tuple(range(40, 120))


def engine_with(
    store: MemoryStore,
    shape: Shape = PAGED,
    *,
    executor: ToyExecutor | None = None,
    model: bytes = b"model",
    least_tokens: int = 16,
) -> tuple[Engine, ToyExecutor]:
    executor = executor or ToyExecutor(shape)
    disk = DiskPrefixes(store, executor, model_digest=model, least_tokens=least_tokens)
    return toy_engine(executor, eos=False, disk=disk), executor


async def answered(engine: Engine, request: GenerationRequest) -> Collected:
    return await collect(engine.submit(request))


async def life(engine: Engine, *requests: GenerationRequest) -> list[Collected]:
    """Start, answer one after another, stop in order: as a process does."""
    async with serving(engine):
        collected = [await answered(engine, one) for one in requests]
        await engine.drain(5)
        return collected


async def alone(shape: Shape, request: GenerationRequest) -> Collected:
    return (await life(toy_engine(ToyExecutor(shape), eos=False), request))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_a_prefix_survives_a_restart_and_is_not_computed_again(shape: Shape) -> None:
    async def test() -> None:
        store = MemoryStore()
        first, _ = engine_with(store, shape)
        await life(first, ask("a", (*PREFIX, 1, 2, 3)))
        again, executor = engine_with(store, shape)
        (answer,) = await life(again, ask("b", (*PREFIX, 9, 9)))
        assert answer.tokens == (await alone(shape, ask("b", (*PREFIX, 9, 9)))).tokens
        assert answer.finished.usage.cached_tokens == 80
        assert executor.record.rows[0] == ((80, 2),)
        now = again.snapshot()
        assert (now.disk_hit_tokens, now.prefix_hit_tokens) == (80, 80)
        assert now.disk is not None
        assert now.disk.units == len(store.kept)

    asyncio.run(test())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_what_memory_still_has_is_not_loaded(shape: Shape) -> None:
    async def test() -> None:
        store = MemoryStore()
        engine, _ = engine_with(store, shape)
        first = ask("a", (*PREFIX, 1))
        answers = await life(engine, first, ask("b", (*PREFIX, 2)))
        assert answers[1].finished.usage.cached_tokens == 80
        assert store.loads == 0
        assert engine.snapshot().disk_hit_tokens == 0
        assert len(store.used) > 0, "a hit in memory keeps the unit on disk too"

    asyncio.run(test())


def test_a_missing_unit_ends_the_load_and_the_rest_is_computed() -> None:
    async def test() -> None:
        store = MemoryStore()
        await life(engine_with(store)[0], ask("a", (*PREFIX, 1)))
        store.damaged = lambda load: load == 6
        again, executor = engine_with(store)
        (answer,) = await life(again, ask("b", (*PREFIX, 9)))
        assert answer.tokens == (await alone(PAGED, ask("b", (*PREFIX, 9)))).tokens
        assert answer.finished.usage.cached_tokens == 20
        assert executor.record.rows[0] == ((20, 61),)

    asyncio.run(test())


@pytest.mark.parametrize("other", ["model", "layout"])
def test_units_of_another_model_or_layout_never_match(other: str) -> None:
    async def test() -> None:
        store = MemoryStore()
        await life(engine_with(store)[0], ask("a", (*PREFIX, 1)))
        executor = ToyExecutor(PAGED)
        if other == "layout":
            executor.kv_layout += ", u4"
        model = b"another" if other == "model" else b"model"
        again, _ = engine_with(store, executor=executor, model=model)
        (answer,) = await life(again, ask("b", (*PREFIX, 1)))
        assert answer.finished.usage.cached_tokens == 0
        assert store.loads == 0

    asyncio.run(test())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_a_request_that_asks_for_no_reuse_leaves_nothing_and_takes_nothing(shape: Shape) -> None:
    async def test() -> None:
        store = MemoryStore()
        private = ask("a", (*PREFIX, 1), reuse=False)
        engine, _ = engine_with(store, shape)
        answers = await life(engine, private, ask("b", (*PREFIX, 1)))
        assert [one.finished.usage.cached_tokens for one in answers] == [0, 0]
        again, _ = engine_with(store, shape)
        (third,) = await life(again, ask("c", (*PREFIX, 1), reuse=False))
        assert third.finished.usage.cached_tokens == 0
        assert third.tokens == answers[0].tokens == answers[1].tokens

        empty = MemoryStore()
        await life(engine_with(empty, shape)[0], private)
        assert empty.kept == {}

    asyncio.run(test())


def test_short_prefixes_are_not_worth_a_file() -> None:
    async def test() -> None:
        store = MemoryStore()
        engine, _ = engine_with(store, least_tokens=64)
        await life(engine, ask("a", tuple(range(30)), max_tokens=8))
        assert store.kept == {}

    asyncio.run(test())


def test_a_long_load_leaves_steps_to_those_who_run() -> None:
    async def test() -> None:
        store = MemoryStore()
        padded = ToyExecutor(PAGED, unit_padding_bytes=3 << 20)
        await life(engine_with(store, executor=padded)[0], ask("a", (*PREFIX, 1), max_tokens=1))
        executor = ToyExecutor(PAGED, unit_padding_bytes=3 << 20)
        engine, _ = engine_with(store, executor=executor)
        async with serving(engine):
            other = engine.submit(ask("other", (1, 2, 3), max_tokens=90))
            await anext(other)
            steps = executor.record.steps
            answer = await collect(engine.submit(ask("b", (*PREFIX, 9), max_tokens=1)))
            assert answer.finished.usage.cached_tokens == 80
            # One unit of 3 MiB at a time: twenty steps in which the other one went on.
            assert executor.record.steps - steps >= 20
            await collect(other)

    asyncio.run(test())


def test_a_step_that_fails_under_a_load_costs_no_answer() -> None:
    async def test() -> None:
        store = MemoryStore()
        await life(engine_with(store)[0], ask("a", (*PREFIX, 1), max_tokens=1))
        failing = [True]

        def fails(step: ExecutorStep) -> bool:
            return len(step.rows) == 1 and step.rows[0].past == 4 and bool(failing.pop())

        executor = ToyExecutor(PAGED, behaviour=Behaviour(fails=fails), unit_padding_bytes=0)
        engine, _ = engine_with(store, executor=executor)
        async with serving(engine):
            one = engine.submit(ask("x", (1, 2, 3), max_tokens=30))
            await anext(one)
            two = await collect(engine.submit(ask("b", (*PREFIX, 9))))
            assert two.tokens == (await alone(PAGED, ask("b", (*PREFIX, 9)))).tokens
            await collect(one)

    asyncio.run(test())


class RefusesOnce(ToyExecutor):
    """Its KV cannot be written the first time."""

    refused = False

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        if not self.refused:
            self.refused = True
            raise ExecutionError("the toy takes no KV yet")
        super().write_kv(unit, data)


def test_a_load_that_fails_moves_nobodys_guide() -> None:
    form = Constraint(kind="regex", source="(ab|cd|ef){12}")
    shaped = ask("shaped", (1, 2, 3), max_tokens=60, constraint=form)

    async def answer(engine: Engine, *, load: bool) -> Collected:
        async with serving(engine):
            await engine.prepare(form)
            one = asyncio.create_task(answered(engine, shaped))
            if load:
                while engine.snapshot().generated_tokens < 3:
                    await asyncio.sleep(0)
                await answered(engine, ask("b", (*PREFIX, 9)))
            return await one

    async def test() -> None:
        store = MemoryStore()
        await life(engine_with(store)[0], ask("a", (*PREFIX, 1), max_tokens=1))
        executor = RefusesOnce(PAGED)
        disk = DiskPrefixes(store, executor, model_digest=b"model", least_tokens=16)
        beside = await answer(toy_engine(executor, disk=disk), load=True)
        assert executor.refused
        whole = await answer(toy_engine(ToyExecutor(PAGED)), load=False)
        assert beside.finished
        assert beside.tokens == whole.tokens

    asyncio.run(test())


class Fickle(MemoryStore):
    """Loses everything between a plan and the step that it is for."""

    looks_left = 1 << 30

    def holds(self, key: bytes) -> bool:
        self.looks_left -= 1
        if self.looks_left < 0:
            self.kept.clear()
        return super().holds(key)


def test_a_slot_that_begins_with_a_copy_has_it_even_when_nothing_is_left_to_load() -> None:
    """The last look of the plan is the one at the unit after the prefix."""

    async def test(looks: int) -> int:
        store = Fickle()
        long = (*PREFIX, *range(130, 160))
        await life(engine_with(store, SLOTS)[0], ask("a", (*PREFIX, 1), max_tokens=1))
        engine, executor = engine_with(store, SLOTS)
        async with serving(engine):
            # A slot that shares less than half of what it holds is copied from.
            await answered(engine, ask("b", (*PREFIX[:24], *long[50:]), reuse=True, max_tokens=1))
            copies, store.looks_left = executor.record.copies, looks
            answer = await answered(engine, ask("c", (*PREFIX, 9)))
            assert answer.tokens == (await alone(SLOTS, ask("c", (*PREFIX, 9)))).tokens
            return executor.record.copies - copies

    copies = [asyncio.run(test(looks)) for looks in range(24)]
    assert any(copies)


def test_leaving_while_a_load_runs_frees_the_kv() -> None:
    async def test() -> None:
        store = MemoryStore()
        first, _ = engine_with(store, executor=ToyExecutor(PAGED, unit_padding_bytes=3 << 20))
        await life(first, ask("a", (*PREFIX, 1), max_tokens=1))
        engine, _ = engine_with(store, executor=ToyExecutor(PAGED, unit_padding_bytes=3 << 20))
        async with serving(engine):
            left = engine.submit(ask("b", (*PREFIX, 9)))
            while store.loads == 0:
                await asyncio.sleep(0)
            await left.aclose()
            answer = await collect(engine.submit(ask("c", (*PREFIX, 9))))
            assert answer.tokens == (await alone(PAGED, ask("c", (*PREFIX, 9)))).tokens

    asyncio.run(test())


def test_nothing_is_copied_while_the_disk_is_behind() -> None:
    async def test() -> None:
        store = MemoryStore()
        store.room = 0
        engine, _ = engine_with(store)
        async with serving(engine):
            await answered(engine, ask("a", (*PREFIX, 1)))
            await asyncio.sleep(0.1)
            assert store.kept == {}
            store.room = 1 << 20
            for _ in range(100):
                await asyncio.sleep(0.01)
                if store.kept:
                    break
            assert len(store.kept) >= 20

    asyncio.run(test())


@pytest.mark.parametrize("shape", ["paged", "slots"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_answers_are_those_of_a_run_alone_whatever_is_loaded_lost_or_preempted(
    shape: str, seed: int
) -> None:
    """Several lives over one store, with little KV, units lost in between and requests at once."""
    rng = random.Random(seed)
    small: Shape = PagedGeometry(block_tokens=4, blocks=40, bytes_per_token=8)
    if shape == "slots":
        small = SlotGeometry(slots=3, slot_tokens=128, bytes_per_token=8)
    stems = [tuple(rng.choices(range(256), k=rng.choice((9, 33, 70)))) for _ in range(3)]
    store = MemoryStore()
    store.damaged = lambda load: rng.random() < 0.05

    def request(name: str) -> GenerationRequest:
        stem = rng.choice(stems)
        tail = tuple(rng.choices(range(3), k=rng.randint(1, 12)))
        prompt = stem[: rng.choice((len(stem), rng.randint(1, len(stem))))] + tail
        return ask(name, prompt, max_tokens=rng.randint(1, 12), reuse=rng.random() < 0.9)

    async def test() -> None:
        for number in range(3):
            padding = rng.choice((0, 0, 3 << 18))
            executor = ToyExecutor(
                small, step_tokens=rng.choice((8, 64)), unit_padding_bytes=padding
            )
            store.kept = {key: data for key, data in store.kept.items() if rng.random() < 0.9}
            engine, _ = engine_with(store, executor=executor, least_tokens=8)
            requests = [request(f"{number}-{index}") for index in range(6)]
            async with serving(engine):
                got = await asyncio.gather(*(answered(engine, one) for one in requests))
                await engine.drain(5)
            plain = EngineSettings(prefix_reuse=False)
            expected = await life(toy_engine(eos=False, settings=plain), *requests)
            for one, answer, right in zip(requests, got, expected, strict=True):
                assert answer.tokens == right.tokens
                assert answer.finished.usage.cached_tokens < len(one.prompt)
                assert one.reuse or answer.finished.usage.cached_tokens == 0

    asyncio.run(test())


def test_without_prefix_reuse_there_is_no_disk_tier() -> None:
    store = MemoryStore()
    executor = ToyExecutor(PAGED)
    disk = DiskPrefixes(store, executor, model_digest=b"", least_tokens=8)
    engine = toy_engine(executor, settings=EngineSettings(prefix_reuse=False), disk=disk)
    asyncio.run(life(engine, ask("a", (*PREFIX, 1))))
    assert store.kept == {}
    assert engine.snapshot().disk is None
