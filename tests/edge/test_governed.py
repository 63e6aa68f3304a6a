"""The device's backend under a governor: places, held calls, joules in answers, explanations."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from energyboard import BOARD, CLOUD, RADIO
from governedboard import ToyBoard, World, energy_settings
from linkpair import HERE, LinkPair, ScriptedCloud, failed, finished, linked, said
from toyengine import PAGED, serving
from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.api.backend import Explaining, Routed
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.schema import Call, read_chat
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.answer_memory import AnswerMemory
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.energy.governor import Governor
from tidegate.edge.energy.governor_cloud import CloudTimes
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.edge.service import EdgeBackend
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished
from tidegate.engine.settings import EngineSettings
from tidegate.errors import CapacityError

CLOUD_ANSWER = ScriptedCloud((HERE, said("far"), said(" out"), finished()))


def call(words: str = "hello", *, tokens: int = 6, **options: object) -> Call:
    messages = [{"role": "user", "content": words}]
    body: dict[str, object] = {"messages": messages, "max_tokens": tokens}
    return read_chat(body | {"temperature": 0, "tidegate": options})


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device under test."""

    backend: EdgeBackend
    governor: Governor
    world: World
    engine: Engine
    behaviour: Behaviour
    link: LinkPair | None

    async def ask(self, asked: Call) -> tuple[Routed, Finished]:
        async with asyncio.timeout(10):
            routed, *_, end = [event async for event in self.backend.answer(asked)]
        assert isinstance(routed, Routed)
        assert isinstance(end, Finished)
        return routed, end

    def owe(self) -> None:
        """So much that whatever may leave does."""
        self.governor._device.budget.debt.joules = 1e6

    async def energy(self) -> Mapping[str, object]:
        told = (await self.backend.status())["energy"]
        assert isinstance(told, Mapping)
        return json.loads(json.dumps(told))  # type: ignore[no-any-return]


@asynccontextmanager
async def device(
    folder: Path, cloud: ScriptedCloud | None, *, books: bool
) -> AsyncIterator[Device]:
    behaviour = Behaviour()
    world = World(battery=BatteryState(share=0.3, plugged=False, full_j=100_000.0))
    board = ToyBoard(world, settings=energy_settings(until="23:59"), cloud=CLOUD, books=books)
    governor = board.governor
    assert isinstance(board.device.cloud, CloudTimes)
    board.device.cloud.radio = RADIO
    executor = ToyExecutor(PAGED, behaviour=behaviour)
    text = toy_text(context_tokens=1024, eos=False)
    settings = EngineSettings(most_waiting=8)
    engine = Engine(
        executor,
        text,
        model_id="toy",
        settings=settings,
        watcher=governor.accounts.stepped,
        ended=governor.computed,
    )
    async with (
        serving(engine),
        nullcontext() if cloud is None else linked(folder, cloud) as link,
    ):
        backend = EdgeBackend(
            EngineBackend(engine, route="edge", created_s=0),
            cloud=None if link is None else CloudLeg(link.device),
            memory=AnswerMemory(AnswerCache(budget_bytes=1 << 16, ttl_s=60, clock=engine.clock)),
            batch_rows=BOARD.rows,
            queue_limit=3,
            governor=governor,
        )
        running = asyncio.create_task(governor.run())
        await asyncio.sleep(0)
        try:
            yield Device(
                backend=backend,
                governor=governor,
                world=world,
                engine=engine,
                behaviour=behaviour,
                link=link,
            )
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


def with_device(
    folder: Path,
    test: Callable[[Device], Awaitable[None]],
    cloud: ScriptedCloud | None = CLOUD_ANSWER,
    *,
    books: bool = False,
) -> None:
    """`books`: with the daemon's own ledger."""

    async def run() -> None:
        async with device(folder, cloud, books=books) as made:
            await test(made)

    asyncio.run(run())


