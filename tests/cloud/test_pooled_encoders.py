"""Encoders in the pool of models: loaded by a call, unloaded for others, never while in use."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from encodercheckpoints import CLASSIFIER, hf_embeddings, random_texts, write_encoder
from toypool import ToyModels, toy_settings

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoders import Encoders
from tidegate.api.http import create_app
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.encoder import TorchEncoderSettings
from tidegate.cloud.encoders import (
    EncoderInMemory,
    EncoderModels,
    EncodersSettings,
    NamedCheckpoint,
    peek_encoder,
)
from tidegate.cloud.model_settings import ModelSettings, PoolSettings
from tidegate.cloud.model_updates import PoolUpdater
from tidegate.cloud.pool_report import models_status
from tidegate.cloud.pool_room import MIB
from tidegate.cloud.pooled_encoders import PooledEmbedder, encoders_of
from tidegate.cloud.pooled_model import ModelFacts
from tidegate.cloud.served_models import Models, ServedModels, with_encoders
from tidegate.errors import CheckpointError, ConfigError, DeadlineError, UnavailableError
from tidegate.model.packed import Array

ONE_THREAD = TorchEncoderSettings(threads=1, device="cpu", batch_tokens=2048)
TEXTS = tuple(map(tuple, random_texts(5, 9)))


class GatedEncoders(EncoderModels):
    """Loads after a gate was opened, and notes each."""

    def __init__(self, settings: EncodersSettings, metrics: EncoderMetrics) -> None:
        super().__init__(settings, metrics)
        self.gate = threading.Event()
        self.gate.set()
        self.loads: list[str] = []

    def load(self, settings: ModelSettings, facts: ModelFacts) -> EncoderInMemory:
        assert self.gate.wait(20), "a test forgot to open the gate"
        self.loads.append(settings.name)
        return super().load(settings, facts)


@dataclass(kw_only=True)
class World:
    """A toy model, two embedders and a classifier in one pool."""

    folders: dict[str, Path]
    settings: EncodersSettings
    maker: GatedEncoders
    pool: Models
    encoders: Encoders

    def embedder(self, name: str) -> PooledEmbedder:
        (found,) = [one for one in self.encoders.embedders if one.card.id == name]
        assert isinstance(found, PooledEmbedder)
        return found

    async def vectors(self, name: str = "one", **asked: Any) -> Array:
        return (await self.embedder(name).embed(TEXTS, **asked)).vectors

    def states(self) -> dict[str, str | None]:
        return {card.id: card.state for card in self.encoders.cards()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {
        "one": write_encoder(root / "one", "bert", pooling="cls_token"),
        "two": write_encoder(root / "two", "distilbert", pooling="mean_tokens"),
        "mood": write_encoder(root / "mood", "bert", CLASSIFIER, id2label={"0": "a", "1": "b"}),
    }


def settings_of(folders: dict[str, Path]) -> EncodersSettings:
    named = {name: NamedCheckpoint(name=name, path=path) for name, path in folders.items()}
    return EncodersSettings(
        embedders=(named["one"], named["two"]), classifiers=(named["mood"],), encoder=ONE_THREAD
    )


@asynccontextmanager
async def world(folders: dict[str, Path], text: ToyModels, **pool: Any) -> AsyncIterator[World]:
    settings, metrics = settings_of(folders), EncoderMetrics()
    maker = GatedEncoders(settings, metrics)
    models = Models(
        with_encoders(toy_settings(("toy",), **pool), settings), ServedModels(text, maker)
    )
    try:
        await models.start()
        encoders = encoders_of(models, metrics, created_s=7)
        yield World(folders=folders, settings=settings, maker=maker, pool=models, encoders=encoders)
    finally:
        await models.close()


def run(
    folders: dict[str, Path],
    test: Callable[[World], Awaitable[None]],
    text: ToyModels | None = None,
    **pool: Any,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), world(folders, text or ToyModels(), **pool) as found:
            await test(found)

    asyncio.run(main())


def test_an_encoder_is_known_at_start_and_loaded_by_the_first_call(
    checkpoints: dict[str, Path],
) -> None:
    async def test(world: World) -> None:
        assert world.states() == {"one": "unloaded", "two": "unloaded", "mood": "unloaded"}
        one, (mood,) = world.embedder("one"), world.encoders.classifiers
        assert (one.dimensions, one.card.context_tokens, one.card.created_s) == (48, 64, 7)
        assert tuple(mood.labels) == ("a", "b")
        assert world.maker.loads == []
        found = await asyncio.gather(*(world.vectors() for _ in range(4)))
        expected = hf_embeddings(checkpoints["one"], [list(text) for text in TEXTS], "cls")
        for vectors in found:
            np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert (await mood.classify(TEXTS)).probs.shape == (2, 2)
        assert world.maker.loads == ["one", "mood"]
        assert world.states() == {"one": "ready", "two": "unloaded", "mood": "ready"}

    run(checkpoints, test)


def needs_mib(checkpoints: dict[str, Path]) -> int:
    settings = settings_of(checkpoints)
    sizes = [peek_encoder(one, settings).memory.nbytes for one in settings.embedders]
    return -(-max(sizes) // MIB)


def test_encoders_and_models_make_room_for_one_another(checkpoints: dict[str, Path]) -> None:
    size_mib = needs_mib(checkpoints)

    async def test(world: World) -> None:
        def here() -> list[str]:
            return [name for name, entry in world.pool.entries.items() if entry.state == "ready"]

        backend = CloudBackend(world.pool, created_s=0, encoders=world.encoders)
        assert here() == ["toy"]
        first = await world.vectors("one")
        assert here() == ["toy", "one"]
        await world.vectors("two")
        assert here() == ["one", "two"], "the least recently used one went"
        await backend.text_of("toy")
        assert here() == ["toy", "two"]
        np.testing.assert_array_equal(await world.vectors("one"), first)
        assert here() == ["toy", "one"]
        assert world.maker.loads == ["one", "two", "one"]

    run(checkpoints, test, ToyModels(sizes_mib={"toy": size_mib}), models_mib=2 * size_mib)


def test_an_encoder_in_use_stays(checkpoints: dict[str, Path]) -> None:
    async def test(world: World) -> None:
        async with world.pool.use("one"):
            waits = asyncio.create_task(world.vectors("two"))
            await asyncio.sleep(0.05)
            assert world.states()["one"] == "ready"
            assert not waits.done()
        assert (await waits).shape == (2, 48)

    run(checkpoints, test, ToyModels(sizes_mib={"toy": 1}), models_mib=needs_mib(checkpoints))


def test_what_is_not_loaded_in_time_is_a_missed_deadline(checkpoints: dict[str, Path]) -> None:
    async def test(world: World) -> None:
        world.maker.gate.clear()
        with pytest.raises(DeadlineError, match=r"one: not loaded within 0\.05 s"):
            await world.vectors(timeout_s=0.05)
        waits = asyncio.create_task(world.vectors())
        world.maker.gate.set()
        assert (await waits).shape == (2, 48)
        assert world.maker.loads == ["one"], "the load went on for others"

    run(checkpoints, test)


def test_an_encoder_whose_weights_are_damaged_is_told_to_callers_and_hurts_no_other(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folders = checkpoints | {"one": tmp_path / "one"}
    shutil.copytree(checkpoints["one"], tmp_path / "one")

    async def test(world: World) -> None:
        file = tmp_path / "one" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UnavailableError, match="'one' could not be loaded"):
            await world.vectors("one")
        assert world.states()["one"] == "failed"
        assert (await world.vectors("two")).shape == (2, 48)
        backend = CloudBackend(world.pool, created_s=0, encoders=world.encoders)
        assert backend.health().healthy

    run(folders, test)


def test_new_files_of_an_encoder_take_over_without_a_dropped_call(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folders = checkpoints | {"one": tmp_path / "one"}
    shutil.copytree(checkpoints["one"], tmp_path / "one")

    async def test(world: World) -> None:
        before = await world.vectors()
        write_encoder(tmp_path / "new", "bert", pooling="mean_tokens")
        shutil.copytree(tmp_path / "new", tmp_path / "one", dirs_exist_ok=True)
        update = asyncio.create_task(PoolUpdater(world.pool).apply(world.pool.settings, "beside"))
        answers = [before]
        while not update.done():
            answers.append(await world.vectors())
        kinds = {change.name: (change.kind, change.problem) for change in update.result()}
        assert kinds.pop("one") == ("replaced", None)
        assert set(kinds.values()) == {("same", None)}
        after = await world.vectors()
        assert not np.allclose(before, after)
        for one in answers:
            assert np.allclose(one, before) or np.allclose(one, after)
        while world.pool.retiring:
            await asyncio.sleep(0.005)
        model = world.pool.entries["one"].current
        assert model is not None
        assert isinstance(model.model, EncoderInMemory)
        model.model.model.batcher._line.add(99, [3], now_s=0.0)  # type: ignore[arg-type]
        assert 'texts_waiting{model_name="one"} 1.0' in world.encoders.render().decode()

    run(folders, test)


def test_a_call_for_text_that_names_an_encoder_is_404_and_loads_nothing(
    checkpoints: dict[str, Path],
) -> None:
    async def test(world: World) -> None:
        backend = CloudBackend(world.pool, created_s=0, encoders=world.encoders)
        app = create_app(backend, encoders=world.encoders, texts=backend.text_of)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            body = {"model": "one", "messages": [{"role": "user", "content": "hi"}]}
            refused = await client.post("/v1/chat/completions", json=body)
            assert refused.status_code == 404
            listed = (await client.get("/v1/models")).json()["data"]
            assert [one["id"] for one in listed] == ["toy", "one", "two", "mood"]
            status = (await models_status(world.pool))["one"]
            assert (status["state"], status["engine"]) == ("unloaded", None)
            texts = {"model": "one", "input": TEXTS}
            answered = await client.post("/v1/embeddings", json=texts)
            assert len(answered.json()["data"]) == 2
            page = (await client.get("/metrics")).text
            assert 'tidegate_model_loads_total{model_name="one",outcome="ok"} 1.0' in page
        assert [offer.id for offer in backend.offers()] == ["toy"]
        assert world.maker.loads == ["one"]

    run(checkpoints, test)


def test_an_encoder_of_the_other_kind_is_refused_at_start(checkpoints: dict[str, Path]) -> None:
    mixed = checkpoints | {"one": checkpoints["mood"]}
    with pytest.raises(CheckpointError, match="one: is a classifier"):
        run(mixed, lambda world: asyncio.sleep(0))


def test_an_encoder_that_is_larger_than_all_may_be_is_refused_at_start(
    checkpoints: dict[str, Path],
) -> None:
    settings = EncodersSettings(
        embedders=(NamedCheckpoint(name="e", path=checkpoints["one"]),),
        encoder=TorchEncoderSettings(threads=1, device="cpu", batch_tokens=1 << 16),
    )
    models = with_encoders(toy_settings(("toy",), models_mib=10), settings)
    pool = Models(models, ServedModels(ToyModels(), EncoderModels(settings)))
    with pytest.raises(ConfigError, match="e: a run of 65536 tokens"):
        asyncio.run(pool.start())


def test_the_longest_run_is_that_of_encoders_in_memory(checkpoints: dict[str, Path]) -> None:
    async def test(world: World) -> None:
        assert world.encoders.busy_s() == 0
        await world.vectors()
        (busy,) = [one for one in world.pool.versions() if one.settings.name == "one"]
        assert isinstance(busy.model, EncoderInMemory)
        busy.model.model.batcher._running_since_s = -1000.0
        assert world.encoders.problem() is not None

    run(checkpoints, test)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused_before_anything_is_read() -> None:
    settings = EncodersSettings(
        embedders=(NamedCheckpoint(name="e", path=Path("nowhere")),),
        encoder=TorchEncoderSettings(device="cuda"),
    )
    with pytest.raises(ConfigError, match="device = 'cuda'"):
        with_encoders(toy_settings(), settings)


class Sizeless(ToyModels):
    """Toy models of which one takes whatever it finds, as an executor on a GPU does."""

    def describe(self, settings: ModelSettings) -> ModelFacts:
        facts = super().describe(settings)
        if settings.name != "takes-all":
            return facts
        return ModelFacts(
            context_tokens=facts.context_tokens, place="host", memory=None, version=facts.version
        )


def test_what_takes_all_that_it_finds_is_loaded_last() -> None:
    maker, names = Sizeless(), ("takes-all", "one", "two")
    models = tuple(ModelSettings(name=name, path=Path(name), load="start") for name in names)
    pool = Models(PoolSettings(models=models), maker)

    async def main() -> None:
        await pool.start()
        await pool.close()

    asyncio.run(main())
    assert maker.loads == ["one", "two", "takes-all"]
