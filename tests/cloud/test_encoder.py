"""Encoders on torch: what transformers and a device compute, alone or in any company."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from encodercheckpoints import CLASSIFIER as HF_CLASSIFIER
from encodercheckpoints import (
    hf_class_logits,
    hf_embeddings,
    minilm_folder,
    random_texts,
    torch_outputs,
    write_encoder,
)
from encodermodels import CLASSIFIER, DISTILLED, LINEAR, TINY, write_encoder_bundle
from hfcheckpoints import write_hf_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from openvinomodels import Packing
from safetensors.torch import load_file, save_file
from tinymodel import RandomWeights

from tidegate.cloud.encoder import (
    TorchEncoder,
    TorchEncoderSettings,
    encoder_memory,
    take_threads,
)
from tidegate.cloud.encoder_ops import BatchedEncoderOps, EncoderTensors
from tidegate.cloud.encoders import (
    EncodersSettings,
    NamedCheckpoint,
    open_classifier,
    open_embedder,
    peek_encoder,
)
from tidegate.cloud.model_settings import ModelSettings, PoolSettings
from tidegate.cloud.served_models import with_encoders
from tidegate.edge.executors.encoder import EncoderSettings, open_encoder
from tidegate.errors import CheckpointError, ConfigError, ExecutionError, RequestError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array
from tidegate.model.walk import Weights, encoder

T = TypeVar("T")

ONE_THREAD = TorchEncoderSettings(threads=1, device="cpu")
NONE = EncodersSettings(encoder=ONE_THREAD)
TEXTS = random_texts(13, 1, 64, 7, 30)


def batched(arch: EncoderArchitecture, weights: Weights, texts: list[list[int]]) -> Array:
    tensors = EncoderTensors.load(arch, weights, torch.device("cpu"))
    with torch.inference_mode():
        found: Array = encoder(BatchedEncoderOps(texts, tensors), arch, tensors).numpy()
    return found


def configured(folder: Path, **config: Any) -> Path:
    """A checkpoint's folder with more in its config."""
    whole = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([TINY, CLASSIFIER, DISTILLED, LINEAR]),
    st.lists(st.integers(1, TINY.context), min_size=1, max_size=6),
)
def test_texts_together_compute_what_the_reference_does_text_by_text(
    arch: EncoderArchitecture, lengths: list[int]
) -> None:
    weights = RandomWeights(arch)
    texts = [[(7 * n + i) % arch.vocab for i in range(length)] for n, length in enumerate(lengths)]
    found = batched(arch, weights, texts)
    np.testing.assert_allclose(found, torch_outputs(arch, weights, texts), atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_a_tiny_checkpoint_embeds_and_classifies_as_transformers_does(
    model_type: str, tmp_path: Path
) -> None:
    vectors = write_encoder(tmp_path / "e", model_type, pooling="cls_token")
    names = {"0": "yes", "1": "no", "2": "both"}
    labels = write_encoder(tmp_path / "c", model_type, HF_CLASSIFIER, id2label=names)
    embedder = open_embedder(NamedCheckpoint(name="e", path=vectors), NONE)
    classifier = open_classifier(NamedCheckpoint(name="c", path=labels), NONE)
    inputs = tuple(map(tuple, TEXTS))

    async def ask() -> tuple[Array, Array]:
        embedded, classified = await asyncio.gather(
            embedder.embed(inputs), classifier.classify(inputs)
        )
        assert embedded.tokens == classified.tokens == sum(map(len, TEXTS))
        return embedded.vectors, classified.probs

    found, probs = in_loop(ask())
    embedder.close()
    classifier.close()
    np.testing.assert_allclose(found, hf_embeddings(vectors, TEXTS, "cls"), atol=1e-5)
    powers = np.exp(hf_class_logits(labels, TEXTS))
    np.testing.assert_allclose(probs, powers / powers.sum(1, keepdims=True), atol=1e-5)
    assert classifier.labels == ("yes", "no", "both")
    assert (embedder.card.id, embedder.dimensions, embedder.card.context_tokens) == ("e", 48, 64)


def test_a_real_model_embeds_as_transformers_does() -> None:
    folder = minilm_folder()
    model = open_embedder(NamedCheckpoint(name="minilm", path=folder), NONE)
    tokens = [[101, 2023, 2003, 102], [101, *range(2000, 2040), 102], [101, 7592, 102]]
    found = in_loop(model.embed(tuple(map(tuple, tokens)))).vectors
    words = in_loop(model.embed(("hello",))).vectors
    model.close()
    expected = hf_embeddings(folder, tokens, "mean", normalise=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(words[0], expected[2], atol=1e-5)


@pytest.mark.parametrize("arch", [TINY, CLASSIFIER])
def test_the_cloud_computes_what_a_devices_bundle_does_on_the_same_integers(
    arch: EncoderArchitecture, tmp_path: Path
) -> None:
    weights = RandomWeights(arch, quantise=Packing(bits=8, symmetric=False))
    bundle = write_encoder_bundle(tmp_path / "b", arch, weights, targets=("onnx",))
    device = open_encoder(bundle, EncoderSettings(choice="onnx", threads=1, exact=True))
    cloud = TorchEncoder(arch, weights, ONE_THREAD)
    texts = [[1, 2, 3], [4], list(range(20))]
    np.testing.assert_allclose(cloud.encode(texts), device.encode(texts), atol=1e-5)
    device.close()
    cloud.close()
    with pytest.raises(ExecutionError, match="closed"):
        cloud.encode(texts)


def test_more_texts_than_a_run_holds_come_back_in_their_order() -> None:
    weights = RandomWeights(TINY)
    small = TorchEncoder(TINY, weights, TorchEncoderSettings(batch_rows=3, batch_tokens=40))
    texts = [[n % TINY.vocab] * (1 + n % 17) for n in range(23)]
    np.testing.assert_allclose(small.encode(texts), torch_outputs(TINY, weights, texts), atol=1e-5)
    with pytest.raises(RequestError, match=r"input\[1\]: 41 tokens: must be from 1 to 40"):
        small.encode([[1], [1] * 41])


def test_what_it_will_take_is_known_before_a_weight_is_read(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: one * np.nan for name, one in tensors.items()}, folder / "model.safetensors")
    source = NamedCheckpoint(name="e", path=folder)
    facts = peek_encoder(source, NONE)
    assert facts.arch.context == 64
    assert facts.memory.nbytes > facts.memory.parts[0].nbytes > 0
    with pytest.raises(CheckpointError, match="not finite"):
        open_embedder(source, NONE)
    loaded = TorchEncoder(TINY, RandomWeights(TINY), ONE_THREAD)
    assert loaded.nbytes == encoder_memory(TINY, ONE_THREAD).parts[0].nbytes


def test_its_threads_are_its_own() -> None:
    before, found = torch.get_num_threads(), dict[str, int]()

    def work() -> None:
        take_threads(before + 1)
        found["own"] = torch.get_num_threads()
        later = threading.Thread(target=lambda: found.update(later=torch.get_num_threads()))
        later.start()
        later.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == {"own": before + 1, "later": before}
    assert torch.get_num_threads() == before


def test_vectors_are_cut_and_labels_scored_as_the_config_says(tmp_path: Path) -> None:
    nested = configured(
        write_encoder(tmp_path / "e", "bert", pooling="mean_tokens", normalise=True),
        matryoshka_dimensions=[8, 16],
    )
    several = configured(
        write_encoder(tmp_path / "c", "bert", HF_CLASSIFIER, id2label={"0": "a", "1": "b"}),
        problem_type="multi_label_classification",
    )
    embedder = open_embedder(NamedCheckpoint(name="e", path=nested), NONE)
    classifier = open_classifier(NamedCheckpoint(name="c", path=several), NONE)
    whole = in_loop(embedder.embed(("text",))).vectors[0]
    part = in_loop(embedder.embed(("text",), dimensions=8)).vectors[0]
    probs = in_loop(classifier.classify((tuple(TEXTS[0]),))).probs
    embedder.close()
    classifier.close()
    np.testing.assert_allclose(part, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    assert embedder.smaller_dimensions == (8, 16)
    logits = hf_class_logits(several, TEXTS[:1])
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_each_kind_is_refused_at_the_other_door(tmp_path: Path) -> None:
    vectors = write_encoder(tmp_path / "e", "bert")
    labels = write_encoder(tmp_path / "c", "bert", HF_CLASSIFIER)
    write_hf_checkpoint(tmp_path / "d", "llama")
    with pytest.raises(CheckpointError, match="x: is a classifier"):
        open_embedder(NamedCheckpoint(name="x", path=labels), NONE)
    with pytest.raises(CheckpointError, match="x: is no classifier"):
        open_classifier(NamedCheckpoint(name="x", path=vectors), NONE)
    with pytest.raises(CheckpointError, match=r"model_type = 'llama': makes text"):
        open_embedder(NamedCheckpoint(name="x", path=tmp_path / "d"), NONE)


def test_a_name_belongs_to_one_model() -> None:
    one = NamedCheckpoint(name="a", path=Path("a"))
    with pytest.raises(ConfigError, match="name = 'a': must be a name that no other encoder has"):
        EncodersSettings(embedders=(one,), classifiers=(one,))
    models = PoolSettings(models=(ModelSettings(name="a", path=Path("m")),))
    with pytest.raises(ConfigError, match="name = 'a': must be one that no other model"):
        with_encoders(models, EncodersSettings(embedders=(one,)))


@pytest.mark.parametrize(
    "wrong", [{"batch_rows": 0}, {"batch_tokens": 0}, {"threads": 0}, {"device": "tpu"}]
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TorchEncoderSettings(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device = 'cuda': must be cpu or auto"):
        TorchEncoder(TINY, RandomWeights(TINY), TorchEncoderSettings(device="cuda"))


@pytest.mark.gpu
def test_a_cuda_device_computes_what_a_cpu_does() -> None:
    texts = [[n % TINY.vocab] * (1 + n % 17) for n in range(23)]
    for arch in (TINY, CLASSIFIER):
        weights = RandomWeights(arch)
        device = TorchEncoder(arch, weights, TorchEncoderSettings(device="cuda"))
        expected = TorchEncoder(arch, weights, ONE_THREAD).encode(texts)
        np.testing.assert_allclose(device.encode(texts), expected, atol=1e-5)
