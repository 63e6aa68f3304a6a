"""A real encoder behind a real daemon: embeddings, and answers shared by questions alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from encodercheckpoints import CLASSIFIER, hf_class_logits, minilm_folder, write_encoder
from services import Service, Services, run_tidegate

pytestmark = pytest.mark.system

TEXTS = ["A cat sits on the mat.", "On the mat there is a cat.", "Interest rates rose in May."]


@pytest.fixture(scope="module")
def mood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"0": "calm", "1": "glad", "2": "cross"}
    return write_encoder(tmp_path_factory.mktemp("mood"), "bert", CLASSIFIER, id2label=names)


@pytest.fixture(scope="module")
def device(bundle: Path, mood: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("embeddings")
    classifier = folder / "mood"
    done = run_tidegate("convert", str(mood), "--out", str(classifier), "--bits", "8", "--quiet")
    assert done.returncode == 0, done.stderr
    encoder = folder / "minilm"
    done = run_tidegate("convert", str(minilm_folder()), "--out", str(encoder), "--bits", "8")
    assert done.returncode == 0, done.stderr
    with Services(folder) as services:
        encoders = ("--embedder", str(encoder), "--classifier", str(classifier))
        yield services.serve(bundle, *encoders, "--semantic-cache", "0.8", "--rows", "2")


def test_the_openai_client_gets_vectors_that_tell_meaning(device: Service) -> None:
    with openai.OpenAI(base_url=f"{device.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[-2].id
        answer = client.embeddings.create(model=model, input=TEXTS)
        again = client.embeddings.create(model=model, input=TEXTS[0], encoding_format="float")
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(again.data[0].embedding, vectors[0], atol=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.7 > 0.3 > far
    assert answer.usage.prompt_tokens > 20


def test_texts_are_classified_as_the_checkpoint_does_within_its_quantisation(
    device: Service, mood: Path
) -> None:
    tokens = [[5, 6, 7], [8], list(range(10, 40))]
    powers = np.exp(hf_class_logits(mood, tokens))
    expected = powers / powers.sum(axis=1, keepdims=True)
    answer = httpx.post(f"{device.url}/classify", json={"input": tokens}, timeout=30).json()
    found = np.array([row["probs"] for row in answer["data"]])
    np.testing.assert_allclose(found, expected, atol=0.05)  # 8 bits, 48 values wide
    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()
    assert answer["usage"]["total_tokens"] == 34
    assert device.metric("tidegate_encoder_batch_texts_sum") > 0


def test_a_question_that_means_the_same_gets_the_earlier_answer(device: Service) -> None:
    def ask(text: str, **tidegate: object) -> dict[str, str]:
        body = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 8,
            "tidegate": tidegate,
        }
        told = httpx.post(f"{device.url}/v1/chat/completions", json=body).json()["tidegate"]
        assert isinstance(told, dict)
        return told

    assert ask("Where is the spare key kept?")["route"] == "edge"
    alike = ask("Where do we keep the spare key?")
    assert alike["route"] == "cache"
    assert alike["reason"].startswith("means the same as an earlier request: 0.")
    assert ask("Where do we keep the spare key?", cache=False)["route"] == "edge"
    assert ask("How many lamps are there?")["route"] == "edge"
