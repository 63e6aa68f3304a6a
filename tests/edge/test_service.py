"""The device's backend: a small real engine, a link in memory, a cloud that follows a script."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from linkpair import HERE, LinkPair, ScriptedCloud, failed, finished, linked, said, until
from toyengine import PAGED, serving
from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.choices import seed_of, side_by_side
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.schema import Call, read_chat
from tidegate.api.tools import ToolDelta
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.answer_memory import AnswerMemory
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.service import EdgeBackend
from tidegate.engine.engine import Engine
from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta
from tidegate.engine.settings import EngineSettings
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    RequestError,
    TidegateError,
    UnavailableError,
)

CLOUD = ScriptedCloud((HERE, said("far"), said(" out"), finished()))
LONG = "0123456789" * 30
"""Beyond the device's 128 tokens, within the cloud's 512."""


def call(words: str = "hello", **fields: object) -> Call:
    body = {"messages": [{"role": "user", "content": words}], "temperature": 0, "max_tokens": 6}
    return read_chat(body | fields)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device under test and what is around it."""

    backend: EdgeBackend
    engine: Engine
    behaviour: Behaviour
    link: LinkPair | None

    async def ask(self, asked: Call) -> tuple[Routed, str, Finished | Failed]:
        """Where it ran, its text and its end."""
        async with asyncio.timeout(10):
            routed, *deltas, end = [event async for event in self.backend.answer(asked)]
        assert isinstance(routed, Routed)
        assert isinstance(end, Finished | Failed)
        return routed, text_of(deltas), end

    async def answer_well(
        self, asked: Call
    ) -> AsyncGenerator[Routed | TextDelta | ToolDelta | Finished, None]:
        """The events of an answer that does not fail."""
        async for event in self.backend.answer(asked):
            assert not isinstance(event, Failed | Cancelled)
            yield event

    async def status(self, name: str) -> object:
        return (await self.backend.status())[name]


def text_of(events: list[AnswerEvent]) -> str:
    assert all(isinstance(event, TextDelta) for event in events)
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@asynccontextmanager
async def device(folder: Path, cloud: ScriptedCloud | None) -> AsyncIterator[Device]:
    behaviour = Behaviour()
    executor = ToyExecutor(PAGED, behaviour=behaviour)
    text = toy_text(context_tokens=1024, eos=False)
    engine = Engine(executor, text, model_id="toy", settings=EngineSettings(most_waiting=2))
    around = nullcontext() if cloud is None else linked(folder, cloud)
    async with serving(engine), around as link:
        backend = EdgeBackend(
            EngineBackend(engine, route="edge", created_s=0),
            cloud=None if link is None else CloudLeg(link.device),
            memory=AnswerMemory(AnswerCache(budget_bytes=1 << 16, ttl_s=60, clock=engine.clock)),
            batch_rows=executor.limits.step_rows,
            queue_limit=2,
        )
        yield Device(backend=backend, engine=engine, behaviour=behaviour, link=link)


def with_device(
    folder: Path, test: Callable[[Device], Awaitable[None]], cloud: ScriptedCloud | None = CLOUD
) -> None:
    async def run() -> None:
        async with device(folder, cloud) as made:
            await test(made)

    asyncio.run(run())


# Routes


