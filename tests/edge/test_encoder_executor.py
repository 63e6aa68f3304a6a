"""The encoder's executor: equal to torch over any texts, bounded batches, clear refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encodercheckpoints import torch_outputs
from encodermodels import CLASSIFIER, TINY, write_encoder_bundle
from hypothesis import given
from hypothesis import strategies as st
from openvinomodels import Packing
from tinymodel import RandomWeights, tiny_architecture

from tidegate.edge.executors.encoder import (
    EncoderExecutor,
    EncoderSettings,
    Ids,
    Lengths,
    open_encoder,
)
from tidegate.engine.text_batches import batches
from tidegate.errors import BundleError, ConfigError, ExecutionError, RequestError
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import DEVICE_TARGETS, DeviceTarget
from tidegate.model.packed import Array

WEIGHTS = RandomWeights(TINY, quantise=Packing(bits=8, symmetric=False))
SMALL = EncoderSettings(batch_rows=3, batch_tokens=64, threads=1, exact=True)


def random_texts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY.vocab, rng.integers(1, 41)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    write_encoder_bundle(folder, TINY, WEIGHTS)
    return Bundle.open(folder)


@pytest.fixture(scope="module", params=DEVICE_TARGETS)
def executor(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[EncoderExecutor]:
    executor = open_encoder(bundle, settings(request.param))
    yield executor
    executor.close()


def settings(target: DeviceTarget) -> EncoderSettings:
    return replace(SMALL, choice=target)


def test_many_texts_come_back_in_their_order(executor: EncoderExecutor) -> None:
    texts = random_texts(20)
    found = executor.encode(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch_outputs(TINY, WEIGHTS, texts), atol=1e-5)


def test_a_text_gives_the_same_whatever_is_beside_it(executor: EncoderExecutor) -> None:
    texts = random_texts(7, seed=1)
    alone = np.concatenate([executor.encode([text]) for text in texts])
    np.testing.assert_allclose(executor.encode(texts[::-1])[::-1], alone, atol=1e-5)


def test_no_texts_give_no_rows(executor: EncoderExecutor) -> None:
    assert executor.encode([]).shape == (0, TINY.outputs)


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_a_classifier_gives_a_logit_for_each_label(target: DeviceTarget, tmp_path: Path) -> None:
    weights = RandomWeights(CLASSIFIER)
    bundle = write_encoder_bundle(tmp_path / "b", CLASSIFIER, weights, targets=(target,))
    executor = open_encoder(bundle, EncoderSettings(batch_tokens=64, threads=1, exact=True))
    assert executor.arch.labels == ("no", "maybe", "yes")
    texts = random_texts(4)
    expected = torch_outputs(CLASSIFIER, weights, texts)
    np.testing.assert_allclose(executor.encode(texts), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], r"input\[1\]: 0 tokens: must be from 1 to 40"),
        ([1] * 41, r"input\[1\]: 41 tokens: must be from 1 to 40"),
        ([TINY.vocab], r"input\[1\]: token ids must be between 0 and 202"),
        ([-1], r"input\[1\]: token ids must be between 0 and 202"),
        ([2**70], r"input\[1\]: token ids must be between 0 and 202"),
    ],
)
def test_a_text_that_the_model_has_no_room_for_is_refused(
    executor: EncoderExecutor, text: list[int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        executor.encode([[1], text])
    assert executor.encode([[1]]).shape == (1, TINY.outputs)


class Recorder:
    """A graph that answers with each text's length and remembers how it was asked."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, ids: Ids, lengths: Lengths) -> Array:
        """See `EncoderGraph.run`."""
        assert (ids != 0).sum() in (0, lengths.sum())
        self.shapes.append(ids.shape)
        return np.repeat(lengths[:, None], TINY.outputs, axis=1).astype(np.float32)

    def close(self) -> None:
        """See `EncoderGraph.close`."""


def test_no_run_is_larger_than_what_was_run_at_the_start() -> None:
    graph = Recorder()
    executor = EncoderExecutor(graph, TINY, SMALL)
    assert graph.shapes == [(1, 40), (3, 21)]
    texts = [[1] * length for length in (5, 1, 40, 22, 21, 20, 2)]
    assert executor.encode(texts)[:, 0].tolist() == [len(text) for text in texts]
    assert graph.shapes[2:] == [(1, 40), (2, 22), (3, 20), (1, 1)]


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 8),
    st.integers(1, 200),
)
def test_batches_hold_every_text_once_within_their_bounds(
    lengths: list[int], rows: int, tokens: int
) -> None:
    found = batches(lengths, rows, tokens)
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[number] for number in batch)
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * longest <= tokens
    # No two neighbours would fit into one.
    for one, other in itertools.pairwise(found):
        both = len(one) + 1
        assert both > rows or both * lengths[one[0]] > tokens, other


def test_a_closed_executor_says_so(bundle: Bundle) -> None:
    executor = open_encoder(bundle, SMALL)
    executor.close()
    executor.close()
    with pytest.raises(ExecutionError, match="closed"):
        executor.encode([[1]])


def test_a_shorter_context_is_kept_and_a_longer_one_refused(bundle: Bundle) -> None:
    executor = open_encoder(bundle, EncoderSettings(context_tokens=8, batch_tokens=64, threads=1))
    with pytest.raises(RequestError, match="9 tokens: must be from 1 to 8"):
        executor.encode([[1] * 9])
    with pytest.raises(ConfigError, match="context_tokens = 41: must be at most the bundle's 40"):
        open_encoder(bundle, EncoderSettings(context_tokens=41))


def test_a_target_that_the_bundle_lacks_is_refused(tmp_path: Path) -> None:
    bundle = write_encoder_bundle(tmp_path / "b", TINY, RandomWeights(TINY), targets=("onnx",))
    assert open_encoder(bundle, SMALL).encode([[1]]).shape == (1, TINY.outputs)
    with pytest.raises(BundleError, match="'openvino': the bundle holds onnx"):
        open_encoder(bundle, settings("openvino"))


@pytest.mark.parametrize("target", DEVICE_TARGETS)
def test_a_graph_of_another_shape_than_the_manifest_says_is_refused(
    target: DeviceTarget, bundle: Bundle
) -> None:
    manifest = replace(bundle.manifest, architecture=replace(TINY, width=128))
    with pytest.raises(BundleError, match="not a graph of the manifest's architecture"):
        open_encoder(replace(bundle, manifest=manifest), settings(target))


def test_a_decoder_makes_no_embeddings(bundle: Bundle) -> None:
    manifest = replace(bundle.manifest, architecture=tiny_architecture())
    with pytest.raises(BundleError, match=r"is a decoder \(llama\)"):
        open_encoder(replace(bundle, manifest=manifest), SMALL)


@pytest.mark.parametrize("name", ["batch_rows", "batch_tokens", "threads", "context_tokens"])
def test_settings_of_nothing_are_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        EncoderSettings(**wrong)
