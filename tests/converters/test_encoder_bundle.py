"""Encoders from a checkpoint folder to a bundle and what a device makes of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from encodercheckpoints import (
    CLASSIFIER,
    Texts,
    encoder_of,
    hf_class_logits,
    hf_embeddings,
    minilm_folder,
    random_texts,
    torch_outputs,
    write_encoder,
)
from sentences import sentences
from tokenizers import Tokenizer

from tidegate.cli.main import main
from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe
from tidegate.edge.embedder import EncoderDoor, open_classifier
from tidegate.edge.executors.encoder import EncoderSettings, open_encoder
from tidegate.errors import BundleError
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.manifest import DEVICE_TARGETS, DeviceTarget
from tidegate.model.packed import Array

SENTENCES = 200


def plan(bits: int, context_tokens: int | None = None) -> ConversionPlan:
    recipe = make_recipe(bits=bits, group_size=64, symmetric=False)
    return ConversionPlan(
        model_id="encoder", targets=DEVICE_TARGETS, recipe=recipe, context_tokens=context_tokens
    )


def encode(bundle: Bundle, target: DeviceTarget, texts: Texts, *, exact: bool = False) -> Array:
    executor = open_encoder(
        bundle, EncoderSettings(choice=target, batch_tokens=512, threads=1, exact=exact)
    )
    try:
        return executor.encode(texts)
    finally:
        executor.close()


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences(SENTENCES))]


@pytest.fixture(scope="module")
def original(texts: list[list[int]]) -> Array:
    return hf_embeddings(minilm_folder(), texts, "mean", normalise=True)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "minilm"
    convert(minilm_folder(), folder, plan(8))
    return Bundle.open(folder)


@pytest.fixture(scope="module", params=DEVICE_TARGETS)
def embedded(
    request: pytest.FixtureRequest, minilm: Bundle, texts: list[list[int]]
) -> tuple[DeviceTarget, Array]:
    return request.param, encode(minilm, request.param, texts)


def test_a_real_encoder_at_eight_bits_points_where_the_original_does(
    embedded: tuple[DeviceTarget, Array], original: Array
) -> None:
    target, found = embedded
    cosines = (found * original).sum(axis=1)
    mean, least = cosines.mean(), cosines.min()
    print(f"{target}: {len(found)} sentences, cosine mean {mean:.5f}, least {least:.5f}")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert least >= 0.995


def test_the_nearest_sentence_stays_the_nearest(
    embedded: tuple[DeviceTarget, Array], original: Array
) -> None:
    _, found = embedded
    assert (nearest(found) == nearest(original)).mean() >= 0.95


def nearest(embeddings: Array) -> npt.NDArray[np.int64]:
    likeness = embeddings @ embeddings.T
    np.fill_diagonal(likeness, -1)
    found: npt.NDArray[np.int64] = np.argmax(likeness, axis=1)
    return found


def test_both_targets_agree_in_float_arithmetic(minilm: Bundle, texts: list[list[int]]) -> None:
    found = [encode(minilm, target, texts[:20], exact=True) for target in DEVICE_TARGETS]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_the_manifest_says_that_it_is_an_encoder(minilm: Bundle) -> None:
    manifest = minilm.manifest
    assert manifest.memory.kv_values_per_token == 0
    assert manifest.context_tokens == 512
    assert manifest.tensor_bits["layers.5.down"] == 8
    with pytest.raises(BundleError, match=r"is an encoder \(bert\)"):
        _ = manifest.decoder


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_a_classifier_goes_through_with_its_labels(model_type: str, tmp_path: Path) -> None:
    names = {"0": "calm", "1": "stormy", "2": "frozen"}
    folder = write_encoder(tmp_path / "checkpoint", model_type, CLASSIFIER, id2label=names)
    bundle = convert(folder, tmp_path / "b", plan(8))
    few = random_texts(9, 1, 64)
    expected = hf_class_logits(folder, few)
    for target in DEVICE_TARGETS:
        executor = open_encoder(bundle, EncoderSettings(choice=target, threads=1))
        assert executor.arch.labels == ("calm", "stormy", "frozen")
        np.testing.assert_allclose(executor.encode(few), expected, atol=0.15)


def test_a_shorter_context_is_served_and_stored(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "checkpoint", "bert")
    bundle = convert(folder, tmp_path / "b", plan(8, context_tokens=16))
    assert bundle.manifest.context_tokens == 16
    few = random_texts(9, 16)
    with Checkpoint.open(folder) as checkpoint:
        expected = torch_outputs(encoder_of(checkpoint), checkpoint.weights(), few)
    for target in DEVICE_TARGETS:
        found = encode(bundle, target, few, exact=True)
        np.testing.assert_allclose(found, expected, atol=0.05)


def test_the_command_line_converts_and_inspects_an_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_encoder(tmp_path / "checkpoint", "bert", pooling="mean_tokens")
    out = str(tmp_path / "b")
    assert main(["convert", str(checkpoint), "--out", out, "--bits", "8", "--quiet"]) == 0
    assert "makes       embeddings of 48 values" in capsys.readouterr().out
    assert main(["inspect", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model_type"] == "bert"
    assert facts["kv_bytes_per_token"] == {"u8": 0, "f16": 0, "f32": 0}
    assert facts["outputs"] == {"kind": "embeddings", "values": 48}


def test_a_device_reads_outputs_as_the_checkpoints_config_says(tmp_path: Path) -> None:
    labels = {"0": "a", "1": "b"}
    folder = write_encoder(tmp_path / "c", "bert", CLASSIFIER, id2label=labels)
    config = json.loads((folder / "config.json").read_text())
    several = config | {"problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(several))
    convert(folder, tmp_path / "b", plan(8))
    settings = EncoderSettings(choice="onnx", threads=1, exact=True)
    device = open_classifier(tmp_path / "b", EncoderDoor(settings=settings, created_s=0))
    found = asyncio.run(device.classify(((5, 6, 7),))).probs
    device.close()
    expected = 1 / (1 + np.exp(-hf_class_logits(folder, [[5, 6, 7]])))
    np.testing.assert_allclose(found, expected, atol=0.02)
