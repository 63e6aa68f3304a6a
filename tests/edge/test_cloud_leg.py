"""The device's leg to the cloud: what leaves, what comes back, and every way it can go wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from linkpair import HERE, LinkPair, ScriptedCloud, failed, finished, linked, said, until
from toyexecutor import VirtualClock

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.schema import Call, read_chat
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta, Usage
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    LinkError,
    RequestError,
    TidegateError,
    UnavailableError,
)
from tidegate.link.effects import InboundRequest
from tidegate.link.envelope import new_request_id
from tidegate.link.prekeys import ModelOffer


def call(**fields: object) -> Call:
    body = {"messages": [{"role": "user", "content": "which tide?"}], "temperature": 0, **fields}
    return read_chat(body)


def fresh_id() -> str:
    return new_request_id(time.time_ns() // 1_000_000).hex()


async def answered(leg: CloudLeg, asked: Call, name: str | None = None) -> list[AnswerEvent]:
    name = name or fresh_id()
    async with asyncio.timeout(10), aclosing(leg.answer(asked, name, "because")) as events:
        return [event async for event in events]


def with_cloud(
    folder: Path,
    cloud: ScriptedCloud,
    test: Callable[[CloudLeg, LinkPair], Awaitable[None]],
    *,
    context_tokens: int = 512,
) -> None:
    async def run() -> None:
        async with linked(folder, cloud, context_tokens=context_tokens) as pair:
            await test(CloudLeg(pair.device), pair)

    asyncio.run(run())


def test_an_answer_comes_back_as_seen_from_here(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        name = fresh_id()
        routed, *texts, end = await answered(leg, call(), name)
        assert routed == replace(HERE, reason="because", request_id=name)
        assert texts == [said("high"), said(" tide")]
        assert isinstance(end, Finished)
        assert (end.reason, end.usage) == ("stop", finished().usage)
        # The cloud's clock said 1000 s and more; the device waited a moment.
        assert end.timing.first_scheduled_s <= end.timing.first_token_s <= end.timing.total_s < 10
        assert end.timing.decode_s == finished().timing.decode_s

    with_cloud(tmp_path, ScriptedCloud((HERE, said("high"), said(" tide"), finished())), test)


def test_what_leaves_is_the_call_without_the_wishes_for_the_router(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, pair: LinkPair) -> None:
        asked = call(model="edge", max_tokens=9, stop=["x"], n=3, tidegate={"deadline_ms": 5000})
        await answered(leg, asked)
        body = json.loads(cloud.bodies[0])
        assert "model" not in body
        assert "n" not in body, "the cloud is asked once per answer"
        assert body["messages"] == [{"role": "user", "content": "which tide?"}]
        assert (body["max_tokens"], body["stop"], body["temperature"]) == (9, ["x"], 0)
        assert pair.requests > 0
        assert not any(b"which tide" in message.payload for message in pair.broker.seen)

    cloud = ScriptedCloud((HERE, said("high"), finished()))
    with_cloud(tmp_path, cloud, test)


def test_a_sampled_call_leaves_with_a_seed_so_that_it_can_be_run_again(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        await answered(leg, call(temperature=1))
        await answered(leg, call(temperature=1))
        await answered(leg, call(temperature=1, seed=5))
        await answered(leg, call())
        seeds = [json.loads(body).get("seed") for body in cloud.bodies]
        assert isinstance(seeds[0], int)
        assert isinstance(seeds[1], int)
        assert seeds[0] != seeds[1]
        assert seeds[2:] == [5, None]

    cloud = ScriptedCloud((HERE, said("high"), finished()))
    with_cloud(tmp_path, cloud, test)


@pytest.mark.parametrize(
    ("event", "kind", "message"),
    [
        (failed("invalid_request", "messages: 900 tokens: too many"), RequestError, "900 tokens"),
        (failed("invalid_request", "no colon"), RequestError, "no colon"),
        (failed("over_capacity", "full", retryable=True), CapacityError, "full"),
        (failed("unavailable", "draining", retryable=True), UnavailableError, "draining"),
        (failed("new_code", "soon", retryable=True), UnavailableError, "soon"),
        (failed("execution_failed", "a step failed"), ExecutionError, "a step failed"),
        (failed("new_code", "never"), ExecutionError, "never"),
        (Cancelled(usage=Usage(prompt_tokens=1, completion_tokens=0)), UnavailableError, "cancel"),
    ],
)
@pytest.mark.parametrize("begun", [False, True], ids=["refused", "begun"])
def test_a_refusal_before_any_text_is_the_error_that_it_was_there(
    tmp_path: Path,
    event: Failed | Cancelled,
    kind: type[TidegateError],
    message: str,
    begun: bool,
) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        with pytest.raises(kind, match=message):
            await answered(leg, call())

    with_cloud(tmp_path, ScriptedCloud((HERE, event) if begun else (event,)), test)


def test_a_failure_after_text_is_the_end_of_the_stream(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        events = await answered(leg, call())
        assert events[1:] == [said("high"), broken]

    broken = failed("execution_failed", "a step failed")
    with_cloud(tmp_path, ScriptedCloud((HERE, said("high"), broken)), test)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ((), UnavailableError),
        ((HERE,), UnavailableError),
        ((HERE, said("high")), UnavailableError),
        ((said("high"), finished()), LinkError),
        ((finished(),), LinkError),
        ((HERE, HERE, said("high"), finished()), LinkError),
        ((HERE, b"{}"), LinkError),
        ((b"high",), LinkError),
        ((b"",), LinkError),
    ],
    ids=["nothing", "routed", "cut", "no head", "end only", "two heads", "empty", "text", "void"],
)
def test_what_is_no_answer_is_told_as_such(
    tmp_path: Path, script: tuple[AnswerEvent | bytes, ...], kind: type[TidegateError]
) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        with pytest.raises(kind):
            await answered(leg, call())

    with_cloud(tmp_path, ScriptedCloud(script), test)


def test_nothing_is_yielded_before_there_is_text(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        name = fresh_id()
        async with aclosing(leg.answer(call(), name, "because")) as events:
            first = asyncio.ensure_future(anext(events))
            await until(lambda: bool(cloud.bodies))
            done, _rest = await asyncio.wait([first], timeout=0.2)
            assert not done
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    cloud = ScriptedCloud((HERE, None))
    with_cloud(tmp_path, cloud, test)


def test_closing_the_answer_frees_the_cloud(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        name = fresh_id()
        async with aclosing(leg.answer(call(), name, "because")) as events:
            assert isinstance(await anext(events), Routed)
            assert isinstance(await anext(events), TextDelta)
            assert cloud.closed == 0
        await until(lambda: cloud.closed == 1)

    cloud = ScriptedCloud((HERE, said("high"), None))
    with_cloud(tmp_path, cloud, test)


@dataclass
class TimedCloud(ScriptedCloud):
    """Takes what it is set to, by a clock that is set by hand."""

    clock: VirtualClock = field(default_factory=VirtualClock)
    takes_s: float = 0.0

    async def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        self.clock.advance(self.takes_s)
        async for payload in super().__call__(request):
            yield payload


def test_one_slow_answer_is_not_what_the_router_expects(tmp_path: Path) -> None:
    async def test(_: CloudLeg, pair: LinkPair) -> None:
        leg = CloudLeg(pair.device, clock=cloud.clock)
        expected = []
        for cloud.takes_s in (9.0, 0.5, 0.25, 8.0, 0.5, 4.0, 4.0, 4.0):
            await answered(leg, call())
            expected.append((await leg.signals()).answer_s)
        assert expected == pytest.approx([9, 0.5, 0.5, 0.5, 0.5, 0.5, 4, 4])

    cloud = TimedCloud((HERE, said("high"), finished()))
    with_cloud(tmp_path, cloud, test)


def test_the_router_hears_what_is_reachable_and_how_fast_it_was(tmp_path: Path) -> None:
    async def test(_: CloudLeg, pair: LinkPair) -> None:
        leg = CloudLeg(pair.device, clock=cloud.clock)
        now = await leg.signals()
        assert (now.reachable, now.context_tokens, now.answer_s) == (True, 300, None)
        end = (await answered(leg, call()))[-1]
        assert isinstance(end, Finished)
        assert end.timing.total_s == pytest.approx(2.0)
        assert (await leg.signals()).answer_s == pytest.approx(2.0)
        assert (await leg.status())["reachable"] is True
        pair.broker.stop()
        await until(lambda: not pair.device.connected)
        now = await leg.signals()
        assert (now.reachable, now.detail) == (False, "broker not connected")

    cloud = TimedCloud((HERE, said("high"), finished()), takes_s=2.0)
    with_cloud(tmp_path, cloud, test, context_tokens=300)


def test_a_device_counts_on_the_context_of_the_model_that_its_calls_get(tmp_path: Path) -> None:
    wide = ModelOffer(id="wide", context_tokens=9000)

    async def run() -> None:
        cloud = ScriptedCloud((HERE, said("a"), finished()))
        async with linked(tmp_path, cloud, context_tokens=300, others=(wide,)) as pair:
            leg = CloudLeg(pair.device)
            assert (await leg.signals()).context_tokens == 300
            assert [one.id for one in await leg.models()] == ["big"]
            events = await answered(leg, call())
            assert isinstance(events[-1], Finished)

    asyncio.run(run())


def test_a_caller_who_reads_slowly_does_not_make_the_cloud_slow(tmp_path: Path) -> None:
    async def test(leg: CloudLeg, _: LinkPair) -> None:
        async with asyncio.timeout(10), aclosing(leg.answer(call(), fresh_id(), "why")) as events:
            async for event in events:
                if isinstance(event, Finished):
                    assert event.timing.first_token_s <= event.timing.total_s < 0.6
                else:
                    await asyncio.sleep(0.4)
        answer_s = (await leg.signals()).answer_s
        assert answer_s is not None
        assert answer_s < 0.6  # three pauses are 1.2 s

    with_cloud(tmp_path, ScriptedCloud((HERE, said("high"), said(" tide"), finished())), test)