def test_an_answer_of_the_device_says_why_and_what_it_took(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        routed, end = await here.ask(call())
        assert routed.route == "edge"
        assert routed.reason.startswith("here: ")
        assert end.energy is not None
        assert (end.energy.scope, end.energy.source) == ("board", "estimated")
        told = await here.energy()
        assert told["decisions"] != 0
        assert (told["held"], told["running"]) == (0, 0)
        assert told["totals_j"] != []
        metrics = here.backend.metrics().decode()
        assert 'tidegate_energy_joules_total{route="edge",scope="board"' in metrics

    with_device(tmp_path, test)


def test_an_answer_of_the_cloud_takes_the_radio_alone(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        routed, end = await here.ask(call(route="cloud"))
        assert routed.route == "cloud"
        assert routed.reason == "asked for the cloud"
        assert end.energy is not None
        assert end.energy.scope == "radio"

    with_device(tmp_path, test)


def test_a_kept_answer_takes_nothing_that_anybody_counted(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        await here.ask(call())
        routed, end = await here.ask(call())
        assert (routed.route, end.energy) == ("cache", None)
        explained = await here.backend.explain(call())
        assert (explained["route"], explained["reason"]) == ("cache", routed.reason)

    with_device(tmp_path, test)


def test_debt_sends_away_what_may_leave_and_nothing_else(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        here.owe()
        routed, _ = await here.ask(call("one", privacy="local"))
        assert routed.route == "edge"
        here.owe()
        routed, _ = await here.ask(call("two", route="edge"))
        assert routed.route == "edge"
        here.owe()
        routed, _ = await here.ask(call("three"))
        assert routed.route == "cloud"
        assert " J owed" in routed.reason

    with_device(tmp_path, test)


def test_background_calls_are_held_and_counted_and_leave_with_their_caller(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        callers = [
            asyncio.create_task(here.ask(call(f"b{number}", priority="background", route="edge")))
            for number in range(3)
        ]
        await asyncio.sleep(0.1)
        assert (await here.energy())["held"] == 3
        with pytest.raises(CapacityError, match="queue is full"):
            await here.ask(call("one more", priority="background", privacy="local"))
        callers[0].cancel()
        await asyncio.sleep(0.05)
        assert (await here.energy())["held"] == 2
        late = call("late", priority="background", route="edge")
        callers.append(asyncio.create_task(here.ask(late)))
        await asyncio.sleep(0.05)
        # The line is full for their like, and for nobody else.
        routed, _ = await here.ask(call("now", privacy="local"))
        assert routed.route == "edge"
        for one in callers[1:]:  # they rode along
            assert (await one)[0].route == "edge"
        assert (await here.energy())["held"] == 0

    with_device(tmp_path, test)


def test_when_the_cloud_fails_the_device_answers_under_the_governor(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        here.owe()
        routed, end = await here.ask(call())
        assert routed.route == "edge"
        assert routed.reason.startswith("fallback")
        assert end.energy is not None
        assert (await here.energy())["running"] == 0

    with_device(tmp_path, test, ScriptedCloud((failed("unavailable", "gone", retryable=True),)))


def test_explaining_runs_nothing_and_names_filters_clock_and_terms(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        assert isinstance(here.backend, Explaining)
        private = await here.backend.explain(call("secret words", privacy="local"))
        filters = private["filters"]
        assert isinstance(filters, dict)
        assert filters["edge"] is None
        assert filters["cloud"].startswith("private (local)")
        pace = private["pace"]
        assert isinstance(pace, dict)
        assert pace["terms"]["cloud_j"] is None
        assert pace["terms"]["local_j"] > 0
        opened = await here.backend.explain(call("hello", deadline_ms=5000))
        pace = opened["pace"]
        assert isinstance(pace, dict)
        assert pace["terms"]["cloud_j"] > 0
        assert "secret" not in json.dumps(private)
        away = await here.backend.explain(call("hello", route="cloud"))
        assert (away["route"], away["pace"]) == ("cloud", None)
        waits = await here.backend.explain(call("hello", priority="background", route="edge"))
        assert waits["route"] == "edge"
        assert str(waits["reason"]).startswith("held: background work waits for company")
        state = waits["state"]
        assert isinstance(state, dict)
        assert state["kept_answer"] == "none identical"
        assert here.engine.snapshot().steps == 0
        assert len(here.governor.requests.held) == 0

    with_device(tmp_path, test)


def test_a_failing_governor_leaves_the_choice_to_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(here: Device) -> None:
        def broken() -> bool:
            raise RuntimeError("broken")

        monkeypatch.setattr(here.governor, "_state", broken)
        routed, _ = await here.ask(call())
        assert routed.reason.startswith("fits: nothing measured yet")
        routed, _ = await here.ask(call("again"))
        assert routed.reason.startswith("fits: ")
        assert (await here.energy())["failures"] == 1

    with_device(tmp_path, test)


def test_many_calls_at_once_all_end_and_nothing_is_left(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        asked = [call(f"words {number}", deadline_ms=60_000) for number in range(3)]
        answers = await asyncio.gather(*(here.ask(one) for one in asked))
        assert {routed.route for routed, _ in answers} <= {"edge", "cloud"}
        assert len(here.governor.requests.held) == 0
        assert here.governor.view().running == 0

    with_device(tmp_path, test)


# Rows


def test_a_reader_that_stops_holds_no_row(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        readers = []
        for number in range(BOARD.rows):
            reader = here.backend.answer(call(f"slow {number}", route="edge"))
            readers.append(reader)
            async with asyncio.timeout(5):
                assert isinstance(await anext(reader), Routed)
                await anext(reader)
        async with asyncio.timeout(5):
            while here.engine.snapshot().running:
                await asyncio.sleep(0.01)
        assert here.governor.view().running == 0
        routed, _ = await here.ask(call("fifth", route="edge"))
        assert routed.route == "edge"
        for reader in readers:
            assert isinstance([event async for event in reader][-1], Finished)

    with_device(tmp_path, test)


LONG = ScriptedCloud((HERE, said(" and so on"), finished()))
NEVER_ENDS = ScriptedCloud((HERE, said(" and so on"), None))


def test_while_the_cloud_goes_on_with_an_answer_its_row_is_free(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        routes: list[str] = []

        async def read() -> None:
            async for event in here.backend.answer(call(tokens=2000)):
                routes.extend([event.route] if isinstance(event, Routed) else [])

        reading = asyncio.create_task(read())
        async with asyncio.timeout(10):
            while len(routes) < 2:
                await asyncio.sleep(0.01)
        assert routes == ["edge", "cloud"]
        assert here.governor.view().running == 0
        reading.cancel()
        await asyncio.wait({reading})

    with_device(tmp_path, test, NEVER_ENDS)


def test_a_continued_answer_tells_no_joule_twice(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        routed, end = await here.ask(call(tokens=2000))
        assert routed.route == "edge"
        assert (await here.backend.status())["handoffs"] == 1
        # Of the board and of the radio: the totals have both, no sum would be of anything.
        assert end.energy is None
        totals = here.governor.view().totals
        assert {"board", "radio"} <= {scope for scope, _, _ in totals}
        assert totals["radio", "estimated", "cloud"] > 0

    with_device(tmp_path, test, LONG, books=True)


def test_the_clouds_times_are_of_the_prompt_that_was_sent(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        cloud = here.governor._device.cloud
        assert cloud is not None
        await here.ask(call(tokens=2000))
        sent = here.governor.view().totals["radio", "estimated", "cloud"]
        # The prompt and all that was said here, which together are the device's whole context.
        context = here.engine.context_tokens
        assert sent == pytest.approx(cloud.cost.device_j(RADIO, context, 2, tail=1.0))

    with_device(tmp_path, test, LONG, books=True)


def test_all_who_wait_find_room_when_the_governor_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(here: Device) -> None:
        work = [
            asyncio.create_task(here.ask(call(f"b{number}", priority="background", route="edge")))
            for number in range(3)
        ]
        await asyncio.sleep(0.1)

        def broken() -> bool:
            raise RuntimeError("broken")

        monkeypatch.setattr(here.governor, "_state", broken)
        now = [
            asyncio.create_task(here.ask(call(f"now {number}", route="edge")))
            for number in range(3)
        ]
        for routed, _ in await asyncio.gather(*now):
            assert routed.route == "edge"
        assert (await here.energy())["held"] == 3, "who may wait does"
        here.governor.close_line()
        for routed, _ in await asyncio.gather(*work):
            assert routed.route == "edge"

    with_device(tmp_path, test)


def test_those_of_both_lines_find_room_when_the_governor_ends(tmp_path: Path) -> None:
    async def test(here: Device) -> None:
        here.behaviour.gate = threading.Event()
        asked = [call(f"b{number}", priority="background", route="edge") for number in range(3)]
        callers = [asyncio.create_task(here.ask(one)) for one in asked]
        await asyncio.sleep(0.1)
        asked = [call(f"now {number}", route="edge") for number in range(3)]
        callers += [asyncio.create_task(here.ask(one)) for one in asked]
        await asyncio.sleep(0.1)
        assert here.governor.view().held >= 4, "more than the engine's own line takes"
        here.governor.close_line()
        await asyncio.sleep(0.1)
        here.behaviour.gate.set()
        for routed, _ in await asyncio.gather(*callers):
            assert routed.route == "edge"

    with_device(tmp_path, test)