def test_what_fits_runs_here_and_says_why(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        routed, text, end = await here.ask(call())
        assert (routed.route, routed.model) == ("edge", "toy")
        assert routed.reason.startswith("fits")
        assert text
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens == 6
        assert here.link is not None
        assert here.link.requests == 0
        assert await here.status("routes") == {"edge": 1}

    with_device(tmp_path, test)


def test_what_is_too_long_goes_to_the_cloud_and_says_why(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        routed, text, end = await here.ask(call(LONG))
        assert (routed.route, routed.model, text) == ("cloud", "big", "far out")
        assert routed.reason.startswith("too long for the device")
        assert routed.request_id != HERE.request_id
        assert isinstance(end, Finished)
        assert end.timing.total_s < 10
        assert await here.status("routes") == {"cloud": 1}

    with_device(tmp_path, test)


def test_an_identical_request_is_answered_from_memory(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        _, text, end = await here.ask(call())
        steps = here.engine.snapshot().steps
        routed, again, end_again = await here.ask(call())
        assert routed.route == "cache"
        assert again == text
        assert isinstance(end, Finished)
        assert isinstance(end_again, Finished)
        assert (end_again.usage, end_again.reason) == (end.usage, end.reason)
        assert here.engine.snapshot().steps == steps
        assert (await here.ask(call(max_tokens=5)))[0].route == "edge"
        assert (await here.ask(call(tidegate={"route": "cloud"})))[0].route == "cloud"
        assert (await here.ask(call(tidegate={"cache": False})))[0].route == "edge"

    with_device(tmp_path, test)


def test_a_call_that_asks_for_no_cache_is_not_kept_either(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        await here.ask(call(tidegate={"cache": False}))
        assert await here.status("answer_cache") == {"entries": 0, "bytes": 0}
        assert (await here.ask(call()))[0].route == "edge"

    with_device(tmp_path, test)


def test_sampled_answers_are_remembered_only_with_a_seed(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        for seed, route in ((None, "edge"), (4, "cache")):
            await here.ask(call(temperature=1, seed=seed))
            assert (await here.ask(call(temperature=1, seed=seed)))[0].route == route

    with_device(tmp_path, test)


def test_an_answer_that_was_given_up_is_not_remembered(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        here.behaviour.step_s = 0.01
        answer = here.backend.answer(call(max_tokens=60))
        assert isinstance(await anext(answer), Routed)
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        await until(lambda: here.engine.snapshot().running == 0)
        here.behaviour.step_s = 0
        assert (await here.ask(call(max_tokens=60)))[0].route == "edge"

    with_device(tmp_path, test)


# Privacy


@pytest.mark.parametrize("privacy", ["local", "redact"])
@pytest.mark.parametrize("words", ["hello", LONG], ids=["short", "long"])
@pytest.mark.parametrize("route", ["auto", "edge", "cloud"])
def test_what_is_private_is_never_submitted(
    tmp_path: Path, privacy: str, words: str, route: str
) -> None:
    async def test(here: Device) -> None:
        asked = call(words, tidegate={"privacy": privacy, "route": route})
        if words == LONG or route == "cloud":
            with pytest.raises(RequestError) as refused:
                await here.ask(asked)
            assert refused.value.status == 422
            assert await here.status("refused") == 1
        else:
            assert (await here.ask(asked))[0].route == "edge"
        assert here.link is not None
        assert here.link.requests == 0
        assert await here.link.device.pending() == ()

    cloud = ScriptedCloud(CLOUD.script)
    with_device(tmp_path, test, cloud)
    assert cloud.bodies == []


def test_a_private_request_stays_though_the_device_is_full(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        async with asyncio.TaskGroup() as tasks, full(here, tasks):
            with pytest.raises(CapacityError):
                await here.ask(call("private", tidegate={"privacy": "local"}))
            assert here.link is not None
            assert here.link.requests == 0

    with_device(tmp_path, test)


@asynccontextmanager
async def full(here: Device, tasks: asyncio.TaskGroup) -> AsyncIterator[None]:
    """The engine's rows and its line are taken while the block runs."""
    gate = here.behaviour.gate = threading.Event()
    try:
        private = {"privacy": "local"}
        for number in range(10):
            before = here.engine.snapshot()
            tasks.create_task(here.ask(call(f"busy {number}", tidegate=private)))
            await until(
                lambda before=before: (  # type: ignore[misc]
                    here.engine.snapshot().waiting + here.engine.snapshot().running
                    > before.waiting + before.running
                )
            )
            if here.engine.snapshot().waiting >= 2:
                break
        yield
    finally:
        gate.set()


# Refusals


def test_what_nobody_can_ever_take_is_422(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        with pytest.raises(RequestError, match=r"cannot run anywhere: too long") as refused:
            await here.ask(call(LONG, tidegate={"route": "edge"}))
        assert refused.value.status == 422

    with_device(tmp_path, test)


def conversation(**extension: object) -> Call:
    said = [{"role": role, "content": "hello there"} for role in ("user", "assistant") * 10]
    asked = {"messages": [*said, {"role": "user", "content": "hi"}], "temperature": 0}
    return read_chat({**asked, "max_tokens": 6, "tidegate": extension})


def test_a_long_conversation_overflows_unless_its_caller_would_rather_have_it_cut(
    tmp_path: Path,
) -> None:
    async def test(here: Device) -> None:
        routed, *_ = await here.ask(conversation())
        assert (routed.route, routed.dropped_messages) == ("cloud", 0)
        routed, *_ = await here.ask(conversation(context_policy="truncate_oldest"))
        assert routed.route == "edge"
        assert routed.dropped_messages > 0
        again, *_ = await here.ask(conversation(context_policy="truncate_oldest"))
        assert (again.route, again.dropped_messages) == ("cache", routed.dropped_messages)

    with_device(tmp_path, test)


def test_a_conversation_for_the_cloud_is_cut_there_and_not_here(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        asked = conversation(route="cloud", context_policy="truncate_middle")
        routed, *_ = await here.ask(asked)
        assert (routed.route, routed.dropped_messages) == ("cloud", 2), "as the cloud says"
        [body] = cloud.bodies
        assert len(json.loads(body)["messages"]) == 21
        assert json.loads(body)["tidegate"]["context_policy"] == "truncate_middle"

    cloud = ScriptedCloud((replace(HERE, dropped_messages=2), said("far out"), finished()))
    with_device(tmp_path, test, cloud)


def test_several_answers_from_the_cloud_are_as_many_requests_of_one(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        asked = call(n=3, temperature=1, seed=5, tidegate={"route": "cloud"})
        events = [event async for event in side_by_side(asked, here.answer_well)]
        ended = [index for index, event in events if isinstance(event, Finished)]
        assert sorted(ended) == [0, 1, 2]
        bodies = [json.loads(body) for body in cloud.bodies]
        assert [body["seed"] for body in bodies] == [5, seed_of(5, 1), seed_of(5, 2)]
        assert not any("n" in body for body in bodies)

    cloud = ScriptedCloud((HERE, said("far out"), finished()))
    with_device(tmp_path, test, cloud)


def test_several_answers_share_a_full_devices_way_out(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        async with asyncio.TaskGroup() as tasks, full(here, tasks):
            asked = call("me too", n=2)
            events = [event async for event in side_by_side(asked, here.answer_well)]
            routes = {event.route for _, event in events if isinstance(event, Routed)}
            assert routes == {"cloud"}

    with_device(tmp_path, test)


@pytest.mark.parametrize("named", [{"logit_bias": {"7": 1}}, {"stop_token_ids": [7]}])
def test_token_ids_are_for_the_devices_own_model_and_never_leave(
    tmp_path: Path, named: dict[str, Any]
) -> None:
    async def test(here: Device) -> None:
        routed, *_ = await here.ask(call(**named))
        assert routed.route == "edge"
        with pytest.raises(RequestError, match="token ids are for the device's own model"):
            await here.ask(call(**named, tidegate={"route": "cloud"}))
        assert here.link is not None
        assert here.link.requests == 0

    with_device(tmp_path, test)


def test_a_full_device_overflows_to_the_cloud(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        async with asyncio.TaskGroup() as tasks, full(here, tasks):
            routed, text, _ = await here.ask(call("me too"))
            assert (routed.route, text) == ("cloud", "far out")
            assert "full" in routed.reason

    with_device(tmp_path, test)


def test_a_full_device_without_a_cloud_is_429(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        async with asyncio.TaskGroup() as tasks, full(here, tasks):
            with pytest.raises(CapacityError, match="full"):
                await here.ask(call("me too"))
        assert (await here.ask(call("me too")))[0].route == "edge"

    with_device(tmp_path, test, None)


def test_a_cloud_that_is_away_is_503_at_once(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        assert here.link is not None
        here.link.broker.stop()
        await until(lambda: not here.link.device.connected)  # type: ignore[union-attr]
        for asked in (call(tidegate={"route": "cloud"}), call(LONG)):
            with pytest.raises(UnavailableError, match="broker not connected"):
                await here.ask(asked)
        assert (await here.ask(call()))[0].route == "edge"

    with_device(tmp_path, test)


def test_another_model_is_404(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        assert (await here.ask(call(model="toy")))[0].model == "toy"
        with pytest.raises(RequestError) as refused:
            await here.ask(call(model="huge"))
        assert refused.value.status == 404

    with_device(tmp_path, test, None)


# Falling back


def overflowing(**fields: object) -> Call:
    """A call that fits here and, with the engine's measured speed, is sent by its deadline."""
    return call("hurry", tidegate={"deadline_ms": 1}, **fields)


async def measured(here: Device) -> None:
    """Let the engine learn that a deadline of 1 ms is too tight."""
    here.behaviour.step_s = 0.005
    await here.ask(call("measure"))
    now = here.engine.snapshot()
    assert now.prefill_tokens_per_s is not None
    assert now.decode_step_s is not None


@pytest.mark.parametrize(
    "script",
    [
        (failed("over_capacity", "the line is full", retryable=True),),
        (failed("unavailable", "going away", retryable=True),),
        (HERE, failed("execution_failed", "a step failed")),
        (HERE,),
        (b"nonsense",),
    ],
    ids=["full", "leaving", "broken", "cut", "nonsense"],
)
def test_a_cloud_that_says_nothing_leaves_the_answer_to_the_device(
    tmp_path: Path, script: tuple[AnswerEvent | bytes, ...]
) -> None:
    async def test(here: Device) -> None:
        await measured(here)
        routed, text, end = await here.ask(overflowing())
        assert routed.route == "edge"
        assert routed.reason.startswith("fallback: ")
        assert isinstance(end, Finished)
        assert text
        assert len(cloud.bodies) == 1
        assert await here.status("fallbacks") == 1
        assert await here.status("routes") == {"edge": 2}

    cloud = ScriptedCloud(script)
    with_device(tmp_path, test, cloud)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ((failed("over_capacity", "full", retryable=True),), CapacityError),
        ((failed("unavailable", "going", retryable=True),), UnavailableError),
        ((HERE, failed("execution_failed", "broken")), ExecutionError),
        ((failed("invalid_request", "messages: too many"),), RequestError),
    ],
    ids=["full", "leaving", "broken", "refused"],
)
def test_who_asked_for_the_cloud_hears_what_the_cloud_said(
    tmp_path: Path, script: tuple[AnswerEvent, ...], kind: type[TidegateError]
) -> None:
    async def test(here: Device) -> None:
        with pytest.raises(kind):
            await here.ask(call(tidegate={"route": "cloud"}))
        with pytest.raises(kind):
            await here.ask(call(LONG))
        assert await here.status("fallbacks") == 0
        assert here.engine.snapshot().steps == 0

    with_device(tmp_path, test, ScriptedCloud(script))


def test_an_answer_that_began_in_the_cloud_is_never_begun_again(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        await measured(here)
        steps = here.engine.snapshot().steps
        routed, text, end = await here.ask(overflowing())
        assert (routed.route, text, end) == ("cloud", "far", broken)
        with_cut.script = (HERE, said("far"))
        answer = here.backend.answer(overflowing())
        assert isinstance(await anext(answer), Routed)
        assert await anext(answer) == said("far")
        with pytest.raises(UnavailableError):
            await anext(answer)
        assert here.engine.snapshot().steps == steps
        assert await here.status("fallbacks") == 0

    broken = failed("unavailable", "gone", retryable=True)
    with_cut = ScriptedCloud((HERE, said("far"), broken))
    with_device(tmp_path, test, with_cut)


def test_only_an_answer_made_here_is_remembered(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        await here.ask(call(LONG))
        assert (await here.ask(call(LONG)))[0].route == "cloud"
        assert await here.status("answer_cache") == {"entries": 0, "bytes": 0}

    with_device(tmp_path, test)


def test_a_status_holds_numbers_and_no_text(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        await here.ask(call("confidential words"))
        await here.ask(replace(call(LONG)))
        shown = repr(await here.backend.status())
        assert "confidential" not in shown
        assert "0123456789" not in shown
        assert "far out" not in shown
        assert here.backend.health().healthy
        assert b"tidegate_" in here.backend.metrics()

    with_device(tmp_path, test)
