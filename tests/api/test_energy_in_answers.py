"""What an answer took of the device's energy, as its caller is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import jsonschema_rs
import pytest
from echobackend import EchoBackend

from tidegate.api.choices import merged
from tidegate.api.http import create_app
from tidegate.api.openapi import document
from tidegate.client.answers import StreamReader, read_answer
from tidegate.edge.handoff import joined
from tidegate.engine.events import EnergyUse, Finished, Timing, Usage, summed

CHAT = "/v1/chat/completions"
BOARD = EnergyUse(joules=1.234567, scope="board", source="measured")
GUESS = EnergyUse(joules=2.0, scope="board", source="estimated")
RADIO = EnergyUse(joules=0.25, scope="radio", source="measured")
MESSAGES = [{"role": "user", "content": "one two"}]
TOLD = {"joules": 1.235, "scope": "board", "source": "measured"}


def asked(energy: EnergyUse | None, path: str = CHAT, **body: object) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(EchoBackend(energy=energy)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    body |= {"messages": MESSAGES} if path == CHAT else {"prompt": "one two"}
    return asyncio.run(ask())


def chunks(response: httpx.Response) -> list[Any]:
    datas = [one.removeprefix("data: ") for one in response.text.split("\n\n") if one]
    assert datas.pop() == "[DONE]"
    return [json.loads(one) for one in datas]


def conforms(name: str, value: object) -> None:
    told: Any = document()["components"]
    schema = {"$ref": f"#/components/schemas/{name}", "components": told}
    jsonschema_rs.validator_for(schema).validate(value)


@pytest.mark.parametrize(
    ("path", "schema"), [(CHAT, "ChatCompletion"), ("/v1/completions", "Completion")]
)
def test_a_whole_answer_says_its_joules_what_they_cover_and_how_they_are_known(
    path: str, schema: str
) -> None:
    body = asked(BOARD, path).json()
    assert body["tidegate"]["energy"] == TOLD
    conforms(schema, body)


def test_a_stream_says_them_at_its_end() -> None:
    first, *_, last, usage = chunks(
        asked(BOARD, stream=True, stream_options={"include_usage": True})
    )
    assert "energy" not in first["tidegate"]
    assert last["tidegate"]["energy"] == usage["tidegate"]["energy"] == TOLD
    for one in (first, last, usage):
        conforms("ChatCompletionChunk", one)


def test_where_nobody_keeps_account_nothing_is_said() -> None:
    assert "energy" not in asked(None).json()["tidegate"]
    assert all("energy" not in one.get("tidegate", {}) for one in chunks(asked(None, stream=True)))


@pytest.mark.parametrize("joules", [0.0, 4.2e-7, 123456.0])
def test_very_small_and_large_joules_keep_four_digits(joules: float) -> None:
    told = asked(EnergyUse(joules=joules, scope="rail", source="calibrated")).json()
    assert told["tidegate"]["energy"]["joules"] == pytest.approx(joules, rel=1e-3)
    conforms("ChatCompletion", told)


def test_several_answers_say_their_sum_and_in_a_stream_each_its_own() -> None:
    assert asked(BOARD, n=3).json()["tidegate"]["energy"]["joules"] == 3.704
    *several, usage = chunks(asked(BOARD, n=2, stream=True, stream_options={"include_usage": True}))
    ends = [one for one in several if one["choices"][0]["finish_reason"]]
    assert [one["tidegate"]["energy"] for one in ends] == [TOLD, TOLD]
    assert usage["tidegate"]["energy"]["joules"] == 2.469


def test_only_joules_of_one_scope_and_one_way_of_knowing_are_summed() -> None:
    assert summed((BOARD, BOARD)) == EnergyUse(
        joules=2 * BOARD.joules, scope="board", source="measured"
    )
    assert summed((BOARD,)) == BOARD
    for parts in ((BOARD, GUESS), (BOARD, RADIO), (BOARD, None), (None,), ()):
        assert summed(parts) is None


def end(energy: EnergyUse | None) -> Finished:
    timing = Timing(first_scheduled_s=0, first_token_s=1, total_s=2, decode_s=1)
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Finished(reason="stop", usage=usage, timing=timing, energy=energy)


def test_an_answer_of_two_places_has_a_sum_only_if_both_are_known_alike() -> None:
    assert joined(end(BOARD), end(BOARD)).energy == merged([end(BOARD), end(BOARD)]).energy
    assert joined(end(BOARD), end(BOARD)).energy is not None
    assert joined(end(BOARD), end(None)).energy is None
    assert joined(end(BOARD), end(RADIO)).energy is None


def test_the_client_reads_them_whole_and_streamed() -> None:
    told = EnergyUse(joules=1.235, scope="board", source="measured")
    assert read_answer(asked(BOARD).json()).energy == told
    assert read_answer(asked(None).json()).energy is None
    reader = StreamReader()
    stream = asked(BOARD, stream=True, stream_options={"include_usage": True})
    list(reader.feed(stream.content))
    assert reader.finish().energy == told


@pytest.mark.parametrize(
    "energy",
    [
        7,
        {"joules": 1},
        {"joules": -1, "scope": "board", "source": "measured"},
        {"joules": 1, "scope": "board", "source": "guessed"},
        {"joules": 1, "scope": "", "source": "measured"},
        {"joules": "1", "scope": "board", "source": "measured"},
        {"joules": 1, "scope": "board", "source": ["measured"]},
    ],
)
def test_joules_that_the_client_cannot_place_are_none(energy: object) -> None:
    body = asked(None).json()
    body["tidegate"]["energy"] = energy
    assert read_answer(body).energy is None
