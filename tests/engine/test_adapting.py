"""Adapters in the engine: KV is never shared across them, and who cannot run one says so."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toyengine import SHAPES, ask, toy_engine

from tidegate.engine.adapting import kv_tokens, new_adapter_number
from tidegate.engine.batch import kv_for
from tidegate.engine.executor import PagedGeometry, SlotGeometry
from tidegate.errors import RequestError

ADAPTERS = st.none() | st.integers(1, 3)


@pytest.mark.parametrize("geometry", SHAPES)
@given(one=ADAPTERS, other=ADAPTERS)
def test_a_prefix_is_found_under_its_own_adapter_only(
    geometry: PagedGeometry | SlotGeometry, one: int | None, other: int | None
) -> None:
    kv, tokens = kv_for(geometry, reuse=True), np.arange(40)
    kv.admit(1, kv_tokens(tokens, one))
    kv.grow(1, len(tokens))
    kv.commit(1, kv_tokens(tokens, one))
    found = kv.match(2, kv_tokens(tokens, other)).tokens
    assert (found > 0) == (one == other)
    assert bool(kv.locate(kv_tokens(tokens, other), 4)) == (one == other)
    kv.check_integrity()


def test_numbers_are_never_given_twice() -> None:
    numbers = [new_adapter_number() for _ in range(100)]
    assert len(set(numbers)) == 100
    assert min(numbers) > 0


def test_an_executor_without_adapters_says_so_and_runs_nothing() -> None:
    async def main() -> None:
        engine = toy_engine()
        with pytest.raises(RequestError, match="model: is an adapter: this executor runs the"):
            engine.submit(replace(ask("r", (5, 6, 7)), adapter=1))

    asyncio.run(main())
