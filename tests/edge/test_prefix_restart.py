"""Both real executors over a folder of prefixes: a restart changes no token and computes less."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from toyengine import Collected, ask, collect, serving
from wordmodel import write_word_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.executors.choice import Choice, ExecutorSettings, open_executor
from tidegate.edge.prefix_store import open_store
from tidegate.engine.engine import Engine
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.spill import SpillingKv
from tidegate.engine.text import TextModel
from tidegate.model.bundle import Bundle

CONTEXT_TOKENS = 256
PREFIX = tuple(np.random.default_rng(3).integers(5, 261, 200).tolist())
CHOICES: tuple[Choice, ...] = ("onnx", "openvino")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("restart")
    checkpoint = write_word_checkpoint(folder / "model", context=CONTEXT_TOKENS)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("onnx", "openvino"), recipe=recipe)
    return convert(checkpoint, folder / "bundle", plan)


@contextmanager
def engine_on(
    bundle: Bundle, choice: Choice, folder: Path | None, *, exact: bool, model: bytes = b"tiny"
) -> Iterator[Engine]:
    """A daemon's engine as after its start; without `folder` there is no disk tier."""
    settings = ExecutorSettings(choice=choice, rows=2, step_tokens=64, threads=1, exact=exact)
    executor = open_executor(bundle, settings)
    assert isinstance(executor, SpillingKv)
    text = TextModel.load(bundle.folder, context_tokens=CONTEXT_TOKENS)
    try:
        if folder is None:
            yield Engine(executor, text, model_id="tiny")
            return
        store = open_store(folder, budget_bytes=64 << 20)
        disk = DiskPrefixes(store, executor, model_digest=model)
        try:
            yield Engine(executor, text, model_id="tiny", disk=disk)
        finally:
            store.close()
    finally:
        executor.close()


def answers(engine: Engine, *tails: int) -> list[Collected]:
    async def run() -> list[Collected]:
        async with serving(engine):
            found = [
                await collect(
                    engine.submit(ask(f"{tail}", (*PREFIX, tail), max_tokens=20, ignore_eos=True))
                )
                for tail in tails
            ]
            await engine.drain(5)
            return found

    return asyncio.run(run())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_restart_loads_the_prefix_and_changes_no_token(
    bundle: Bundle, choice: Choice, tmp_path: Path
) -> None:
    with engine_on(bundle, choice, None, exact=True) as engine:
        expected = answers(engine, 7, 9)
    with engine_on(bundle, choice, tmp_path, exact=True) as engine:
        answers(engine, 7)
    with engine_on(bundle, choice, tmp_path, exact=True) as engine:
        found = answers(engine, 7, 9)
        assert engine.snapshot().disk_hit_tokens == 192
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert found[0].finished.usage.cached_tokens == 192


@pytest.mark.parametrize("choice", CHOICES)
def test_another_precision_or_bundle_matches_nothing_that_was_kept(
    bundle: Bundle, choice: Choice, tmp_path: Path
) -> None:
    with engine_on(bundle, choice, tmp_path, exact=False) as engine:
        answers(engine, 7)
    for exact, model in ((True, b"tiny"), (False, b"other")):
        with engine_on(bundle, choice, tmp_path, exact=exact, model=model) as engine:
            (one,) = answers(engine, 7)
            assert one.finished.usage.cached_tokens == 0
            assert engine.snapshot().disk_hit_tokens == 0


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_damaged_is_a_cold_start_and_no_error(
    bundle: Bundle, choice: Choice, tmp_path: Path
) -> None:
    with engine_on(bundle, choice, tmp_path, exact=True) as engine:
        (expected,) = answers(engine, 7)
    for number, path in enumerate(sorted(tmp_path.glob("*.kv"))):
        content = bytearray(path.read_bytes())
        content[(number * 7919) % len(content)] ^= 0x10
        path.write_bytes(content)
    with engine_on(bundle, choice, tmp_path, exact=True) as engine:
        (one,) = answers(engine, 7)
        assert one.tokens == expected.tokens
        assert one.finished.usage.cached_tokens == 0
        now = engine.snapshot()
        assert now.disk is not None
        assert now.disk.errors == 1, "the first one ended the load"
        assert now.failed == 0
