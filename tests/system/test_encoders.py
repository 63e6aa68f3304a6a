"""One real cloud process with a language model, an embedder and a classifier beside each other."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from encodercheckpoints import (
    CLASSIFIER,
    hf_class_logits,
    hf_embeddings,
    minilm_folder,
    write_encoder,
)
from services import Service, Services, run_tidegate
from tokenizers import Tokenizer

pytestmark = pytest.mark.system

TEXTS = ["A cat sits on the mat.", "On the mat there is a cat.", "Interest rates rose in May."]
ROUND_S = 1.0
ROUNDS = 3
LEAST_SHARE = 0.1
"""Of what each reaches alone. Two cores are fewer than these clients and models want: measured
0.3 to 0.5 for tokens and 0.4 to 0.55 for texts beside five to ten times as much other work."""


@pytest.fixture(scope="module")
def mood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"0": "calm", "1": "glad", "2": "cross"}
    return write_encoder(tmp_path_factory.mktemp("mood"), "bert", CLASSIFIER, id2label=names)


@pytest.fixture(scope="module")
def cloud(
    cloud_checkpoint: Path, mood: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    with Services(tmp_path_factory.mktemp("encoders")) as services:
        encoders = ("--embedder", f"minilm={minilm_folder()}", "--classifier", f"mood={mood}")
        yield services.cloud(cloud_checkpoint, "--name", "words", *encoders)


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_openai_client_gets_what_transformers_computes(cloud: Service) -> None:
    folder = minilm_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens = [tokenizer.encode(text).ids for text in TEXTS]
    expected = hf_embeddings(folder, tokens, "mean", normalise=True)
    with client_of(cloud) as client:
        assert [one.id for one in client.models.list().data] == ["words", "minilm", "mood"]
        texts = client.embeddings.create(model="minilm", input=TEXTS)
        ids = client.embeddings.create(model="minilm", input=tokens, encoding_format="float")
        one = client.embeddings.create(model="minilm", input=tokens[1])
        with pytest.raises(openai.BadRequestError, match="dimensions: 64: must be 384, or absent"):
            client.embeddings.create(model="minilm", input="a", dimensions=64)
    for answer in (texts, ids):
        found = np.array([row.embedding for row in answer.data])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert answer.usage.prompt_tokens == sum(map(len, tokens))
    np.testing.assert_allclose(one.data[0].embedding, expected[1], atol=1e-5)


def test_texts_are_classified_as_transformers_does(cloud: Service, mood: Path) -> None:
    tokens = [[5, 6, 7], [8], list(range(10, 40))]
    powers = np.exp(hf_class_logits(mood, tokens))
    expected = powers / powers.sum(axis=1, keepdims=True)
    body = {"model": "mood", "input": tokens}
    for path in ("/classify", "/v1/classify"):
        answer = httpx.post(f"{cloud.url}{path}", json=body, timeout=30).json()
        found = np.array([row["probs"] for row in answer["data"]])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        labels = [("calm", "glad", "cross")[place] for place in expected.argmax(axis=1)]
        assert [row["label"] for row in answer["data"]] == labels
        assert answer["usage"]["total_tokens"] == 34


def test_many_clients_share_runs_and_a_wrong_text_costs_nobody_else(cloud: Service) -> None:
    def ask(number: int) -> int:
        text = "too long " * 300 if number % 8 == 0 else f"text number {number} of many"
        body = {"model": "minilm", "input": text}
        return httpx.post(f"{cloud.url}/v1/embeddings", json=body, timeout=60).status_code

    runs = cloud.metric("tidegate_encoder_batch_texts_count")
    texts = cloud.metric("tidegate_encoder_batch_texts_sum")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(96)))
    assert found == [413 if number % 8 == 0 else 200 for number in range(96)]
    assert cloud.metric("tidegate_encoder_batch_texts_sum") - texts == 84
    assert cloud.metric("tidegate_encoder_batch_texts_count") - runs < 84
    assert cloud.metric("tidegate_encoder_texts_waiting") == 0


def generating(service: Service, until_s: float) -> int:
    """Tokens that two clients are given until then."""

    def ask(_: int) -> int:
        tokens = 0
        with client_of(service) as client:
            while time.monotonic() < until_s:
                answer = client.completions.create(
                    model="words",
                    prompt="one two three",
                    max_tokens=16,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                assert answer.usage is not None
                tokens += answer.usage.completion_tokens
        return tokens

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(ask, range(2)))


def embedding(service: Service, until_s: float) -> int:
    """Texts that four clients have embedded until then, eight of some twenty tokens a call."""
    texts = ["the tide turns at noon and a gate holds back the sea while it may"] * 8

    def ask(_: int) -> int:
        done = 0
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < until_s:
                body = {"model": "minilm", "input": texts}
                client.post(f"{service.url}/v1/embeddings", json=body).raise_for_status()
                done += len(texts)
        return done

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(ask, range(4)))


def rates(service: Service, *works: Callable[[Service, float], int]) -> list[float]:
    """What each of some works, all at once, gets done in a second."""
    found: dict[int, float] = {}

    def run(place: int) -> None:
        began_s = time.monotonic()
        done = works[place](service, began_s + ROUND_S)
        found[place] = done / (time.monotonic() - began_s)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(works))]


def test_neither_kind_of_load_starves_the_other(cloud: Service) -> None:
    rates(cloud, generating, embedding)
    tokens, texts = [], []
    for _ in range(ROUNDS):
        (tokens_alone,) = rates(cloud, generating)
        (texts_alone,) = rates(cloud, embedding)
        tokens_beside, texts_beside = rates(cloud, generating, embedding)
        tokens.append(tokens_beside / tokens_alone)
        texts.append(texts_beside / texts_alone)
    print(f"beside the other: tokens/s {sorted(tokens)}, texts/s {sorted(texts)} of alone")
    assert statistics.median(tokens) > LEAST_SHARE
    assert statistics.median(texts) > LEAST_SHARE


def test_a_wrong_encoder_stops_the_start_with_its_reason(
    cloud_checkpoint: Path, mood: Path
) -> None:
    def start(*flags: str) -> str:
        done = run_tidegate("cloud", str(cloud_checkpoint), "--listen", "127.0.0.1:0", *flags)
        assert done.returncode in (1, 2)
        return done.stderr

    assert "mood: is a classifier: it makes labels" in start("--embedder", f"mood={mood}")
    assert "must be NAME=PATH" in start("--classifier", str(mood))
    same = start("--name", "mood", "--classifier", f"mood={mood}")
    assert "must be one that no other model or adapter has" in same
