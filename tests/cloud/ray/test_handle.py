"""Ray's errors, as a caller of ours meets them; and what is left open is cancelled."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tidegate.api.schema import read_chat
from tidegate.cloud.ray.messages import Ask
from tidegate.errors import CapacityError, ExecutionError, TidegateError, UnavailableError

pytest.importorskip("ray", reason="the extra `ray` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, of pydantic; ours stay errors
    import ray.serve  # noqa: F401

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)

from tidegate.cloud.ray.backend import LostReplicaError
from tidegate.cloud.ray.handle import ServeReplicas

ASK = Ask(
    call=read_chat({"messages": [{"role": "user", "content": "hi"}]}),
    prompt=(1,),
    request_id="0b" * 16,
    anchor=None,
)


class Response:
    """Ray's generator: some parts, then an error, an end, or nothing for ever."""

    def __init__(self, parts: int, then: BaseException | None, *, hangs: bool = False) -> None:
        self.cancelled = False
        self._left, self._then, self._hangs = parts, then, hangs

    def __aiter__(self) -> AsyncIterator[tuple[bytes, ...]]:
        return self

    async def __anext__(self) -> tuple[bytes, ...]:
        if self._left:
            self._left -= 1
            return (b"part",)
        if self._hangs:
            await asyncio.Event().wait()
        if self._then is not None:
            raise self._then
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """As much of Ray's handle as is used: `handle.options(stream=True).answer.remote(ask)`."""

    def __init__(self, response: Response) -> None:
        self._response = response

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    @property
    def answer(self) -> Handle:
        return self

    def remote(self, ask: Ask) -> Response:
        assert ask is ASK
        return self._response


async def read(response: Response) -> list[Any]:
    return [part async for part in ServeReplicas(Handle(response)).answer(ASK)]


def test_an_answer_that_ended_is_not_cancelled() -> None:
    response = Response(3, None)
    assert len(asyncio.run(read(response))) == 3
    assert not response.cancelled


@pytest.mark.parametrize(
    ("raised", "ours"),
    [
        (ActorDiedError(), LostReplicaError),
        (ActorUnavailableError("away", bytes(16)), LostReplicaError),
        (RequestCancelledError("id"), LostReplicaError),
        (asyncio.CancelledError(), LostReplicaError),
        (BackPressureError(5, 5, 429, 3.5), CapacityError),
        (DeploymentUnavailableError("engines"), UnavailableError),
        (RayTaskError("answer", "the heron", ValueError("the heron")), ExecutionError),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else one.__name__,
)
def test_an_error_of_rays_becomes_ours(raised: BaseException, ours: type[TidegateError]) -> None:
    with pytest.raises(ours) as caught:
        asyncio.run(read(Response(1, raised)))
    assert type(caught.value) is ours
    assert "heron" not in str(caught.value)


def test_a_full_queue_says_when_to_come_again() -> None:
    with pytest.raises(CapacityError, match="too many calls wait") as caught:
        asyncio.run(read(Response(0, BackPressureError(5, 5, 429, 3.5))))
    assert caught.value.retry_after_s == 3.5


def test_a_caller_who_leaves_cancels_the_call() -> None:
    response = Response(1, None, hangs=True)

    async def main() -> None:
        answer = ServeReplicas(Handle(response)).answer(ASK)
        await anext(answer)
        await answer.aclose()

    asyncio.run(main())
    assert response.cancelled


def test_a_caller_who_is_cancelled_is_not_told_that_the_replica_was() -> None:
    response = Response(0, None, hangs=True)

    async def main() -> None:
        task = asyncio.create_task(read(response))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert response.cancelled
