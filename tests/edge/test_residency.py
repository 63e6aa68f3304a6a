"""The model leaves memory without work, comes back with it, and survives that it cannot."""

from __future__ import annotations

import asyncio
import mmap
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from memorystore import MemoryStore
from toyengine import PAGED, SHAPES, Collected, ask, collect, serving
from toyexecutor import ToyExecutor
from toytext import toy_text

from tidegate.edge.residency import ResidentExecutor, give_back_mapped
from tidegate.engine.drafts import Wish
from tidegate.engine.drafts_model import ModelDrafter
from tidegate.engine.engine import Engine
from tidegate.engine.events import Failed
from tidegate.engine.executor import ExecutorStep, PagedGeometry, Row, SlotGeometry
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.settings import EngineSettings
from tidegate.errors import BundleError, ConfigError

GRACE_S = 0.1
PREFIX = tuple(range(40, 110))


class Loader:
    """Gives new toys; `problem` is what it raises instead."""

    def __init__(self, shape: PagedGeometry | SlotGeometry) -> None:
        self.shape = shape
        self.made: list[ToyExecutor] = []
        self.problem: Exception | None = None

    def __call__(self) -> ToyExecutor:
        if self.problem is not None:
            raise self.problem
        self.made.append(ToyExecutor(self.shape))
        return self.made[-1]


def idling_engine(
    loader: Loader, *, store: MemoryStore | None = None, most_waiting: int = 64
) -> tuple[Engine, ResidentExecutor]:
    resident = ResidentExecutor(loader(), loader)
    disk = None
    if store is not None:
        disk = DiskPrefixes(store, resident, model_digest=b"", least_tokens=8)
    settings = EngineSettings(unload_after_s=GRACE_S, most_waiting=most_waiting)
    text = toy_text(context_tokens=resident.limits.context_tokens, eos=False)
    engine = Engine(resident, text, model_id="toy", settings=settings, disk=disk)
    return engine, resident


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def answered(engine: Engine, name: str, *tail: int) -> Collected:
    return await collect(engine.submit(ask(name, (*PREFIX, *tail))))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_an_idle_model_is_unloaded_and_the_next_request_brings_it_back(
    shape: PagedGeometry | SlotGeometry,
) -> None:
    async def test() -> None:
        loader = Loader(shape)
        engine, resident = idling_engine(loader)
        async with serving(engine):
            first = await answered(engine, "a", 7)
            assert engine.snapshot().loaded
            await until(lambda: not resident.loaded)
            assert loader.made[0].closed
            now = engine.snapshot()
            assert (now.healthy, now.accepting, now.loaded) == (True, True, False)
            second = await answered(engine, "b", 7)
            assert second.tokens == first.tokens, "nothing of the lost KV was reused"
            assert second.finished.usage.cached_tokens == 0
            assert engine.snapshot().loaded
            await until(lambda: not resident.loaded)
        assert len(loader.made) == 2

    asyncio.run(test())


def test_a_draft_model_goes_with_the_model_and_comes_back_when_it_is_asked() -> None:
    async def test() -> None:
        model, draft = Loader(PAGED), Loader(PAGED)
        resident = ResidentExecutor(model(), model)
        drafting = ResidentExecutor(draft(), draft)
        drafter = ModelDrafter(drafting, vocab=resident.limits.vocab)
        settings = EngineSettings(unload_after_s=GRACE_S)
        text = toy_text(context_tokens=resident.limits.context_tokens, eos=False)
        engine = Engine(
            resident, text, model_id="toy", settings=settings, drafters=(), draft_model=drafter
        )
        async with serving(engine):
            first = await answered(engine, "a", 7)
            await until(lambda: not resident.loaded)
            await until(lambda: not drafting.loaded)
            assert draft.made[0].closed
            wish = Wish(key=1, tokens=np.array([*PREFIX, 7]), most=4, remaining=9)
            while not (guess := drafter.propose([wish])[0]).tokens:
                assert drafter.caught_up
            assert guess.tokens == tuple(first.tokens[:4]), "nothing of the lost KV was reused"
            assert drafting.loaded

    asyncio.run(test())


def test_what_was_kept_on_disk_serves_the_model_that_came_back() -> None:
    async def test() -> None:
        engine, resident = idling_engine(Loader(PAGED), store=MemoryStore())
        async with serving(engine):
            first = await answered(engine, "a", 7)
            await until(lambda: not resident.loaded)
            second = await answered(engine, "b", 7)
            assert second.tokens == first.tokens
            assert second.finished.usage.cached_tokens == 68
            assert engine.snapshot().disk_hit_tokens == 68

    asyncio.run(test())


def test_requests_that_come_while_it_loads_wait_in_the_bounded_line() -> None:
    async def test() -> None:
        loader = Loader(PAGED)
        engine, resident = idling_engine(loader)
        async with serving(engine):
            first = await answered(engine, "a", 7)
            await until(lambda: not resident.loaded)
            answers = await asyncio.gather(*(answered(engine, f"n{i}", 7) for i in range(12)))
            assert {one.tokens for one in answers} == {first.tokens}
        assert len(loader.made) == 2

    asyncio.run(test())


@pytest.mark.parametrize("problem", [BundleError("model.bin: is missing"), OSError("no disk")])
def test_a_model_that_cannot_be_loaded_is_a_retryable_error_and_recovers(
    problem: Exception,
) -> None:
    async def test() -> None:
        loader = Loader(PAGED)
        engine, resident = idling_engine(loader)
        async with serving(engine):
            first = await answered(engine, "a", 7)
            await until(lambda: not resident.loaded)
            loader.problem = problem
            for turn in range(20):  # more often than an executor may fail
                lost = (await answered(engine, f"lost{turn}", 7)).terminal
                assert isinstance(lost, Failed)
                assert lost.retryable
                assert lost.code == "unavailable"
                assert "cannot be loaded again" in lost.message
                assert engine.snapshot().healthy
            loader.problem = None
            again = await answered(engine, "again", 7)
            assert again.tokens == first.tokens

    asyncio.run(test())


