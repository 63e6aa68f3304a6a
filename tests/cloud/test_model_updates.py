"""Models replaced while they are used: no call is dropped, every answer is of one version."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from keyedapp import keyed_access
from toyexecutor import Behaviour
from toypool import ToyModels, started, toy_pool, toy_settings

from tidegate.api.http import create_app
from tidegate.api.settings import HttpSettings
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.key_rules import KeyRules
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.model_settings import AdapterSettings, ModelSettings, PoolSettings
from tidegate.cloud.model_updates import Change, Mode, PoolUpdater
from tidegate.cloud.pooled_model import ModelFacts, Version
from tidegate.cloud.reload import Reloader, reload_route
from tidegate.cloud.served_models import Models
from tidegate.cloud.service import CloudSettings
from tidegate.engine.executor import ExecutorStep, Logits
from tidegate.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    RequestError,
    UnavailableError,
)

CHAT = "/v1/chat/completions"
OLD, NEW = ModelSettings(name="m", path=Path("old")), ModelSettings(name="m", path=Path("new"))


def shifted(by: int) -> Behaviour:
    """Another model: every token that it chooses is another one."""

    def distorts(step: ExecutorStep, logits: Logits) -> Logits:
        return np.roll(logits, by, axis=-1)

    return Behaviour(distorts=distorts, step_s=0.001)


def two_versions() -> ToyModels:
    return ToyModels(behaviours={"old-0": shifted(0), "new-0": shifted(7)})


Test = Callable[[CloudBackend, ToyModels, httpx.AsyncClient], Awaitable[None]]


def run(test: Test, *, maker: ToyModels | None = None, **settings: Any) -> None:
    maker = maker or two_versions()

    async def main() -> None:
        pool = toy_pool((), maker, **{"models": (OLD,), **settings})
        async with asyncio.timeout(50), started(pool) as backend:
            transport = httpx.ASGITransport(create_app(backend))
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                await test(backend, maker, client)

    asyncio.run(main())


def body(number: int, **fields: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": f"question {number % 7}"}]}
    return {**said, "model": "m", "max_tokens": 6 + number % 5, "temperature": 0, **fields}


async def said(client: httpx.AsyncClient, number: int, **fields: Any) -> str:
    answer = await client.post(CHAT, json=body(number, **fields))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


async def streamed(client: httpx.AsyncClient, number: int) -> str:
    answer = await client.post(CHAT, json=body(number, stream=True))
    assert answer.status_code == 200, answer.text
    chunks = [one.removeprefix("data: ") for one in answer.text.split("\n\n") if one]
    assert chunks.pop() == "[DONE]", answer.text
    return "".join(json.loads(one)["choices"][0]["delta"].get("content") or "" for one in chunks)


def updated(backend: CloudBackend, *models: ModelSettings, **settings: Any) -> PoolSettings:
    return replace(backend.pool.settings, models=models, **settings)


async def apply(
    backend: CloudBackend, *models: ModelSettings, mode: Mode = "beside"
) -> list[Change]:
    return list(await PoolUpdater(backend.pool).apply(updated(backend, *models), mode))


async def settled(backend: CloudBackend) -> None:
    while backend.pool.retiring:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("mode", "budget_mib"), [("beside", None), ("drain-first", 15)])
def test_under_steady_load_nothing_is_dropped_and_every_answer_is_of_one_version(
    mode: Mode, budget_mib: int | None
) -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        truth = {"old": [await said(client, number) for number in range(35)]}
        await apply(backend, NEW, mode=mode)
        truth["new"] = [await said(client, number) for number in range(35)]
        assert not set(truth["old"]) & set(truth["new"]), "their answers tell them apart"
        found: Counter[str] = Counter()
        stop = asyncio.Event()

        async def asks(first: int) -> None:
            number = first
            while not stop.is_set():
                ask = streamed if number % 2 else said
                text = await ask(client, number)
                (version,) = (name for name, texts in truth.items() if text == texts[number % 35])
                found[version] += 1
                number += 3

        async def more() -> None:
            """Wait for two dozen answers."""
            enough = found.total() + 24
            while found.total() < enough:
                await asyncio.sleep(0.005)

        load = [asyncio.create_task(asks(first)) for first in range(6)]
        for model in (OLD, NEW, OLD, NEW):
            await more()
            (change,) = await apply(backend, model, mode=mode)
            assert change == Change(name="m", kind="replaced")
        await more()
        stop.set()
        await asyncio.gather(*load)
        await settled(backend)
        assert min(found["old"], found["new"]) > 5
        assert maker.closed == ["old-0", "new-0"] * 2 + ["old-0"]
        entry = backend.pool.entries["m"]
        assert entry.current is not None
        assert entry.current.facts.version == "new-0"
        assert isinstance(entry.current.model, LanguageModel)
        assert entry.current.model.engine.snapshot().kv_usage == 0

    run(test, models_mib=budget_mib)


def test_a_new_version_that_cannot_be_loaded_leaves_the_old_one_serving() -> None:
    maker = two_versions()
    maker.broken["new-0"] = CheckpointError("model.safetensors: is cut off")

    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        before = await said(client, 1)
        (change,) = await apply(backend, NEW)
        assert change.kind == "replaced"
        assert change.problem == "model.safetensors: is cut off"
        assert await said(client, 1) == before
        (change,) = await apply(backend, NEW, mode="drain-first")
        assert change.problem == "model.safetensors: is cut off"
        assert await said(client, 1) == before, "the old version came back"
        assert backend.models()[0].state == "ready"

    run(test, maker=maker)


def test_a_new_version_that_does_not_answer_its_probe_never_serves() -> None:
    maker = two_versions()
    maker.behaviours["new-0"] = Behaviour(fails=lambda step: True)

    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        before = await said(client, 1)
        (change,) = await apply(backend, NEW)
        assert change.problem is not None
        assert change.problem.startswith("the first step of the model failed")
        assert maker.closed == ["new-0"]
        assert await said(client, 1) == before

    run(test, maker=maker)


def test_without_room_for_both_it_says_so_and_offers_to_drain_first() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        (change,) = await apply(backend, NEW)
        assert change.problem is not None
        assert "model 'm' needs 10 MiB and the models may take 15 MiB" in change.problem
        assert "no room for both versions: with drain-first" in change.problem
        (change,) = await apply(backend, NEW, mode="drain-first")
        assert change.problem is None
        assert maker.closed == ["old-0"]

    run(test, models_mib=15)


def test_the_old_version_ends_what_it_began_while_the_new_one_answers() -> None:
    maker = two_versions()
    gate = threading.Event()
    gate.set()
    maker.behaviours["old-0"].gate = gate

    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        old = await said(client, 1)
        gate.clear()
        begun = asyncio.create_task(said(client, 1))
        current: Version[Any] | None = backend.pool.entries["m"].current
        assert current is not None
        while not current.model.engine.snapshot().running:
            await asyncio.sleep(0.001)
        await apply(backend, NEW)
        new = await said(client, 1)
        assert new != old
        assert not begun.done()
        found: Any = await backend.status()
        assert found["models"]["m"]["replaced_in_use"] == 1
        gate.set()
        assert await begun == old
        await settled(backend)
        assert maker.closed == ["old-0"]

    run(test, maker=maker)


def test_models_are_added_and_removed_and_the_order_follows() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        other = ModelSettings(name="other", path=Path("other"), load="first-use")
        assert await apply(backend, other, OLD) == [
            Change(name="other", kind="added"),
            Change(name="m", kind="same"),
        ]
        assert [card.id for card in backend.models()] == ["other", "m"]
        assert await apply(backend, other) == [
            Change(name="m", kind="removed"),
            Change(name="other", kind="same"),
        ]
        gone = await client.post(CHAT, json=body(1))
        assert gone.status_code == 404
        await settled(backend)
        assert maker.closed == ["old-0"]
        assert await said(client, 1, model="other")

    run(test)


def test_files_that_changed_are_a_new_version_under_the_same_settings() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        assert await apply(backend, OLD) == [Change(name="m", kind="same")]
        maker.versions["old"] += 1
        assert await apply(backend, OLD) == [Change(name="m", kind="replaced")]
        assert maker.loads == ["m", "m"]

    run(test)


def test_a_model_that_can_never_fit_changes_nothing() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        maker.sizes_mib["huge"] = 99
        huge = ModelSettings(name="huge", path=Path("huge"))
        with pytest.raises(ConfigError, match="models_mib = 25: must be at least 99"):
            await apply(backend, NEW, huge)
        assert list(backend.pool.entries) == ["m"]
        assert maker.loads == ["m"]
        assert backend.pool.settings.models == (OLD,)

    run(test, models_mib=25)


def test_one_update_runs_at_a_time() -> None:
    maker = two_versions()

    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        maker.gates["m"] = threading.Event()
        updater = PoolUpdater(backend.pool)
        first = asyncio.create_task(updater.apply(updated(backend, NEW), "beside"))
        await asyncio.sleep(0.05)
        with pytest.raises(CapacityError, match="another update of the models is running"):
            await updater.apply(updated(backend, OLD), "beside")
        maker.gates["m"].set()
        assert (await first)[0].problem is None

    run(test, maker=maker)


def test_an_admins_call_reloads_and_tells_what_was_done_and_what_takes_a_restart(
    tmp_path: Path,
) -> None:
    opened = CloudSettings(models=toy_settings((), models=(OLD,)))
    written = [opened]

    async def main() -> None:
        maker, access = two_versions(), keyed_access(tmp_path)
        now_s = access.clock()
        keys = {
            scope: access.keys.add(scope, KeyRules(scopes=(scope,)), now_s=now_s)[1]
            for scope in ("chat", "admin")
        }
        pool = toy_pool((), maker, models=(OLD,))
        async with asyncio.timeout(30), started(pool) as backend:
            surface = HttpSettings(admission=access)
            reloader = Reloader(pool, opened, lambda: written[-1])
            app = create_app(
                backend, settings=surface, extra_routes=[reload_route(reloader, surface)]
            )
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:

                async def reload(scope: str, **said: Any) -> httpx.Response:
                    heads = {"Authorization": f"Bearer {keys[scope]}"}
                    return await client.post("/admin/reload", json=said, headers=heads)

                assert (await reload("chat")).status_code == 403
                done = await reload("admin")
                same = {"name": "m", "kind": "same", "problem": None}
                assert done.json() == {"changes": [same], "after_restart": []}
                written.append(replace(opened, models=toy_settings((), models=(NEW,)), port=99))
                done = await reload("admin")
                assert done.status_code == 200
                replaced = {"name": "m", "kind": "replaced", "problem": None}
                assert done.json() == {"changes": [replaced], "after_restart": ["port"]}
                wrong = await reload("admin", mode="at once")
                assert wrong.status_code == 400
                maker.broken["old-0"] = CheckpointError("config.json: is not JSON")
                written.append(opened)
                done = await reload("admin", mode="drain-first")
                assert done.status_code == 409
                assert done.json()["error"]["message"] == "m: config.json: is not JSON"
        await access.close()

    asyncio.run(main())


def test_an_update_whose_files_cannot_be_read_leaves_all_settings() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        before = backend.pool.settings
        maker.unreadable["m"] = PermissionError(13, "no entry")
        with pytest.raises(UnavailableError, match="'m': PermissionError while its files"):
            await PoolUpdater(backend.pool).apply(replace(before, load_wait_s=7.0), "beside")
        assert backend.pool.settings is before

    run(test)


def test_a_new_version_whose_engine_ends_in_its_probe_does_not_end_the_service() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        before = await said(client, 1)
        serves = asyncio.create_task(backend.pool.run())
        await asyncio.sleep(0)
        load = maker.load

        def dying(settings: ModelSettings, facts: ModelFacts) -> LanguageModel:
            model = load(settings, facts)

            async def run() -> None:
                raise RuntimeError("a defect")

            model.run = run  # type: ignore[method-assign]
            return model

        maker.load = dying  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            (change,) = await apply(backend, NEW)
        assert change.problem == "the engine of the new version ended while it was probed"
        assert not serves.done()
        assert await said(client, 1) == before
        serves.cancel()
        await asyncio.gather(serves, return_exceptions=True)

    run(test)


@pytest.mark.parametrize("later", ["/b", None])
def test_an_adapter_that_changes_while_its_model_loads_is_the_one_of_afterwards(
    later: str | None,
) -> None:
    def settings(path: str | None) -> PoolSettings:
        adapters = () if path is None else (AdapterSettings(name="legal", path=Path(path)),)
        parent = ModelSettings(name="p", path=Path("p"), load="first-use", adapters=adapters)
        return toy_settings((), models=(OLD, parent))

    maker = ToyModels(gates={"p": threading.Event()})

    async def main() -> None:
        pool = Models(settings("/a"), maker)
        async with asyncio.timeout(20), started(pool):

            async def used() -> tuple[str, str]:
                async with pool.use("legal") as found:
                    assert found.adapter is not None
                    return str(found.adapter.path), found.adapter_version

            first = asyncio.create_task(used())
            await asyncio.sleep(0.05)
            update = asyncio.create_task(PoolUpdater(pool).apply(settings(later), "beside"))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(used())
            await asyncio.sleep(0.05)
            maker.gates["p"].set()
            await update
            for one in await asyncio.gather(first, second, return_exceptions=True):
                if isinstance(one, RequestError):
                    assert later is None
                    assert one.status == 404
                else:
                    assert one in {("/a", "/a-0"), ("/b", "/b-0")}, "settings and files are one"

    asyncio.run(main())


def test_a_reload_from_one_model_to_two_counts_with_what_was_free_before_the_first() -> None:
    maker = ToyModels(sizes_mib={"one": 10, "two": 4})

    def free(_: object) -> int:
        return (16 - 10 * len(maker.loads)) << 20

    async def main() -> None:
        pool = Models(toy_settings(("one",)), maker, free)
        async with asyncio.timeout(20), started(pool):
            changes = await PoolUpdater(pool).apply(toy_settings(("one", "two")), "beside")
            assert [one.kind for one in changes] == ["same", "added"]
            async with pool.use("two"):
                assert maker.loads == ["one", "two"]
            assert maker.closed == [], "both fit"

    asyncio.run(main())


def test_what_adapters_take_after_a_reload_is_counted() -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        for size_mib, counted_mib in ((14, 14), (12, 14)):  # those of before may still be there
            maker.sizes_mib["m"] = size_mib
            assert await apply(backend, OLD) == [Change(name="m", kind="settings")]
            (resident,) = backend.pool.residents("host")
            assert resident.nbytes == counted_mib << 20

    run(test)


def test_what_comes_back_is_described_as_its_files_are_by_then() -> None:
    maker = two_versions()
    maker.broken["new-0"] = CheckpointError("model.safetensors: is cut off")

    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        maker.versions["old"] += 1  # somebody wrote over them
        (change,) = await apply(backend, NEW, mode="drain-first")
        assert change.problem == "model.safetensors: is cut off"
        entry = backend.pool.entries["m"]
        assert entry.current is not None
        assert entry.current.facts.version == entry.facts.version == "old-1"

    run(test, maker=maker)


@pytest.mark.parametrize("mode", ["beside", "drain-first"])
def test_a_probe_that_a_library_ends_is_told_and_the_old_version_serves(mode: Mode) -> None:
    async def test(backend: CloudBackend, maker: ToyModels, client: httpx.AsyncClient) -> None:
        before, load = await said(client, 1), maker.load

        def failing(settings: ModelSettings, facts: ModelFacts) -> LanguageModel:
            model = load(settings, facts)

            async def probe() -> None:
                raise ValueError("of a library")

            if facts.version == "new-0":
                model.probe = probe  # type: ignore[method-assign]
            return model

        maker.load = failing  # type: ignore[method-assign]
        (change,) = await apply(backend, NEW, mode=mode)
        assert change.problem == "model 'm': ValueError while it was probed"
        assert await said(client, 1) == before

    run(test)
