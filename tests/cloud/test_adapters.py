"""LoRA adapters beside a model: answers of the merged checkpoint, KV apart, a bounded number."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import PREFIX, write_adapter
from checkpoints import checkpoint_tensors, safetensors_bytes, write_checkpoint
from tinymodel import RandomWeights, tiny_architecture
from toypool import started

from tidegate.api.backend import Routed
from tidegate.api.schema import read_chat
from tidegate.cloud.adapter_book import AdapterBook
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.executor_choice import ExecutorSettings
from tidegate.cloud.language_model import LanguageModel, LanguageModels
from tidegate.cloud.model_settings import AdapterSettings, ModelSettings, PoolSettings
from tidegate.cloud.model_updates import PoolUpdater
from tidegate.cloud.served_models import Models
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.converters.lora import Lora
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.errors import CapacityError, CheckpointError, ExecutionError, UnavailableError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.lora import Adapter
from tidegate.model.roles import roles

ARCH = tiny_architecture()
SIZES = TorchSettings(slots=4, context_tokens=128, step_tokens=64)
TORCH = ExecutorSettings(choice="torch", rows=4, context_tokens=128, step_tokens=64)
PROMPT = np.arange(3, 24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m") / "base", ARCH, RandomWeights(ARCH))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return write_adapter(root / "a", seed=1), write_adapter(root / "b", seed=2, rank=6)


def merged_executor(base: Path, adapter: Path | None) -> TorchExecutor:
    """The twin: a checkpoint with the adapter in its weights."""
    with Checkpoint.open(base) as checkpoint:
        if adapter is None:
            return TorchExecutor(ARCH, checkpoint.weights(), SIZES)
        with Lora.open(adapter) as lora:
            weights = lora.merged(checkpoint.weights(), checkpoint.sources)
            return TorchExecutor(ARCH, weights, SIZES)


def with_adapters(base: Path, *folders: Path) -> TorchExecutor:
    """The model alone, with adapters 1, 2, ... beside it."""
    shapes = {name: role.shape for name, role in roles(ARCH).items()}
    with Checkpoint.open(base) as checkpoint:
        executor = TorchExecutor(ARCH, checkpoint.weights(), SIZES)
        for number, folder in enumerate(folders, start=1):
            with Adapter.open(folder) as adapter:
                deltas = adapter.checked(checkpoint.sources, shapes)
                executor.load_adapter(number, adapter.low_ranks(deltas))
    return executor


def row(
    tokens: Any, *, slot: int, past: int = 0, logits: int = 1, adapter: int | None = None
) -> Row:
    return Row(tokens=np.asarray(tokens), past=past, slot=slot, logits=logits, adapter=adapter)


def test_rows_of_one_step_have_each_their_own_adapter_and_the_merged_checkpoints_logits(
    base: Path, adapters: tuple[Path, Path]
) -> None:
    executor = with_adapters(base, *adapters)
    numbers = (1, None, 2, 1)
    rows = [
        row(PROMPT[: 9 + place], slot=place, logits=2, adapter=number)
        for place, number in enumerate(numbers)
    ]
    found = executor.execute(ExecutorStep(rows=tuple(rows))).logits
    follow = tuple(
        row([50 + place], slot=place, past=9 + place, adapter=number)
        for place, number in enumerate(numbers)
    )
    decoded = executor.execute(ExecutorStep(rows=follow)).logits
    for place, number in enumerate(numbers):
        twin = merged_executor(base, None if number is None else adapters[number - 1])
        alone = row(PROMPT[: 9 + place], slot=0, logits=2)
        expected = twin.execute(ExecutorStep(rows=(alone,))).logits
        assert np.allclose(found[2 * place : 2 * place + 2], expected, atol=2e-4)
        after = twin.execute(ExecutorStep(rows=(row([50 + place], slot=0, past=9 + place),)))
        assert np.allclose(decoded[place], after.logits[0], atol=2e-4)
    plain = executor.execute(ExecutorStep(rows=(row(PROMPT[:9], slot=0, logits=2),))).logits
    assert np.abs(found[:2] - plain).max() > 0.05, "the adapter changes something"


def test_an_adapter_that_went_is_there_for_the_step_that_was_planned_with_it_and_no_further(
    base: Path, adapters: tuple[Path, Path]
) -> None:
    executor = with_adapters(base, adapters[0])
    step = ExecutorStep(rows=(row(PROMPT, slot=0, adapter=1),))
    before = executor.execute(step).logits
    executor.unload_adapter(1)
    assert np.array_equal(executor.execute(step).logits, before)
    with pytest.raises(ExecutionError, match="adapter 1 is not loaded"):
        executor.execute(step)


@dataclass(frozen=True)
class Said:
    model: str
    text: str
    cached_tokens: int


async def asked(backend: CloudBackend, model: str, words: str) -> Said:
    call = read_chat(
        {
            "messages": [{"role": "user", "content": words}],
            "model": model,
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
        }
    )
    events = [event async for event in backend.answer(call)]
    assert isinstance(events[0], Routed)
    assert isinstance(events[-1], Finished)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return Said(events[0].model, text, events[-1].usage.cached_tokens)


def served(base: Path, *folders: Path, **changed: Any) -> ModelSettings:
    named = tuple(AdapterSettings(name=f"m-{folder.name}", path=folder) for folder in folders)
    return ModelSettings(name="m", path=base, executor=TORCH, adapters=named, **changed)


def run(
    model: ModelSettings, test: Callable[[CloudBackend], Awaitable[None]], **settings: Any
) -> None:
    async def main() -> None:
        pool = Models(PoolSettings(models=(model,), **settings), LanguageModels())
        async with asyncio.timeout(50), started(pool) as backend:
            await test(backend)

    asyncio.run(main())


def book(backend: CloudBackend) -> AdapterBook:
    current = backend.pool.entries["m"].current
    assert current is not None
    assert isinstance(current.model, LanguageModel)
    assert current.model.adapters is not None
    return current.model.adapters


def merged_checkpoint(base: Path, adapter: Path, out: Path) -> Path:
    """The base with the adapter in its weights, in float32: nothing is rounded once more."""
    shutil.copytree(base, out)
    with Checkpoint.open(base) as checkpoint, Lora.open(adapter) as lora:
        merged = lora.merged(checkpoint.weights(), checkpoint.sources)
        tensors = safetensors_bytes(checkpoint_tensors(ARCH, merged), dtype="F32")
    (out / "model.safetensors").write_bytes(tensors)
    return out


def test_answers_are_those_of_the_merged_checkpoint(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    questions = [f"question number {number}" for number in range(4)]
    found: dict[str, list[str]] = {}

    async def beside(backend: CloudBackend) -> None:
        for name in ("m-a", "m-b"):
            said = [asked(backend, name, words) for words in questions]
            found[name] = [one.text for one in await asyncio.gather(*said)]

    run(served(base, *adapters), beside)
    for folder in adapters:

        async def merged(backend: CloudBackend, name: str = f"m-{folder.name}") -> None:
            said = [await asked(backend, "m", words) for words in questions]
            assert [one.text for one in said] == found[name]

        run(served(merged_checkpoint(base, folder, tmp_path / folder.name)), merged)


def test_requests_of_several_adapters_at_once_get_what_each_gets_alone_and_kv_stays_apart(
    base: Path, adapters: tuple[Path, Path]
) -> None:
    names = ("m", "m-a", "m-b")
    words = "the same long question for everyone who asks here"
    alone: dict[str, str] = {}

    async def one(backend: CloudBackend) -> None:
        for name in names:
            said = await asked(backend, name, words)
            assert (said.model, said.cached_tokens) == (name, 0), "nobody else's KV"
            alone[name] = said.text
            again = await asked(backend, name, words)
            assert again.text == said.text
            assert again.cached_tokens > 16, "its own KV"
        assert len(set(alone.values())) == 3

    run(served(base, *adapters), one)

    async def together(backend: CloudBackend) -> None:
        found = await asyncio.gather(*(asked(backend, name, words) for name in names * 2))
        assert [(one.model, one.text) for one in found] == [
            (name, alone[name]) for name in names * 2
        ]

    run(served(base, *adapters), together)


def test_the_model_list_has_adapters_with_their_parent(
    base: Path, adapters: tuple[Path, Path]
) -> None:
    async def test(backend: CloudBackend) -> None:
        cards = [(card.id, card.parent, card.state) for card in backend.models()]
        assert cards == [
            ("m", None, "ready"),
            ("m-a", "m", "ready"),
            ("m-b", "m", "ready"),
        ]
        assert [offer.id for offer in backend.offers()] == ["m", "m-a", "m-b"]
        found: Any = await backend.status()
        assert found["models"]["m"]["memory_mib"]["adapters, 4 at once"] == 1

    run(served(base, *adapters), test)


def test_the_least_recently_used_adapter_makes_room_and_one_in_use_stays(
    base: Path, adapters: tuple[Path, Path]
) -> None:
    async def test(backend: CloudBackend) -> None:
        first = await asked(backend, "m-a", "hello")
        assert book(backend).loaded == ("m-a",)
        await asked(backend, "m-b", "hello")
        assert book(backend).loaded == ("m-b",)
        version = backend.pool.entries["m"].facts.adapters["m-b"]
        settings = backend.pool.entries["m"].settings.adapters[1]
        async with book(backend).use(settings, version):
            with pytest.raises(CapacityError, match="1 adapters are in use: at most 1 may"):
                await asked(backend, "m-a", "hello")
        again = await asked(backend, "m-a", "hello")
        assert again.text == first.text
        assert again.cached_tokens == 0, "its KV was under a number that nobody has again"

    run(served(base, *adapters, most_adapters=1), test)


def test_an_adapter_that_cannot_be_read_takes_no_place_and_is_not_read_for_every_call(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = (write_adapter(tmp_path / name, seed=1) for name in "ab")

    async def test(backend: CloudBackend) -> None:
        await asked(backend, "m-a", "hello")
        whole = (bad / "adapter_model.safetensors").read_bytes()
        (bad / "adapter_model.safetensors").write_bytes(whole[:-8])
        for _ in range(2):
            with pytest.raises(UnavailableError, match="'m-b' could not be loaded"):
                await asked(backend, "m-b", "hello")
        assert book(backend).loaded == ("m-a",)
        told = [one for one in caplog.messages if one.startswith("adapter m-b: adapter_model")]
        assert len(told) == 1, "read and logged once"

    run(served(base, good, bad, most_adapters=1), test)


def test_an_adapter_whose_files_changed_is_another_one_after_a_reload(
    base: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", seed=1)

    async def test(backend: CloudBackend) -> None:
        before = await asked(backend, "m-a", "hello there")
        write_adapter(folder, seed=9)
        (change,) = await PoolUpdater(backend.pool).apply(backend.pool.settings, "beside")
        assert (change.kind, change.problem) == ("settings", None)
        after = await asked(backend, "m-a", "hello there")
        assert after.text != before.text
        assert after.cached_tokens == 0

    run(served(base, folder), test)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"use_dora": True}, r"adapter_config\.json: use_dora = True"),
        ({"r": 5}, "must have rank 5"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3': must be 'LORA'"),
    ],
)
def test_an_adapter_that_cannot_be_added_is_refused_at_start(
    base: Path, tmp_path: Path, damage: dict[str, object], problem: str
) -> None:
    folder = write_adapter(tmp_path / "a", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | damage))
    with pytest.raises(CheckpointError, match=problem):
        LanguageModels().describe(served(base, folder))


def test_an_adapter_for_another_shape_and_one_with_another_digest_are_refused(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_checkpoint(
        tmp_path / "narrow", tiny_architecture(width=64), RandomWeights(tiny_architecture(width=64))
    )
    with pytest.raises(CheckpointError, match=r"is for a weight \(128, 128\): layers\.0\.q is"):
        LanguageModels().describe(served(other, adapters[0]))
    with Adapter.open(adapters[0]) as found:
        right = found.sha256
    for digest, good in ((right, True), ("0" * 64, False)):
        settings = AdapterSettings(name="x", path=adapters[0], sha256=digest)
        model = ModelSettings(name="m", path=base, executor=TORCH, adapters=(settings,))
        if good:
            assert LanguageModels().describe(model).adapters.keys() == {"x"}
        else:
            with pytest.raises(CheckpointError, match="must be 0000"):
                LanguageModels().describe(model)


def test_a_weight_of_its_own_can_only_be_merged(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", seed=1)
    shapes = {name: role.shape for name, role in roles(ARCH).items()}
    with Checkpoint.open(base) as checkpoint, Adapter.open(folder) as adapter:
        name = f"{PREFIX}0.self_attn.q_proj.base_layer.weight"
        entries = adapter.file.entries
        some = next(iter(entries.values()))
        adapter.file.entries = {**entries, name: some}
        with pytest.raises(
            CheckpointError, match=r"base_layer\.weight: replaces a weight: must be"
        ):
            adapter.checked(checkpoint.sources, shapes)
