"""Calls in an answer's text: found however it is cut, and text again when they are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.api.tools import ToolCall, ToolDelta, whole_calls
from tidegate.api.tools_format import HERMES, LLAMA3, MISTRAL, ToolForm
from tidegate.api.tools_stream import Piece, ToolParser

ARGUMENTS = '{"room": "a \\"}{[ é", "levels": [1, {"x": {}}], "on": true}'
HERMES_CALL = f'<tool_call>\n{{"name": "set", "arguments": {ARGUMENTS}}}\n</tool_call>'
ANSWERS: list[tuple[ToolForm, str, str, int]] = [
    (HERMES, HERMES_CALL, "", 1),
    (HERMES, f"I will.\n{HERMES_CALL}\n{HERMES_CALL}\n", "I will.", 2),
    (HERMES, f"a <tool b {HERMES_CALL} done", "a <tool b done", 1),
    (HERMES, HERMES_CALL.replace('": ', '":'), "", 1),
    (LLAMA3, f'{{"name": "set", "parameters": {ARGUMENTS}}}', "", 1),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "set", "arguments": {ARGUMENTS}}}]', "", 1),
    (
        MISTRAL,
        f'on it [TOOL_CALLS] [{{"name": "set", "arguments": {ARGUMENTS}}},'
        f' {{"name": "set", "arguments": {ARGUMENTS}}}]',
        "on it",
        2,
    ),
]
NO_CALLS: list[tuple[ToolForm, str]] = [
    (HERMES, "plain text, with a < and a <tool_call that is none"),
    (HERMES, "<tool_call>\nnot json\n</tool_call>"),
    (HERMES, '<tool_call>\n{"arguments": {}, "name": "set"}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "set", "parameters": {}}'),
    (HERMES, '<tool_call>\n{"name": "se'),
    (HERMES, " \n "),
    (LLAMA3, 'I would say {"name": "set", "parameters": {}}'),
    (LLAMA3, '{"answer": 42}'),
    (MISTRAL, "[TOOL_CALLS] none"),
    (MISTRAL, "[TOOL_CAL"),
]


def parsed(form: ToolForm, chunks: list[str]) -> tuple[list[Piece], str, tuple[ToolCall, ...]]:
    parser = ToolParser(form, "request")
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)] + parser.end()
    text = "".join(one for one in pieces if isinstance(one, str))
    calls = whole_calls(one for one in pieces if isinstance(one, ToolDelta))
    assert len(calls) == parser.calls
    return pieces, text, calls


@pytest.mark.parametrize(("form", "said", "text", "count"), ANSWERS)
@settings(deadline=None)
@given(data=st.data())
def test_an_answer_has_the_same_calls_however_it_is_cut(
    form: ToolForm, said: str, text: str, count: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    chunks = [said[a:b] for a, b in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    _, found, calls = parsed(form, chunks)
    assert found.strip() == text
    assert [one.name for one in calls] == ["set"] * count
    for one in calls:
        assert json.loads(one.arguments) == json.loads(ARGUMENTS)


@pytest.mark.parametrize(("form", "said"), NO_CALLS)
def test_what_is_no_call_stays_the_text_it_was(form: ToolForm, said: str) -> None:
    for chunks in ([said], [*said]):
        assert parsed(form, chunks)[1:] == (said, ())


@settings(deadline=None)
@given(
    st.sampled_from([HERMES, LLAMA3, MISTRAL]), st.text('<tool_c>/{}[]",: \nname\\', max_size=60)
)
def test_any_text_at_all_is_read(form: ToolForm, said: str) -> None:
    whole = parsed(form, [said])[1:]
    assert parsed(form, [*said])[1:] == whole
    assert whole == (said, ()) or whole[1]


def test_a_call_is_streamed_name_first_and_then_its_arguments() -> None:
    pieces, text, _ = parsed(HERMES, [*f"sure {HERMES_CALL}"])
    assert text == "sure"
    first, *rest = [one for one in pieces if isinstance(one, ToolDelta)]
    assert (first.index, first.name, first.arguments) == (0, "set", "")
    assert first.id is not None
    assert len(first.id) == 9
    assert first.id.isalnum()
    assert all((one.id, one.name) == (None, None) for one in rest)
    assert "".join(one.arguments for one in rest) == ARGUMENTS
    assert len(rest) > 10, "they come as they are written"


def test_a_call_that_is_cut_short_is_as_long_as_it_got() -> None:
    for cut in range(HERMES_CALL.index("{", 20), len(HERMES_CALL)):
        _, text, (call,) = parsed(HERMES, [HERMES_CALL[:cut]])
        assert not text
        assert ARGUMENTS.startswith(call.arguments)
    listed = f'[TOOL_CALLS][{{"name": "set", "arguments": {ARGUMENTS}}}, {{"na'
    assert parsed(MISTRAL, [listed])[1] == ""


def test_two_calls_of_one_answer_have_different_ids_and_every_run_the_same() -> None:
    said = f"{HERMES_CALL}\n{HERMES_CALL}"
    first, second = parsed(HERMES, [said])[2]
    assert first.id != second.id
    assert parsed(HERMES, [*said])[2] == (first, second)


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL])
def test_an_answer_of_blanks_is_not_held_back(form: ToolForm) -> None:
    parser = ToolParser(form, "r")
    begun = parser.push(" " * 1000)
    assert len("".join(map(str, begun))) > 900
    rest = [*parser.push("so"), *parser.end()]
    assert "".join(map(str, begun + rest)) == " " * 1000 + "so"