def test_another_model_in_its_place_is_refused() -> None:
    async def test() -> None:
        loader = Loader(PAGED)
        engine, resident = idling_engine(loader)
        async with serving(engine):
            await answered(engine, "a", 7)
            await until(lambda: not resident.loaded)
            loader.shape = PagedGeometry(block_tokens=4, blocks=8, bytes_per_token=8)
            lost = (await answered(engine, "b", 7)).terminal
            assert isinstance(lost, Failed)
            assert "was replaced while it was unloaded: restart" in lost.message
        assert all(one.closed for one in loader.made[1:])
        resident.close()
        assert loader.made[0].closed

    asyncio.run(test())


def test_a_load_that_takes_longer_than_a_step_may_is_not_yet_stuck() -> None:
    async def test() -> None:
        loader, gate = Loader(PAGED), threading.Event()

        def slow() -> ToyExecutor:
            assert gate.wait(10)
            return loader()

        resident = ResidentExecutor(loader(), slow)
        settings = EngineSettings(unload_after_s=GRACE_S, stall_after_s=0.1)
        engine = Engine(resident, toy_text(eos=False), model_id="toy", settings=settings)
        async with serving(engine):
            await until(lambda: not resident.loaded)
            waiting = asyncio.create_task(answered(engine, "a", 7))
            await asyncio.sleep(0.3)
            assert engine.snapshot().healthy
            await until(lambda: not engine.snapshot().healthy)
            gate.set()
            assert (await waiting).finished
            assert engine.snapshot().healthy

    asyncio.run(test())


class Limited(ToyExecutor):
    """A toy whose threads can be limited."""

    most_threads = 4

    def __init__(self) -> None:
        super().__init__(PAGED)
        self.threads = 4

    def limit_threads(self, threads: int) -> None:
        self.threads = threads


def test_a_limit_of_threads_outlives_the_model() -> None:
    made = [Limited(), Limited(), Limited()]
    models = iter(made)
    resident = ResidentExecutor(next(models), lambda: next(models))
    assert resident.most_threads == 4
    resident.limit_threads(2)
    assert made[0].threads == 2
    resident.unload()
    assert resident.most_threads == 4
    row = Row(tokens=np.array([40]), past=0, blocks=np.arange(1, dtype=np.int32), logits=1)
    step = ExecutorStep(rows=(row,))
    resident.execute(step)
    assert made[1].threads == 2
    resident.unload()
    resident.limit_threads(1)
    resident.execute(step)
    assert made[2].threads == 1
    assert ResidentExecutor(ToyExecutor(PAGED), lambda: ToyExecutor(PAGED)).most_threads is None


class Slow(Limited):
    """One that takes its time over a limit, as a graph that is compiled once more."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.gate = threading.Event(), threading.Event()
        self.closed_meanwhile = False

    def limit_threads(self, threads: int) -> None:
        self.begun.set()
        assert self.gate.wait(10)
        self.closed_meanwhile |= self.closed
        super().limit_threads(threads)


def began(*calls: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_a_limit_that_comes_while_the_model_is_loaded_again_is_not_lost() -> None:
    slow = Slow()
    resident = ResidentExecutor(Limited(), lambda: slow)
    resident.limit_threads(1)
    resident.unload()
    row = Row(tokens=np.array([40]), past=0, blocks=np.arange(1, dtype=np.int32), logits=1)
    threads = began(lambda: resident.execute(ExecutorStep(rows=(row,))))
    assert slow.begun.wait(10)  # the old limit is on its way
    threads += began(lambda: resident.limit_threads(4))
    threads[-1].join(0.2)
    slow.gate.set()
    for thread in threads:
        thread.join(10)
    assert slow.threads == 4


def test_a_model_is_not_unloaded_under_a_limit_that_is_being_taken() -> None:
    slow = Slow()
    resident = ResidentExecutor(slow, Limited)
    threads = began(lambda: resident.limit_threads(2))
    assert slow.begun.wait(10)
    threads += began(resident.unload)
    threads[-1].join(0.2)
    assert not slow.closed
    slow.gate.set()
    for thread in threads:
        thread.join(10)
    assert slow.closed
    assert not slow.closed_meanwhile


def test_a_closed_executor_stays_closed() -> None:
    loader = Loader(PAGED)
    engine, resident = idling_engine(loader)
    resident.close()

    async def test() -> None:
        async with serving(engine):
            lost = (await answered(engine, "a", 7)).terminal
            assert isinstance(lost, Failed)
            assert "closed" in lost.message

    asyncio.run(test())


def test_a_grace_period_is_a_time() -> None:
    with pytest.raises(ConfigError, match="unload_after_s"):
        EngineSettings(unload_after_s=0)


def test_pages_of_read_only_mappings_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    content = bytes(range(256)) * 16384  # 4 MiB
    path = folder / "model.bin"
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert bytes(mapped) == content
        assert resident_kib(path) == 4096
        give_back_mapped(tmp_path / "another")
        assert resident_kib(path) == 4096
        give_back_mapped(folder)
        assert resident_kib(path) == 0
        assert bytes(mapped) == content


def resident_kib(path: Path) -> int:
    """Resident part of a file's mapping."""
    text = Path("/proc/self/smaps").read_text()
    found = re.search(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    assert found is not None
    return int(found[1])
