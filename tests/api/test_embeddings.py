"""`/v1/embeddings` without a socket: inputs, encodings and what is refused."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from echobackend import EchoBackend
from handembedder import LETTERS, LetterEmbedder
from hypothesis import given
from hypothesis import strategies as st

from tidegate.api.embeddings import MOST_INPUTS, Embedded, Embedder, Text, read_embedding
from tidegate.api.encoders import Encoders
from tidegate.api.http import create_app
from tidegate.api.metrics import Metrics
from tidegate.api.texts import Counted, uncounted
from tidegate.errors import RequestError


def ask(body: object, embedder: Embedder | None = None, path: str = "/v1/embeddings") -> Any:
    async def send() -> httpx.Response:
        embedders = () if embedder is None else (embedder,)
        app = create_app(EchoBackend(), encoders=Encoders(embedders=embedders))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            if path == "/v1/embeddings":
                return await client.post(path, json=body)
            return await client.get(path)

    return asyncio.run(send())


def test_texts_come_back_as_vectors_in_their_order() -> None:
    response = ask({"input": ["ab", "b"], "model": "letters"}, LetterEmbedder())
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "list"
    assert body["model"] == "letters"
    assert [one["index"] for one in body["data"]] == [0, 1]
    assert body["data"][0]["embedding"][:3] == [1, 1, 0]
    assert body["data"][1]["embedding"][:3] == [0, 1, 0]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_base64_holds_the_same_numbers_as_little_endian_float32() -> None:
    embedder = LetterEmbedder()
    plain = ask({"input": "abba"}, embedder).json()["data"][0]["embedding"]
    coded = ask({"input": "abba", "encoding_format": "base64"}, embedder).json()
    decoded = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    assert decoded.tolist() == plain
    assert len(decoded) == LETTERS


class WatchedVectors(list[Any]):
    """Vectors that remember in which thread they were read."""

    read_by: int | None = None

    def __iter__(self) -> Iterator[Any]:
        self.read_by = threading.get_ident()
        return super().__iter__()


class WatchedEmbedder(LetterEmbedder):
    """Keeps the vectors that it gave."""

    given: WatchedVectors

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        embedded = await super().embed(inputs)
        self.given = WatchedVectors(embedded.vectors)
        return replace(embedded, vectors=self.given)  # type: ignore[arg-type]


def test_thousands_of_numbers_are_written_beside_the_event_loop() -> None:
    embedder = WatchedEmbedder()
    assert ask({"input": ["ab", "b"]}, embedder).json()["data"][1]["embedding"][:3] == [0, 1, 0]
    assert embedder.given.read_by not in (None, threading.get_ident())


def test_token_ids_may_come_as_one_input_or_as_many() -> None:
    embedder = LetterEmbedder()
    assert len(ask({"input": [0, 1]}, embedder).json()["data"]) == 1
    assert len(ask({"input": [[0, 1], [2], "c"]}, embedder).json()["data"]) == 3
    assert embedder.calls == [((0, 1),), ((0, 1), (2,), "c")]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input: is absent: must be text"),
        ({"input": []}, "input: is a list of 0: must be"),
        ({"input": ""}, "input: is empty"),
        ({"input": ["a", ""]}, "input[1]: is empty"),
        ({"input": [1, "a"]}, "input[1]: a string: must be a token id"),
        ({"input": [[1], [-1]]}, "input[1][0]: -1: must be a token id"),
        ({"input": [[]]}, "input[0]: is empty: must hold token ids"),
        ({"input": ["a"] * (MOST_INPUTS + 1)}, f"input: {MOST_INPUTS + 1} inputs: must be at most"),
        ({"input": {"text": "a"}}, "input: is an object: must be"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format: 'int8'"),
        ({"input": "a", "dimensions": 4}, "dimensions: 4: must be 26, or absent"),
        ({"input": "a", "truncate_prompt_tokens": 9}, "truncate_prompt_tokens: 9 is not supported"),
        ({"input": "a", "tidegate": {"route": "edge"}}, "tidegate.route: is an unknown field"),
        ({"input": "a", "tidegate": {"deadline_ms": 0}}, "tidegate.deadline_ms: 0: must be"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_wrong_field_is_named_with_what_is_allowed(body: object, said: str) -> None:
    response = ask(body, LetterEmbedder())
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(said)


@pytest.mark.parametrize(
    ("smaller", "wanted", "said"),
    [
        ((8, 16), 8, None),
        ((8, 16), 26, None),
        ((8, 16), 9, "dimensions: 9: must be 8, 16 or 26"),
        (range(1, 26), 9, None),
        (range(1, 26), 27, "dimensions: 27: must be from 1 to 26"),
    ],
)
def test_vectors_are_cut_only_where_the_model_was_made_for_it(
    smaller: Collection[int], wanted: int, said: str | None
) -> None:
    response = ask({"input": "abba", "dimensions": wanted}, LetterEmbedder(smaller=smaller))
    if said is None:
        assert len(response.json()["data"][0]["embedding"]) == wanted
    else:
        assert response.status_code == 400
        assert response.json()["error"]["message"] == said


def test_a_deadline_reaches_the_model_in_seconds() -> None:
    embedder = LetterEmbedder()
    ask({"input": "a", "tidegate": {"deadline_ms": 250}}, embedder)
    ask({"input": "a", "tidegate": None}, embedder)
    assert embedder.timeouts == [0.25, None]


def test_a_call_may_name_one_of_several_models() -> None:
    async def send() -> list[httpx.Response]:
        other = LetterEmbedder()
        other.name = "other"
        app = create_app(EchoBackend(), encoders=Encoders(embedders=(LetterEmbedder(), other)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                await client.post("/v1/embeddings", json={"input": "a", "model": name})
                for name in (None, "other", "none")
            ]

    first, named, unknown = asyncio.run(send())
    assert (first.json()["model"], named.json()["model"]) == ("letters", "other")
    assert (
        unknown.json()["error"]["message"] == "model: 'none' is not served: must be letters, other"
    )


def test_embeddings_are_counted_as_calls_are() -> None:
    metrics = Metrics()

    async def send() -> None:
        encoders = Encoders(embedders=(LetterEmbedder(longest=5),), route="cloud")
        app = create_app(EchoBackend(), metrics=metrics, encoders=encoders)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/v1/embeddings", json={"input": ["ab", "cde"]})
            await client.post("/v1/embeddings", json={"input": "much too long"})

    asyncio.run(send())
    text = metrics.render().decode()
    assert 'tidegate_requests_total{model_name="letters",route="cloud"} 1.0' in text
    assert 'tidegate_prompt_tokens_total{model_name="letters"} 5.0' in text
    ended = 'tidegate_request_success_total{finished_reason="stop",model_name="letters"} 1.0'
    assert ended in text


def test_another_model_or_none_at_all_is_a_404_that_says_so() -> None:
    other = ask({"input": "a", "model": "echo"}, LetterEmbedder())
    assert other.status_code == 404
    assert "must be letters" in other.json()["error"]["message"]
    none = ask({"input": "a"})
    assert none.status_code == 404
    assert "no embedding model is served" in none.json()["error"]["message"]


def test_the_embedding_model_is_listed_beside_the_other() -> None:
    listed = ask(None, LetterEmbedder(), "/v1/models").json()["data"]
    assert [card["id"] for card in listed][-1] == "letters"
    assert ask(None, LetterEmbedder(), "/v1/models/letters").json()["id"] == "letters"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(_JSON | st.fixed_dictionaries({"input": _JSON}))
def test_any_body_is_read_or_refused_by_name(body: object) -> None:
    try:
        call = read_embedding(body)
    except RequestError:
        return
    assert call.inputs
