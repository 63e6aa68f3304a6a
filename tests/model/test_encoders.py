"""Encoders compute what transformers computes: embeddings and classes, of tiny and real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encodercheckpoints import (
    CLASSIFIER,
    encoder_of,
    hf_class_logits,
    hf_embeddings,
    minilm_folder,
    random_texts,
    torch_outputs,
    write_encoder,
    write_pooling,
)
from hfcheckpoints import tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tidegate.errors import CheckpointError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.packed import dense_weight
from tidegate.model.registry import describe
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_writer import write_safetensors

TOLERANCE = 1e-5
TEXTS = random_texts(13, 1, 64, 7, 30)
"""One of them fills the whole context."""

MODEL_TYPES = ["bert", "distilbert"]


def outputs(folder: Path) -> np.ndarray:
    with Checkpoint.open(folder) as checkpoint:
        return torch_outputs(encoder_of(checkpoint), checkpoint.weights(), TEXTS)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls")])
def test_an_embedding_is_that_of_transformers(
    model_type: str, mode: str, pooling: str, normalise: bool, tmp_path: Path
) -> None:
    folder = write_encoder(tmp_path, model_type, pooling=mode, normalise=normalise)
    expected = hf_embeddings(folder, TEXTS, pooling, normalise=normalise)
    np.testing.assert_allclose(outputs(folder), expected, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_a_bare_encoder_pools_by_the_mean(model_type: str, act: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"activation" if model_type == "distilbert" else "hidden_act": act}
    folder = write_encoder(tmp_path, model_type, **changes)
    expected = hf_embeddings(folder, TEXTS, "mean")
    np.testing.assert_allclose(outputs(folder), expected, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("labels", [1, 5])
def test_a_classifier_gives_the_logits_of_transformers(
    model_type: str, labels: int, tmp_path: Path
) -> None:
    names = {str(i): f"class {i}" for i in range(labels)}
    folder = write_encoder(tmp_path, model_type, CLASSIFIER, id2label=names)
    found = outputs(folder)
    assert found.shape == (len(TEXTS), labels)
    np.testing.assert_allclose(found, hf_class_logits(folder, TEXTS), atol=TOLERANCE)
    with Checkpoint.open(folder) as checkpoint:
        assert encoder_of(checkpoint).labels == tuple(names.values())


def test_a_real_encoder_embeds_as_transformers_does() -> None:
    folder = minilm_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = ["The tide turns at noon.", "Tide", "A gate holds back the sea " * 12]
    texts = [tokenizer.encode(sentence).ids for sentence in sentences]
    with Checkpoint.open(folder) as checkpoint:
        arch = encoder_of(checkpoint)
        found = torch_outputs(arch, checkpoint.weights(), texts)
    assert (arch.pooling, arch.normalised, arch.outputs) == ("mean", True, 384)
    expected = hf_embeddings(folder, texts, "mean", normalise=True)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_names_may_have_the_prefix_of_a_model_with_a_head(
    model_type: str, auto: str, tmp_path: Path
) -> None:
    folder = write_encoder(tmp_path, model_type, auto)
    with Checkpoint.open(folder) as checkpoint:
        starts = [source.tensor.startswith(model_type) for source in checkpoint.sources.values()]
    assert all(starts) if auto.endswith("MaskedLM") else not any(starts)
    np.testing.assert_allclose(outputs(folder), hf_embeddings(folder, TEXTS, "mean"), atol=1e-5)


@pytest.mark.parametrize("auto", ["AutoModel", CLASSIFIER])
def test_the_old_names_of_layer_norms_are_known(auto: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert", auto)
    expected = outputs(folder)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(folder / "model.safetensors")
    for new_name, old_name in old.items():
        tensors = {name.replace(new_name, old_name): one for name, one in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    np.testing.assert_array_equal(outputs(folder), expected)


def test_pooling_is_read_in_its_new_spelling(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert")
    write_pooling(folder, {"pooling_mode": "cls", "include_prompt": True})
    np.testing.assert_allclose(outputs(folder), hf_embeddings(folder, TEXTS, "cls"), atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "must be one of"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt = False"),
    ],
)
def test_another_pooling_is_refused_by_name(
    pooling: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = write_encoder(tmp_path, "bert")
    write_pooling(folder, pooling)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "type = 'Dense'"),
        ([{"type": "x.Pooling", "path": "../elsewhere"}], "must have a type and a path"),
        ([{"type": "x.Pooling", "path": ".."}], "must have a type and a path"),
        ({"type": 3}, "must have a type and a path"),
        ([[]], "must have a type and a path"),
    ],
)
def test_other_modules_of_sentence_transformers_are_refused(
    modules: object, message: str, tmp_path: Path
) -> None:
    folder = write_encoder(tmp_path, "bert")
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder = True: must be false"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention = True: must be false"),
        ("bert", {"pruned_heads": {"1": [0]}}, "pruned_heads = .*: must be empty"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ("bert", {"architectures": ["DistilBertModel"]}, "architectures = .*DistilBertModel"),
        ("bert", {"num_attention_heads": 7}, "7 attention heads: must divide the width 48"),
        ("bert", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        (
            "bert",
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "2": "b"}},
            "id2label = .*: must have a name for each",
        ),
        ("distilbert", {"architectures": ["DistilBertForQuestionAnswering"]}, "QuestionAnswering"),
        ("distilbert", {"n_heads": 7}, "7 attention heads: must divide the width 48"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        describe(tiny_config(model_type) | changes)


@pytest.mark.parametrize("context", [0, 65])
def test_a_context_without_positions_is_refused(context: int) -> None:
    with pytest.raises(CheckpointError, match=f"context = {context}: must be from 1 to"):
        describe(tiny_config("bert"), context)


def test_a_shorter_context_takes_the_first_positions(tmp_path: Path) -> None:
    folder, texts = write_encoder(tmp_path, "bert"), TEXTS[:2]
    with Checkpoint.open(folder, context=16) as checkpoint:
        arch, weights = encoder_of(checkpoint), checkpoint.weights()
        assert arch.context == 16
        assert dense_weight(weights.linear("positions")).shape == (16, arch.width)
        found = torch_outputs(arch, weights, texts)
    np.testing.assert_allclose(found, hf_embeddings(folder, texts, "mean"), atol=TOLERANCE)


def test_a_table_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 65}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"position_embeddings.*\(64, 48\).*\(65, 48\)"):
        Checkpoint.open(folder)


def test_a_classifier_without_its_bias_is_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert", CLASSIFIER)
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'bert\.pooler\.dense\.bias'"):
        Checkpoint.open(folder)


def test_a_tensor_of_a_layer_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "bert")
    path = folder / "model.safetensors"
    with SafetensorsFile(path) as file:
        tensors = {name: file.read(name) for name in file.entries}
    odd = next(name for name in tensors if name.endswith("layer.0.output.dense.weight"))
    odd = odd.replace("output.dense", "extra.dense")
    write_safetensors(path, {**tensors, odd: np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"extra\.dense\.weight: is no part of a bert"):
        Checkpoint.open(folder)
