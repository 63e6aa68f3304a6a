"""Many calls share the runs of one model, and each gets what it would get alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engine.text_batcher import BatchSeen, TextBatcher
from tidegate.engine.text_batches import BatchLimits
from tidegate.errors import CapacityError, DeadlineError, ExecutionError, UnavailableError
from tidegate.model.packed import Array

Tokens = Sequence[int]
POISON = 99


class SumModel:
    """The sum and the length of each text; a gate holds its runs."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.batches: list[list[Tokens]] = []

    def __call__(self, texts: Sequence[Tokens]) -> Array:
        assert self.open.wait(10)
        self.batches.append(list(texts))
        if any(POISON in text for text in texts):
            raise ZeroDivisionError("secret")
        return np.array([[sum(text), len(text)] for text in texts], np.float32)


def run(
    scenario: Callable[[TextBatcher, SumModel], Awaitable[None]],
    *,
    wait_s: float = 0.0,
    rows: int = 8,
) -> list[BatchSeen]:
    seen: list[BatchSeen] = []

    async def main() -> None:
        model = SumModel()
        limits = BatchLimits(rows=rows, tokens=256, wait_s=wait_s, most_waiting=50)
        batcher = TextBatcher(model, limits, name="sums", saw=seen.append)
        try:
            await asyncio.wait_for(scenario(batcher, model), 10)
        finally:
            model.open.set()
            batcher.close()

    asyncio.run(main())
    return seen


async def held(batcher: TextBatcher, model: SumModel) -> asyncio.Task[Array]:
    """A call whose run has begun and stands still until the gate is open."""
    model.open.clear()
    first = asyncio.create_task(batcher.outputs([[1]]))
    while batcher.busy_s == 0:
        await asyncio.sleep(0.001)
    return first


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(
            st.lists(st.integers(0, POISON - 1), min_size=1, max_size=30), min_size=1, max_size=5
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([0.0, 0.002]),
)
def test_each_call_gets_what_it_would_get_alone(
    calls: list[list[list[int]]], wait_s: float
) -> None:
    async def scenario(batcher: TextBatcher, _: SumModel) -> None:
        found = await asyncio.gather(*(batcher.outputs(call) for call in calls))
        alone = [SumModel()([text]) for call in calls for text in call]
        np.testing.assert_array_equal(np.concatenate(found), np.concatenate(alone))

    seen = run(scenario, wait_s=wait_s)
    assert sum(one.texts for one in seen) == sum(map(len, calls))


def test_what_comes_while_a_run_is_on_shares_the_next_one() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        first = await held(batcher, model)
        later = [asyncio.create_task(batcher.outputs([[n], [n, n]])) for n in range(2, 6)]
        await asyncio.sleep(0.01)
        assert batcher.waiting == 8
        model.open.set()
        await first
        assert [one[:, 0].tolist() for one in await asyncio.gather(*later)] == [
            [n, 2 * n] for n in range(2, 6)
        ]
        assert [len(batch) for batch in model.batches] == [1, 8]

    seen = run(scenario)
    assert [(one.texts, one.calls, one.tokens, one.padded_tokens) for one in seen] == [
        (1, 1, 1, 1),
        (8, 4, 12, 16),
    ]
    assert all(wait_s > 0.005 for wait_s in seen[1].waited_s)


@pytest.mark.parametrize(("wait_s", "apart_s", "runs"), [(0.0, 0.1, 3), (0.3, 0.0, 1)])
def test_an_idle_model_waits_for_others_only_when_told_to(
    wait_s: float, apart_s: float, runs: int
) -> None:
    async def scenario(batcher: TextBatcher, _: SumModel) -> None:
        calls = []
        for number in range(3):
            calls.append(asyncio.create_task(batcher.outputs([[number]])))
            await asyncio.sleep(apart_s)
        await asyncio.gather(*calls)

    assert len(run(scenario, wait_s=wait_s)) == runs


def test_a_full_batch_and_a_call_with_a_deadline_do_not_wait() -> None:
    async def scenario(batcher: TextBatcher, _: SumModel) -> None:
        async with asyncio.timeout(0.5):
            await batcher.outputs([[n] for n in range(8)])
            await batcher.outputs([[1]], timeout_s=5)

    run(scenario, wait_s=1.0)


def test_a_caller_that_leaves_gives_its_places_up() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        first = await held(batcher, model)
        gone = asyncio.create_task(batcher.outputs([[2]] * 50))
        await asyncio.sleep(0.01)
        with pytest.raises(CapacityError, match="51 texts would be waiting: at most 50 may"):
            await batcher.outputs([[3]])
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.waiting == 0
        model.open.set()
        await first
        assert (await batcher.outputs([[4]])).tolist() == [[4, 1]]
        assert [2] not in [text for batch in model.batches for text in batch]
        assert batcher.idle

    run(scenario)


def test_a_call_whose_time_is_over_fails_and_leaves_the_line() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        first = await held(batcher, model)
        with pytest.raises(DeadlineError, match=r"not done within 0\.02 s"):
            await batcher.outputs([[2]], timeout_s=0.02)
        assert batcher.waiting == 0
        model.open.set()
        await first
        assert model.batches == [[[1]]]

    run(scenario)


def test_a_text_that_fails_its_batch_costs_no_other_call_its_answer() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        first = await held(batcher, model)
        bad = asyncio.create_task(batcher.outputs([[5], [POISON]]))
        good = [asyncio.create_task(batcher.outputs([[n]])) for n in (6, 7)]
        await asyncio.sleep(0.01)
        model.open.set()
        await first
        assert [(await one)[0, 0] for one in good] == [6, 7]
        with pytest.raises(ExecutionError, match=r"^sums failed: ZeroDivisionError$"):
            await bad
        assert [len(batch) for batch in model.batches] == [1, 4, 2, 1, 1]

    run(scenario)


def test_who_counts_runs_wrongly_stops_nobody() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        batcher.saw = lambda seen: [][seen.texts]
        first = await held(batcher, model)
        later = asyncio.create_task(batcher.outputs([[2]]))
        model.open.set()
        assert (await first).tolist() == [[1, 1]]
        assert (await later).tolist() == [[2, 1]]

    run(scenario)


def test_closing_fails_what_is_here_so_that_it_is_asked_again() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        running = await held(batcher, model)
        waiting = asyncio.create_task(batcher.outputs([[2]]))
        await asyncio.sleep(0.01)
        model.open.set()
        batcher.close()
        for call in (running, waiting):
            with pytest.raises(UnavailableError, match="shutting down"):
                await call
        with pytest.raises(UnavailableError):
            await batcher.outputs([[3]])
        assert model.batches == [[[1]]]

    run(scenario)


def test_closing_waits_for_no_run_that_never_ends() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        stuck = await held(batcher, model)
        assert not batcher.close(timeout_s=0.05)
        with pytest.raises(UnavailableError, match="shutting down"):
            await stuck
        model.open.set()
        assert batcher.close()

    run(scenario)


def test_small_calls_overtake_a_large_one_and_it_still_ends() -> None:
    async def scenario(batcher: TextBatcher, model: SumModel) -> None:
        first = await held(batcher, model)
        large = asyncio.create_task(batcher.outputs([[n] for n in range(40)]))
        await asyncio.sleep(0.01)
        small = asyncio.create_task(batcher.outputs([[70]]))
        await asyncio.sleep(0.01)
        model.open.set()
        await first
        await small
        assert not large.done()
        assert (await large)[:, 0].tolist() == list(range(40))

    run(scenario, rows=4)
