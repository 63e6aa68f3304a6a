"""Several answers and likelihoods, as both clients give them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from echobackend import EchoBackend
from loopback import serving

from tidegate.api.backend import AnswerEvent
from tidegate.api.http import create_app
from tidegate.api.schema import Call
from tidegate.client import AsyncClient, Client, Likelihood, Piece, UnavailableError
from tidegate.client.answers import read_answer
from tidegate.client.likelihoods import read_likelihoods
from tidegate.engine.events import ScoredToken, TextDelta, TokenLogprob

EURO = "€".encode()


class Scoring(EchoBackend):
    """Tells how likely every word was: the n-th has logprob -n, and half a character beside it."""

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        async for event in super().answer(call):
            if isinstance(event, TextDelta) and call.sampling.logprobs is not None:
                event = replace(event, scored=(_scored(event),))
            yield event


def _scored(event: TextDelta) -> ScoredToken:
    [place] = event.tokens
    said = TokenLogprob(token=place, data=event.text.encode(), logprob=-float(place))
    half = TokenLogprob(token=99, data=EURO[:2], logprob=-9.5)
    return ScoredToken(chosen=said, top=(said, half), text_offset=0)


HALF = Likelihood(token="\\xe2\\x82", logprob=-9.5, data=EURO[:2])


def likelihoods(*words: str) -> tuple[Likelihood, ...]:
    alone = [
        Likelihood(token=word, logprob=-float(place), data=word.encode())
        for place, word in enumerate(words)
    ]
    return tuple(replace(one, top=(one, HALF)) for one in alone)


@contextmanager
def connected() -> Iterator[Client]:
    with serving(create_app(Scoring())) as server, Client(server.url, timeout_s=10) as client:
        yield client


def test_a_chat_and_a_completion_tell_the_same_likelihoods() -> None:
    with connected() as client:
        chat = client.chat("one two", logprobs=True, top_logprobs=2)
        completion = client.complete("one two", logprobs=2)
        assert client.chat("one two").logprobs == ()
    assert chat.logprobs == likelihoods("one", " two")
    assert completion.logprobs == chat.logprobs


def test_a_stream_tells_them_with_their_pieces_and_with_the_whole() -> None:
    with connected() as client, client.stream("one two", logprobs=True, top_logprobs=2) as stream:
        pieces = list(stream)
    assert pieces == ["one", " two"]
    assert [piece.logprobs for piece in pieces] == [(one,) for one in likelihoods("one", " two")]
    assert stream.answer.logprobs == likelihoods("one", " two")


def test_several_answers_are_choices_and_the_first_is_the_answer() -> None:
    with connected() as client:
        answer = client.chat("one two", n=3)
        assert [choice.text for choice in answer.choices] == ["one two"] * 3
        assert (answer.text, answer.finish_reason) == ("one two", "stop")
        assert answer.usage.completion_tokens == 6
        with client.stream("one two", n=3) as stream:
            pieces = list(stream)
    for index in range(3):
        assert [piece for piece in pieces if piece.choice == index] == ["one", " two"]
    assert [choice.text for choice in stream.answer.choices] == ["one two"] * 3
    assert stream.answer.usage == answer.usage


def test_the_awaiting_client_gives_the_same() -> None:
    async def run(url: str) -> None:
        async with AsyncClient(url, timeout_s=10) as client:
            answer = await client.chat("one two", n=2, logprobs=True, top_logprobs=2)
            async with client.stream_completion("one two", n=2, logprobs=2) as stream:
                pieces = [piece async for piece in stream]
        assert [choice.logprobs for choice in answer.choices] == [likelihoods("one", " two")] * 2
        assert {piece.choice for piece in pieces} == {0, 1}
        assert stream.answer.choices == answer.choices

    with serving(create_app(Scoring())) as server:
        asyncio.run(run(server.url))


def test_a_piece_is_its_text() -> None:
    piece = Piece("tide", choice=2)
    assert piece == "tide"
    assert (piece + "s", piece.choice, piece.logprobs) == ("tides", 2, ())


BROKEN: list[Any] = [
    5,
    {"content": 5},
    {"content": ["x"]},
    {"content": [{"token": 5, "logprob": 0}]},
    {"content": [{"token": "x", "logprob": True}]},
    {"content": [{"token": "x", "logprob": 10**400}]},
    {"content": [{"token": "x", "logprob": 0, "bytes": [256]}]},
    {"tokens": ["x"], "token_logprobs": []},
    {"tokens": ["x"], "token_logprobs": [0], "top_logprobs": [5]},
]


@pytest.mark.parametrize("told", BROKEN)
def test_odd_likelihoods_are_no_answer(told: object) -> None:
    with pytest.raises(ValueError, match="logprobs"):
        read_likelihoods(told)
    choice = {"message": {"content": "hi"}, "finish_reason": "stop", "logprobs": told}
    with pytest.raises(UnavailableError, match="logprobs"):
        read_answer({"id": "x", "model": "m", "choices": [choice]})
