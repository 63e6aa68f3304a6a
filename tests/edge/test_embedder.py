"""An encoder bundle behind `/v1/embeddings`: batches by load, order kept, faults contained."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import byte_tokenizer
from encodercheckpoints import torch_outputs
from encodermodels import CLASSIFIER, TINY, write_encoder_bundle
from openvinomodels import Packing
from tinymodel import RandomWeights

from tidegate.api.encoder_model import EmbeddingModel, ServedAs
from tidegate.edge.embedder import EncoderDoor, open_classifier, open_embedder
from tidegate.edge.executors.encoder import EncoderExecutor, EncoderSettings, Ids, Lengths
from tidegate.engine.text_batches import BatchLimits
from tidegate.errors import (
    BundleError,
    CapacityError,
    ExecutionError,
    RequestError,
    UnavailableError,
)
from tidegate.model.encoder_use import usual_use
from tidegate.model.packed import Array

WEIGHTS = RandomWeights(TINY, quantise=Packing(bits=8, symmetric=False))
SMALL = EncoderSettings(batch_rows=4, batch_tokens=64, threads=1, exact=True)
LONGEST = 12


class CountingGraph:
    """The sum of each text's tokens, how many texts came together, and a gate to hold a run."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.sizes: list[int] = []
        self.fails = False

    def run(self, ids: Ids, lengths: Lengths) -> Array:
        assert self.open.wait(10)
        self.sizes.append(len(ids))
        if self.fails:
            raise ZeroDivisionError("secret")
        sums = np.array([row[:end].sum() for row, end in zip(ids, lengths, strict=True)])
        return np.repeat(sums[:, None], TINY.width, axis=1).astype(np.float32)

    def close(self) -> None:
        self.open.set()


def counting() -> tuple[EmbeddingModel, CountingGraph]:
    graph = CountingGraph()
    settings = EncoderSettings(batch_rows=64, batch_tokens=4096, context_tokens=LONGEST)
    encoder = EncoderExecutor(graph, TINY, settings)
    graph.sizes.clear()
    served = ServedAs(model_id="tiny", created_s=0, limits=BatchLimits(rows=64, tokens=4096))
    return EmbeddingModel(encoder, byte_tokenizer(TINY.vocab), usual_use(TINY), served), graph


async def held(embedder: EmbeddingModel, graph: CountingGraph) -> asyncio.Task[list[float]]:
    """A call whose run has begun and stands still until the gate is open."""
    graph.open.clear()
    first = asyncio.create_task(sums(embedder, [1]))
    while embedder.batcher.busy_s == 0:
        await asyncio.sleep(0.001)
    return first


async def in_line(embedder: EmbeddingModel, texts: int) -> None:
    """Wait until so many wait."""
    while embedder.batcher.waiting < texts:
        await asyncio.sleep(0.001)


async def sums(embedder: EmbeddingModel, *texts: Sequence[int]) -> list[float]:
    embedded = await embedder.embed(tuple(tuple(text) for text in texts))
    return [float(vector[0]) for vector in embedded.vectors]


@pytest.mark.parametrize("choice", ["onnx", "openvino"])
def test_a_bundle_embeds_as_torch_does(tmp_path: Path, choice: str) -> None:
    write_encoder_bundle(tmp_path / "b", TINY, WEIGHTS)
    wanted = replace(SMALL, choice="onnx" if choice == "onnx" else "openvino")
    embedder = open_embedder(tmp_path / "b", EncoderDoor(settings=wanted, created_s=3))
    tokens = [[1, 2, 3], [4], list(range(20))]

    async def ask() -> Array:
        embedded = await embedder.embed(tuple(map(tuple, tokens)))
        assert embedded.tokens == 24
        return embedded.vectors

    found = asyncio.run(ask())
    embedder.close()
    np.testing.assert_allclose(found, torch_outputs(TINY, WEIGHTS, tokens), atol=1e-5)
    assert (embedder.card.id, embedder.dimensions) == ("tiny-encoder", TINY.width)


def test_calls_that_come_while_one_runs_share_the_next_run() -> None:
    async def scenario() -> None:
        embedder, graph = counting()
        first = await held(embedder, graph)
        later = [asyncio.create_task(sums(embedder, [n], [n, n])) for n in range(2, 7)]
        await in_line(embedder, 10)
        graph.open.set()
        assert await first == [1]
        assert await asyncio.gather(*later) == [[n, 2 * n] for n in range(2, 7)]
        assert graph.sizes == [1, 10]
        embedder.close()

    asyncio.run(scenario())


