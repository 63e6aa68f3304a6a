"""Several models in one service: loaded when asked for, unloaded for one another, never in use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from toypool import ToyModels, started, toy_pool, toy_settings

from tidegate.api.backend import Routed
from tidegate.api.schema import Call, read_chat
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.model_pool import ModelPool
from tidegate.engine.events import Finished, TextDelta
from tidegate.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    RequestError,
    UnavailableError,
)


def run(
    test: Callable[[CloudBackend, ToyModels], Awaitable[None]],
    *,
    names: tuple[str, ...] = ("one", "two", "three"),
    maker: ToyModels | None = None,
    **settings: Any,
) -> None:
    maker = maker or ToyModels()

    async def main() -> None:
        async with asyncio.timeout(30), started(toy_pool(names, maker, **settings)) as backend:
            await test(backend, maker)

    asyncio.run(main())


def chat(model: str | None = None, **fields: Any) -> Call:
    named = {} if model is None else {"model": model}
    said = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    return read_chat({**said, **named, **fields})


async def asked(backend: CloudBackend, model: str | None = None, **fields: Any) -> tuple[str, str]:
    """The model that answered, and what."""
    events = [event async for event in backend.answer(chat(model, **fields))]
    assert isinstance(events[0], Routed)
    assert isinstance(events[-1], Finished)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return events[0].model, text


async def in_line(backend: CloudBackend, model: str, calls: int) -> None:
    """Wait until so many wait for that model to be loaded."""
    while backend.pool.entries[model].waiting < calls:
        await asyncio.sleep(0.005)


def states(backend: CloudBackend) -> dict[str, str | None]:
    return {card.id: card.state for card in backend.models()}


def test_a_model_is_loaded_by_the_first_call_that_names_it() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        assert states(backend) == {"one": "ready", "two": "unloaded", "three": "unloaded"}
        assert (await asked(backend))[0] == "one"
        assert (await asked(backend, "two"))[0] == "two"
        assert (await asked(backend, "two"))[0] == "two"
        assert maker.loads == ["one", "two"]
        assert states(backend) == {"one": "ready", "two": "ready", "three": "unloaded"}

    run(test)


def test_an_unknown_model_is_404_and_loads_nothing() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        with pytest.raises(RequestError, match="'four' is not served here") as caught:
            await asked(backend, "four")
        assert caught.value.status == 404
        assert maker.loads == ["one"]

    run(test)


def test_the_longest_unused_idle_model_makes_room() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        await asked(backend, "two")
        await asked(backend, "one")
        await asked(backend, "three")
        assert states(backend) == {"one": "ready", "two": "unloaded", "three": "ready"}
        assert maker.closed == ["two-0"]
        await asked(backend, "two")
        assert states(backend)["one"] == "unloaded"

    run(test, models_mib=20)


def test_a_model_in_use_is_waited_for_and_stays_until_its_calls_end() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        pool = backend.pool
        async with pool.use("one"):
            waits = asyncio.create_task(asked(backend, "two"))
            await in_line(backend, "two", 1)
            assert not waits.done()
            assert states(backend) == {"one": "ready", "two": "loading", "three": "unloaded"}
            assert pool.entries["two"].waiting == 1
        assert (await waits)[0] == "two"
        assert states(backend)["one"] == "unloaded"
        assert maker.closed == ["one-0"]

    run(test, models_mib=10)


def test_without_room_in_time_the_answer_is_the_sum_and_not_who_else_is_here() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        async with backend.pool.use("one"):
            with pytest.raises(CapacityError) as caught:
                await asked(backend, "two")
        told = str(caught.value)
        assert told.startswith("model 'two' needs 10 MiB and the models may take 15 MiB together")
        assert "others in use take 10 MiB" in told
        assert "one" not in told
        assert (await asked(backend, "two"))[0] == "two", "now there is room"

    run(test, models_mib=15, load_wait_s=0.1)


def test_a_model_larger_than_the_budget_is_refused_at_start_with_the_sum() -> None:
    with pytest.raises(ConfigError, match=r"models_mib = 9: must be at least 10: model 'one'"):
        run(_nothing, models_mib=9)


def test_models_that_do_not_fit_together_are_not_all_loaded_at_start() -> None:
    settings = toy_settings(("one", "two"), models_mib=15)
    both = tuple(
        type(model)(name=model.name, path=model.path, load="start") for model in settings.models
    )
    with pytest.raises(ConfigError, match=r"load = 'start': must be first-use for some.*\n.*two"):
        run(_nothing, models=both, models_mib=15)


async def _nothing(backend: CloudBackend, maker: ToyModels) -> None:
    raise AssertionError("it does not start")


def test_all_who_ask_while_a_model_is_loaded_share_one_load() -> None:
    maker = ToyModels(gates={"two": threading.Event()})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        asks = [asyncio.create_task(asked(backend, "two")) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert (await asked(backend, "one"))[0] == "one", "others are served meanwhile"
        maker.gates["two"].set()
        assert {name for name, _ in await asyncio.gather(*asks)} == {"two"}
        assert maker.loads == ["one", "two"]

    run(test, maker=maker)


def test_the_line_for_a_load_is_bounded() -> None:
    maker = ToyModels(gates={"two": threading.Event()})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        asks = [asyncio.create_task(asked(backend, "two")) for _ in range(3)]
        await in_line(backend, "two", 3)
        with pytest.raises(CapacityError, match="3 calls wait for 'two' to be loaded: at most 3"):
            await asked(backend, "two")
        maker.gates["two"].set()
        await asyncio.gather(*asks)

    run(test, maker=maker, most_waiting=3)


def test_a_deadline_ends_the_wait_and_the_load_goes_on_for_others() -> None:
    maker = ToyModels(gates={"two": threading.Event()})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        with pytest.raises(UnavailableError, match=r"'two' is being loaded: not within 0\.05 s"):
            await asked(backend, "two", tidegate={"deadline_ms": 50})
        maker.gates["two"].set()
        assert (await asked(backend, "two"))[0] == "two"
        assert maker.loads == ["one", "two"]

    run(test, maker=maker)


def test_a_load_that_fails_is_an_answer_and_is_tried_again_after_a_while() -> None:
    maker = ToyModels(broken={"two": CheckpointError("/secret/place: is damaged")})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        asks = [asyncio.create_task(asked(backend, "two")) for _ in range(3)]
        for one in asks:
            with pytest.raises(UnavailableError, match="'two' could not be loaded") as caught:
                await one
            assert "secret" not in str(caught.value)
        with pytest.raises(UnavailableError):
            await asked(backend, "two")
        assert maker.loads == ["one", "two"], "not again at once"
        assert states(backend)["two"] == "failed"
        found: Any = await backend.status()
        assert found["models"]["two"]["problem"] == "/secret/place: is damaged"
        assert backend.health().healthy
        assert (await asked(backend, "one"))[0] == "one"
        del maker.broken["two"]
        backend.pool.entries["two"].retry_at_s = 0.0
        assert (await asked(backend, "two"))[0] == "two"

    run(test, maker=maker)


def test_what_a_library_raises_in_a_load_is_an_answer_too() -> None:
    maker = ToyModels(broken={"two": MemoryError("of 3 tensors")})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        with pytest.raises(UnavailableError, match="'two' could not be loaded"):
            await asked(backend, "two")
        assert "MemoryError" in str(backend.pool.entries["two"].failure)

    run(test, maker=maker)


def test_a_drain_refuses_who_waits_for_a_load_and_finishes_who_runs() -> None:
    maker = ToyModels(gates={"two": threading.Event()})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        pool: ModelPool[Any] = backend.pool
        runs = asyncio.create_task(asked(backend, "one", max_tokens=60))
        waits = asyncio.create_task(asked(backend, "two"))
        while not pool.entries["one"].current.model.engine.snapshot().running:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        assert await pool.drain(10)
        with pytest.raises(UnavailableError, match="shutting down"):
            await waits
        assert (await runs)[0] == "one"
        assert not backend.health().ready
        maker.gates["two"].set()

    run(test, maker=maker)


def test_all_choices_of_a_call_have_one_version() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        async with backend.hold(chat("two", n=2)) as held:
            version = backend.pool.entries["two"].current
            assert version is not None
            assert version.leases == 1
            events = [event async for event in held.answer(chat("two"))]
            assert isinstance(events[-1], Finished)
        assert version.leases == 0

    run(test)


def test_metrics_and_health_tell_every_model_by_name() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        await asked(backend, "two")
        text = backend.metrics().decode()
        for name in ("one", "two"):
            assert f'tidegate_num_requests_running{{model_name="{name}"}} 0.0' in text
        assert 'tidegate_model_state{model_name="two",state="ready"} 1.0' in text
        assert 'tidegate_model_state{model_name="three",state="unloaded"} 1.0' in text
        assert 'tidegate_model_memory_bytes{model_name="two"} 1.048576e+07' in text
        assert 'tidegate_model_loads_total{model_name="two",outcome="ok"} 1.0' in text
        assert backend.health().detail == (
            "one: 0 running, 0 waiting; two: 0 running, 0 waiting; three: unloaded"
        )
        assert [offer.id for offer in backend.offers()] == ["one", "two", "three"]

    run(test)


def test_one_model_alone_is_told_as_before() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        assert backend.health().detail == "0 running, 0 waiting"
        found: Any = await backend.status()
        assert found["engine"]["model"] == "one"

    run(test, names=("one",))


def test_a_load_that_waits_for_room_lets_a_model_load_that_fits() -> None:
    maker = ToyModels(sizes_mib={"big": 15, "small": 5})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        async with backend.pool.use("hot"):
            big = asyncio.create_task(asked(backend, "big"))
            await in_line(backend, "big", 1)
            assert (await asked(backend, "small", tidegate={"deadline_ms": 3000}))[0] == "small"
            assert not big.done()
        assert (await big)[0] == "big"

    run(test, names=("hot", "big", "small"), maker=maker, models_mib=20)


def test_a_load_that_waits_for_room_ends_when_nobody_waits_for_it() -> None:
    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        two = backend.pool.entries["two"]
        async with backend.pool.use("one"):
            asks = asyncio.create_task(asked(backend, "two"))
            await in_line(backend, "two", 1)
            asks.cancel()
            await asyncio.gather(asks, return_exceptions=True)
            async with asyncio.timeout(2):
                while two.job is not None:
                    await asyncio.sleep(0.005)
        assert (two.state, two.failed_loads) == ("unloaded", 0)
        assert states(backend)["one"] == "ready", "nobody went for a load that nobody wants"

    run(test, models_mib=10)


def test_a_library_error_of_a_description_is_kept_as_that_of_a_load_is() -> None:
    maker = ToyModels()

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        maker.describes.clear()
        maker.unreadable["two"] = PermissionError(13, "no entry", "/secret/place")
        for _ in range(2):
            with pytest.raises(UnavailableError, match="'two' could not be loaded"):
                await asked(backend, "two")
        assert maker.describes == ["two"], "not again at once"
        assert "PermissionError" in str(backend.pool.entries["two"].failure)

    run(test, maker=maker, load_wait_s=0.5)


def test_a_load_that_ends_after_a_drain_began_serves_nobody() -> None:
    maker = ToyModels(gates={"two": threading.Event()})

    async def test(backend: CloudBackend, maker: ToyModels) -> None:
        waits = asyncio.create_task(asked(backend, "two"))
        while maker.loads != ["one", "two"]:
            await asyncio.sleep(0.005)
        assert await backend.pool.drain(1)
        maker.gates["two"].set()
        while backend.pool.entries["two"].job is not None:
            await asyncio.sleep(0.005)
        with pytest.raises(UnavailableError, match="shutting down"):
            await waits
        assert maker.closed == ["two-0"]
        for name in ("one", "two"):
            with pytest.raises(UnavailableError, match="shutting down"):
                await asked(backend, name)

    run(test, maker=maker)
