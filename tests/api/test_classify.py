"""`/classify` without a socket: vLLM's shapes, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from echobackend import EchoBackend
from handembedder import LetterEmbedder, VowelClassifier
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tidegate.api.encoder_model import cut, scored
from tidegate.api.encoders import Encoders
from tidegate.api.http import create_app

BOTH = Encoders(embedders=(LetterEmbedder(),), classifiers=(VowelClassifier(),))


def ask(body: object, *, path: str = "/classify", encoders: Encoders = BOTH) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(EchoBackend(), encoders=encoders))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_each_text_gets_its_label_and_all_probabilities(path: str) -> None:
    response = ask({"model": "vowels", "input": ["aee", "xyzu"]}, path=path)
    assert response.status_code == 200
    body = response.json()
    assert body["data"] == [
        {"index": 0, "label": "vowels", "probs": [0.0, 1.0], "num_classes": 2},
        {"index": 1, "label": "consonants", "probs": [0.75, 0.25], "num_classes": 2},
    ]
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
    assert (body["object"], body["model"]) == ("list", "vowels")
    assert body["id"].startswith("classify-")
    assert body["created"] > 0


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "input: is absent"),
        ({"input": "a", "model": "letters"}, 404, "model: 'letters' is not served: must be vowels"),
        (
            {"input": "a", "use_activation": False},
            400,
            "use_activation: false is not supported: must be true",
        ),
        ({"messages": [], "input": "a"}, 400, "messages: is an unknown field"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], status: int, said: str) -> None:
    response = ask(body)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(said)


def test_without_a_classifier_it_says_so() -> None:
    response = ask({"input": "a"}, encoders=Encoders(embedders=(LetterEmbedder(),)))
    assert response.status_code == 404
    assert "no classifier is served: give one with --classifier" in response.text


_LOGITS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 5)),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(_LOGITS)
def test_classes_that_exclude_each_other_share_one_probability(
    logits: npt.NDArray[np.float32],
) -> None:
    probs = scored(logits, "softmax")
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    likeliest = logits.argmax(axis=1)
    assert (probs[np.arange(len(probs)), likeliest] == probs.max(axis=1)).all()


@given(_LOGITS)
def test_labels_for_themselves_have_a_probability_each(
    logits: npt.NDArray[np.float32],
) -> None:
    each, both = (
        scored(logits, "sigmoid"),
        scored(np.stack([logits[0], 0 * logits[0]], 1), "softmax"),
    )
    assert ((each >= 0) & (each <= 1)).all()
    np.testing.assert_allclose(each[0], both[:, 0], atol=1e-6)
    np.testing.assert_array_equal(scored(logits, "none"), logits)


def test_a_cut_vector_is_of_length_1_where_the_whole_one_is() -> None:
    vectors = np.array([[3, 4, 12], [0, 0, 1]], np.float32)
    wanted = np.array([[0.6, 0.8], [0, 0]], np.float32)
    np.testing.assert_allclose(cut(vectors, 2, unit=True), wanted, atol=1e-7)
    np.testing.assert_array_equal(cut(vectors, 2, unit=False), vectors[:, :2])
