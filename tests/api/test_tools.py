"""Tools from the request to the calls in the answer, on models whose words are random."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
from httpengine import CHAT, streamed, with_engine
from naiveguide import ids_of
from tokenizers import AddedToken
from toyexecutor import Behaviour, ToyExecutor
from toytext import EOS, TEMPLATE, toy_tokenizer

from tidegate.api.engine_backend import encode_call
from tidegate.api.schema import Call, call_to_json, read_chat, read_completion
from tidegate.api.tools import Tools, whole_calls
from tidegate.api.tools_answer import tool_use
from tidegate.api.tools_stream import ToolParser
from tidegate.engine.engine import Engine
from tidegate.engine.executor import ExecutorStep, Logits, PagedGeometry
from tidegate.engine.grammar import Grammars
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError
from tidegate.model.chat_template import ChatTemplate

VOCAB = 310
ROOMY = PagedGeometry(block_tokens=4, blocks=400, bytes_per_token=8)
LAMP = {
    "type": "object",
    "properties": {
        "room": {"enum": ["hall", "attic"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["room", "level"],
    "additionalProperties": False,
}
SET_LAMP = {"type": "function", "function": {"name": "set_lamp", "parameters": LAMP}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
KNOWING = """\
{%- if tools %}<|user|>tools: {{ tools | tojson }}<|end|>{% endif %}
{%- for message in messages %}<|{{ "assistant" if message.role == "assistant" else "user" }}|>
{{- message.content }}
{%- for call in message.tool_calls or [] %}MARK{{ call.function | tojson }}{% endfor %}<|end|>
{%- endfor %}<|assistant|>"""
FAMILIES = {
    "hermes in text": KNOWING.replace("MARK", "<tool_call>"),
    "hermes in tokens": KNOWING.replace("MARK", "<tool_call>"),
    "llama3": KNOWING.replace("MARK", "<|python_tag|>"),
    "mistral": KNOWING.replace("MARK", "[TOOL_CALLS]"),
    "unknown to the template": TEMPLATE,
}


@cache
def template_of(family: str) -> ChatTemplate:
    return ChatTemplate(FAMILIES[family])


def text_of(family: str) -> TextModel:
    tokenizer = toy_tokenizer()
    if family == "hermes in tokens":
        marks = ("<tool_call>", "</tool_call>", "<think>")
        tokenizer.add_tokens([AddedToken(mark, special=False) for mark in marks])
    if family == "mistral":
        tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    return TextModel(
        tokenizer,
        eos_ids=frozenset({EOS}),
        context_tokens=1000,
        template=template_of(family),
    )


def chat(*tools: object, **fields: object) -> Call:
    said = [{"role": "user", "content": "hello"}]
    return read_chat({"messages": said, "tools": [*tools] or [SET_LAMP, NOW], **fields})


def tools_of(*tools: object, **fields: object) -> Tools:
    found = chat(*tools, **fields).tools
    assert found is not None
    return found


def walk(family: str, tools: Tools, begun: str, seed: int) -> tuple[str, tuple[Any, ...]]:
    """A random answer that begins with `begun`: its text and its calls."""
    text = text_of(family)
    use = asyncio.run(tool_use(tools, text))
    assert use is not None
    grammars = Grammars(text, vocab=VOCAB)
    asyncio.run(grammars.prepare(use.constraint))
    guide, chance = grammars.guide(use.constraint), np.random.default_rng(seed)
    shown, parser, pieces = text.detokeniser(visible=use.visible), ToolParser(use.form, "r"), []
    pending = [*text._tokenizer.encode(begun, add_special_tokens=False).ids]
    for _ in range(400):
        allowed = sorted(ids_of(guide.mask()))
        token = pending.pop(0) if pending else int(chance.choice(allowed))
        assert token in allowed
        if token == EOS:
            break
        guide.accept(token)
        pieces += parser.push(shown.push(token))
    pieces += parser.push(shown.flush()) + parser.end()
    calls = whole_calls(one for one in pieces if not isinstance(one, str))
    said = "".join(one for one in pieces if isinstance(one, str))
    return said, tuple((one.name, json.loads(one.arguments)) for one in calls)


def is_fine(name: str, arguments: Any) -> bool:
    if name == "now":
        return bool(arguments == {})
    room, level = arguments["room"], arguments["level"]
    return name == "set_lamp" and room in ("hall", "attic") and 0 <= level <= 9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_has_to_call_calls_what_there_is_with_what_it_takes(family: str) -> None:
    names = set()
    for seed in range(12):
        said, calls = walk(family, tools_of(tool_choice="required"), "", seed)
        assert not said.strip()
        assert calls
        assert all(is_fine(*call) for call in calls)
        names |= {name for name, _ in calls}
    assert names == {"set_lamp", "now"}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_means_one_and_a_named_tool_means_that_one(family: str) -> None:
    named = {"type": "function", "function": {"name": "set_lamp"}}
    for seed in range(6):
        tools = tools_of(tool_choice=named, parallel_tool_calls=False)
        _, ((name, arguments),) = walk(family, tools, "", seed)
        assert name == "set_lamp"
        assert is_fine(name, arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_may_call_is_free_until_it_begins_to(family: str) -> None:
    begin = {"llama3": "{", "mistral": "wait [TOOL_CALLS]"}.get(family, "wait <tool_call>")
    for seed in range(6):
        said, calls = walk(family, tools_of(), begin, seed)
        assert said == ("" if family == "llama3" else "wait")
        assert calls
        assert all(is_fine(*call) for call in calls)
        free, none = walk(family, tools_of(), "no < call", seed)
        assert (free[:9], none) == ("no < call", ()) or "<tool_call>" in free or none


def test_marks_of_the_tokenizer_other_than_those_of_calls_may_still_be_said() -> None:
    text = text_of("hermes in tokens")
    use = asyncio.run(tool_use(tools_of(), text))
    assert use is not None
    grammars = Grammars(text, vocab=VOCAB)
    asyncio.run(grammars.prepare(use.constraint))
    allowed = ids_of(grammars.guide(use.constraint).mask())
    ids = {mark: text.marks[mark] for mark in ("<think>", "<tool_call>", "</tool_call>")}
    assert ids["<think>"] in allowed
    assert ids["<tool_call>"] in allowed
    assert ids["</tool_call>"] not in allowed


def test_a_schema_that_cannot_be_kept_is_refused_where_it_must_be_kept() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool: dict[str, Any] = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    text = text_of("hermes in text")
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    for tools in (tools_of(SET_LAMP, strict), tools_of(SET_LAMP, tool, tool_choice="required")):
        with pytest.raises(RequestError) as told:
            asyncio.run(tool_use(tools, text))
        assert told.value.field == "tools[1].function.parameters.properties.a.uniqueItems"
    begun = '<tool_call>\n{"name": "odd", "arguments": {"a": [1, 1]}'
    _, ((name, arguments),) = walk("hermes in text", tools_of(tool), begun, 1)
    assert (name, arguments) == ("odd", {"a": [1, 1]})


def test_a_form_that_is_not_supported_is_refused_by_name() -> None:
    text = TextModel(
        toy_tokenizer(),
        eos_ids=frozenset({EOS}),
        context_tokens=100,
        template=ChatTemplate("{{ tools }}<tool_call><function=f>"),
    )
    with pytest.raises(RequestError, match="tools: this model's calls have a form that is not"):
        asyncio.run(tool_use(tools_of(), text))


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "light, please"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "now", "arguments": '{"a": "é"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
]


def prompt_of(family: str, **fields: object) -> str:
    call = read_chat({"messages": HISTORY, "tools": [SET_LAMP], **fields})
    text = text_of(family)
    tokens = asyncio.run(encode_call(text, call))
    return str(text._tokenizer.decode(list(tokens), skip_special_tokens=False))


def test_a_template_that_knows_tools_gets_them_and_calls_as_objects() -> None:
    prompt = prompt_of("hermes in text")
    assert prompt.startswith('<|user|>tools: [{"type": "function", "function": {"name": "set_lamp"')
    assert '<tool_call>{"name": "now", "arguments": {"a": "é"}}<|end|><|user|>noon' in prompt
    assert "tools:" not in prompt_of("hermes in text", tool_choice="none")


def test_any_other_template_gets_them_in_words() -> None:
    prompt = prompt_of("unknown to the template")
    assert prompt.startswith("<|user|>You may call functions.")
    assert '{"name": "set_lamp", "parameters": ' in prompt
    assert '<tool_call>\n{"name": "now", "arguments": {"a": "é"}}\n</tool_call><|end|>' in prompt
    assert "<|user|><tool_response>\nnoon\n</tool_response><|end|>" in prompt
    assert "Answer with a call now." in prompt_of("unknown to the template", tool_choice="required")
    assert "functions" not in prompt_of("unknown to the template", tool_choice="none")


def test_special_tokens_in_a_tool_are_just_text() -> None:
    shady = {"name": "f", "description": "<|end|>", "parameters": {"properties": {"<|end|>": {}}}}
    text = text_of("hermes in text")
    call = chat({"type": "function", "function": shady})
    assert asyncio.run(encode_call(text, call)).count(EOS) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": "set_lamp"}, "tools: is a string: must be a list of at most 128"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type: 'retrieval': must be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function: is absent"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name: 'a b': must be 1"),
        ({"tools": [NOW, NOW]}, "tools[1].function.name: 'now' is there already"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
         "tools[0].function.parameters: is a list of 0: must be a JSON schema"),
        ({"tool_choice": "maybe"}, "tool_choice: 'maybe': must be 'none', 'auto' or 'required'"),
        ({"tool_choice": "required"}, "tool_choice: wants a call: must come with tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}},
         "tool_choice.function.name: 'f': must be one of the tools"),
        ({"tools": [NOW], "parallel_tool_calls": 1}, "parallel_tool_calls: 1: must be true or f"),
        ({"tools": [NOW], "response_format": {"type": "json_object"}}, "asks for another shape"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": HISTORY[1]["tool_calls"]}]},
         "messages[0].tool_calls: 'user' makes no calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "[0].function: is absent"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[]"}}]}]}, "the text of a JSON object"),
    ],
)  # fmt: skip
def test_a_wrong_tool_is_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as told:
        read_chat({"messages": [{"role": "user", "content": "x"}], **fields})
    assert said in str(told.value)


def test_completions_have_no_tools() -> None:
    with pytest.raises(RequestError, match="tools: only chats have it"):
        read_completion({"prompt": "x", "tools": [NOW]})


def test_schemas_that_are_too_long_are_refused_before_anything_reads_them() -> None:
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(500)}}
    many = [
        {"type": "function", "function": {"name": f"f{n}", "parameters": wide}} for n in range(6)
    ]
    with pytest.raises(
        RequestError, match=r"tools: parameters of \d+ bytes: must be at most 65536"
    ):
        asyncio.run(tool_use(tools_of(*many), text_of("llama3")))
    one = tools_of(*many, tool_choice={"type": "function", "function": {"name": "f1"}})
    assert asyncio.run(tool_use(one, text_of("llama3")))


@pytest.mark.parametrize(
    "choice", ["none", "auto", "required", {"type": "function", "function": {"name": "now"}}]
)
def test_a_call_with_tools_survives_the_link(choice: object) -> None:
    call = chat(tool_choice=choice, parallel_tool_calls=False, messages=HISTORY)
    assert read_chat(call_to_json(call)) == call


def engine_of(family: str, forced: str = "") -> Engine:
    """A random model, whose answers begin with `forced` as far as they may."""
    text = text_of(family)
    begin = text._tokenizer.encode(forced, add_special_tokens=False).ids

    def distorts(step: ExecutorStep, logits: Logits) -> Logits:
        ends = [(row.past + len(row.tokens), row.logits) for row in step.rows]
        places = [end - wanted + 1 + at for end, wanted in ends for at in range(wanted)]
        for row, place in zip(logits, places, strict=True):
            if 0 <= place - prompts[0] < len(begin):
                row[begin[place - prompts[0]]] = 100
        return logits

    executor = ToyExecutor(
        ROOMY, context_tokens=900, vocab=VOCAB, behaviour=Behaviour(distorts=distorts)
    )
    prompts = [len(asyncio.run(encode_call(text, chat(SET_LAMP))))]
    return Engine(executor, text, model_id="toy")


def with_tools(engine: Engine, test: Callable[[httpx.AsyncClient, dict[str, Any]], Any]) -> None:
    wish = {"tools": [SET_LAMP], "max_tokens": 200, "tidegate": {"cache": False}}

    async def run(client: httpx.AsyncClient, engine: Engine) -> None:
        await test(client, wish)

    with_engine(run, engine)


@pytest.mark.parametrize("family", ["hermes in text", "mistral", "llama3"])
def test_calls_come_whole_and_in_pieces(family: str) -> None:
    async def test(client: httpx.AsyncClient, wish: dict[str, Any]) -> None:
        wish = {**wish, "tool_choice": "required", "parallel_tool_calls": False}
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **wish}
        (choice,) = (await client.post(CHAT, json=body)).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function"
        assert is_fine(call["function"]["name"], json.loads(call["function"]["arguments"]))
        chunks = await streamed(client, **wish)
        deltas = [
            one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", [])
        ]
        assert {one["index"] for one in deltas} == {0}
        assert deltas[0]["function"] == {"name": "set_lamp", "arguments": ""}
        assert deltas[0]["type"] == "function"
        assert all("id" not in one for one in deltas[1:])
        arguments = "".join(one["function"]["arguments"] for one in deltas)
        assert arguments == call["function"]["arguments"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    with_tools(engine_of(family), test)


def test_text_before_a_call_is_content_and_an_answer_without_one_just_stops() -> None:
    async def test(client: httpx.AsyncClient, wish: dict[str, Any]) -> None:
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **wish}
        (choice,) = (await client.post(CHAT, json=body)).json()["choices"]
        assert choice["message"]["content"] == "the light"
        assert len(choice["message"]["tool_calls"]) >= 1
        free = (await client.post(CHAT, json={**body, "tool_choice": "none"})).json()
        assert "tool_calls" not in free["choices"][0]["message"]

    with_tools(engine_of("hermes in text", "the light <tool_call>"), test)


def test_a_call_that_runs_out_of_tokens_ends_with_length() -> None:
    async def test(client: httpx.AsyncClient, wish: dict[str, Any]) -> None:
        wish = {**wish, "tool_choice": "required", "max_tokens": 30, "temperature": 0}
        body = {"messages": [{"role": "user", "content": "hello"}], **wish}
        (choice,) = (await client.post(CHAT, json=body)).json()["choices"]
        assert choice["finish_reason"] == "length"

    with_tools(engine_of("hermes in text"), test)


def test_several_choices_call_under_ids_of_their_own() -> None:
    async def test(client: httpx.AsyncClient, wish: dict[str, Any]) -> None:
        wish = {**wish, "tool_choice": "required", "n": 3, "seed": 4}
        body = {"messages": [{"role": "user", "content": "hello"}], **wish}
        choices = (await client.post(CHAT, json=body)).json()["choices"]
        ids = [call["id"] for one in choices for call in one["message"]["tool_calls"]]
        assert len(set(ids)) == len(ids) >= 3

    with_tools(engine_of("hermes in text"), test)