def test_a_wrong_text_is_refused_alone_and_by_name() -> None:
    async def scenario() -> None:
        embedder, _ = counting()
        with pytest.raises(RequestError, match=r"input\[1\]: 13 tokens: must be from 1 to 12"):
            await sums(embedder, [1], [0] * 13)
        with pytest.raises(RequestError, match=r"input\[0\]: 900 characters: must be at most 192"):
            await embedder.embed(("x" * 900,))
        with pytest.raises(RequestError, match="token ids must be between 0 and 202"):
            await sums(embedder, [203])
        assert await sums(embedder, [7]) == [7]
        embedder.close()

    asyncio.run(scenario())


def test_a_failed_run_fails_its_calls_and_the_next_works() -> None:
    async def scenario() -> None:
        embedder, graph = counting()
        graph.fails = True
        with pytest.raises(ExecutionError):
            await sums(embedder, [1])
        graph.fails = False
        assert await sums(embedder, [2]) == [2]
        embedder.close()

    asyncio.run(scenario())


def test_the_line_is_bounded_and_a_caller_that_left_hurts_nobody() -> None:
    async def scenario() -> None:
        embedder, graph = counting()
        first = await held(embedder, graph)
        gone = asyncio.create_task(sums(embedder, *([[2]] * (BatchLimits().most_waiting - 1))))
        await in_line(embedder, BatchLimits().most_waiting - 1)
        with pytest.raises(CapacityError, match="texts would be waiting"):
            await sums(embedder, [3], [3])
        gone.cancel()
        last = asyncio.create_task(sums(embedder, [4]))
        await asyncio.sleep(0.05)
        graph.open.set()
        assert await first == [1]
        assert await last == [4]
        embedder.close()

    asyncio.run(scenario())


def test_calls_that_come_at_once_share_the_bound_of_the_line() -> None:
    async def scenario() -> None:
        embedder, graph = counting()
        first = await held(embedder, graph)
        half = [[2]] * (BatchLimits().most_waiting // 2)
        calls = [asyncio.create_task(sums(embedder, *half)) for _ in range(3)]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert [type(call.exception()) for call in done] == [CapacityError]
        graph.open.set()
        await first
        await asyncio.wait(calls)
        embedder.close()

    asyncio.run(scenario())


def test_closing_fails_what_still_waits_so_that_it_is_asked_again() -> None:
    async def scenario() -> None:
        embedder, graph = counting()
        running = await held(embedder, graph)
        waiting = asyncio.create_task(sums(embedder, [2]))
        await in_line(embedder, 1)
        graph.open.set()
        embedder.close()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            await running

    asyncio.run(scenario())


@pytest.mark.parametrize("choice", ["onnx", "openvino"])
def test_a_classifiers_bundle_says_how_likely_each_label_is(tmp_path: Path, choice: str) -> None:
    weights = RandomWeights(CLASSIFIER, quantise=Packing(bits=8, symmetric=False))
    write_encoder_bundle(tmp_path / "b", CLASSIFIER, weights)
    wanted = replace(SMALL, choice="onnx" if choice == "onnx" else "openvino")
    classifier = open_classifier(tmp_path / "b", EncoderDoor(settings=wanted, created_s=0))
    tokens = [[1, 2, 3], [4], list(range(20))]
    found = asyncio.run(classifier.classify(tuple(map(tuple, tokens))))
    classifier.close()
    logits = torch_outputs(CLASSIFIER, weights, tokens)
    powers = np.exp(logits)
    np.testing.assert_allclose(found.probs, powers / powers.sum(1, keepdims=True), atol=1e-5)
    assert (found.tokens, classifier.labels) == (24, ("no", "maybe", "yes"))


def test_each_kind_of_bundle_has_its_own_door(tmp_path: Path) -> None:
    weights = RandomWeights(CLASSIFIER, quantise=Packing(bits=8, symmetric=False))
    write_encoder_bundle(tmp_path / "labels", CLASSIFIER, weights, targets=("onnx",))
    write_encoder_bundle(tmp_path / "vectors", TINY, WEIGHTS, targets=("onnx",))
    door = EncoderDoor(settings=SMALL, created_s=0)
    with pytest.raises(BundleError, match="is a classifier: it makes labels and no embeddings"):
        open_embedder(tmp_path / "labels", door)
    with pytest.raises(BundleError, match="is no classifier: it makes embeddings and no labels"):
        open_classifier(tmp_path / "vectors", door)
