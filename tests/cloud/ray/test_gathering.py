"""Payloads in messages: all of them, in order, the first at once, several where a gap is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.cloud.ray.gathering import LONGEST_GAP_S, gap_s, gathered


async def produced(
    payloads: list[bytes], *, then: Exception | None = None, closed: list[bool] | None = None
) -> AsyncGenerator[bytes, None]:
    try:
        for payload in payloads:
            yield payload
            await asyncio.sleep(0)
        if then is not None:
            raise then
    finally:
        if closed is not None:
            closed.append(True)


@given(st.lists(st.binary(max_size=3), max_size=20), st.sampled_from([0.0, 0.001]))
def test_messages_hold_every_payload_in_order(payloads: list[bytes], gap: float) -> None:
    async def main() -> list[bytes]:
        messages = gathered(produced(payloads), lambda: gap)
        return [payload async for message in messages for payload in message]

    assert asyncio.run(main()) == payloads


def test_a_gap_puts_many_payloads_into_one_message_but_the_first_leaves_alone() -> None:
    async def main() -> list[int]:
        messages = gathered(produced([b"x"] * 50), lambda: 5.0)
        return [len(message) async for message in messages]

    first, *rest = asyncio.run(main())
    assert first == 1
    assert rest == [49]  # the gap ends with the answer: nobody waits five seconds


def test_an_error_comes_after_what_came_before_it() -> None:
    got: list[bytes] = []

    async def main() -> None:
        payloads = produced([b"a", b"b"], then=ValueError("late"))
        async for message in gathered(payloads, lambda: 1.0):
            got.extend(message)

    with pytest.raises(ValueError, match="late"):
        asyncio.run(main())
    assert got == [b"a", b"b"]


def test_closing_the_messages_closes_the_payloads() -> None:
    async def main() -> list[bool]:
        closed: list[bool] = []
        messages = gathered(produced([b"x"] * 1000, closed=closed), lambda: 0.0)
        await anext(messages)
        await messages.aclose()
        return closed

    assert asyncio.run(main()) == [True]


def test_one_stream_has_no_gap_and_many_have_a_bounded_one() -> None:
    assert gap_s(0) == gap_s(1) == 0
    gaps = [gap_s(streams) for streams in range(2, 300)]
    assert gaps == sorted(gaps)
    assert gaps[0] > 0
    assert gaps[-1] == LONGEST_GAP_S
