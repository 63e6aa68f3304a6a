"""Reading requests: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.api.schema import (
    Call,
    Message,
    Options,
    call_to_json,
    read_chat,
    read_completion,
)
from tidegate.api.schema_sampling import REST_OF_CONTEXT
from tidegate.engine.request import Priority, SamplingParams
from tidegate.errors import RequestError

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: object) -> Call:
    return read_chat({"messages": HELLO, **fields})


def refusal(**fields: object) -> str:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return str(caught.value)


def test_a_minimal_chat_has_openai_defaults_and_the_rest_of_the_context() -> None:
    call = chat(model="m")
    assert call == Call(
        kind="chat",
        model="m",
        messages=(Message(role="user", content="hello"),),
        sampling=SamplingParams(max_tokens=REST_OF_CONTEXT),
        max_tokens_given=False,
    )


def test_every_supported_field_arrives() -> None:
    call = chat(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=40,
        seed=3,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        n=1,
        tidegate={"route": "edge", "privacy": "local", "priority": "background", "deadline_ms": 9},
    )
    assert call.sampling == SamplingParams(
        max_tokens=7, temperature=0.0, top_p=0.5, top_k=40, seed=3, stop=("a", "b")
    )
    assert (call.max_tokens_given, call.stream, call.include_usage) == (True, True, True)
    assert call.options == Options(
        route="edge", privacy="local", priority=Priority.BACKGROUND, deadline_ms=9
    )


def test_null_counts_as_absent() -> None:
    names = ("model", "max_tokens", "temperature", "top_k", "stop", "stream", "tools", "tidegate")
    assert chat(**dict.fromkeys(names)) == chat()


def test_an_unknown_field_is_refused_with_the_one_that_was_meant() -> None:
    assert refusal(temprature=1) == "temprature: is an unknown field: did you mean 'temperature'?"
    assert refusal(tidegate={"rout": "edge"}).startswith("tidegate.rout: is an unknown field: did ")
    assert "must be one of those in /openapi.json" in refusal(zzz=1)
    assert refusal(stream=True, stream_options={"zzz": 1}) == (
        "stream_options.zzz: is an unknown field: must be 'include_obfuscation' or 'include_usage'"
    )
    assert len(refusal(**{"\ud800" + "é" * 10_000: 1}).encode()) < 200


def test_a_field_of_the_other_kind_of_call_is_refused_with_the_reason() -> None:
    assert refusal(prompt="x") == "prompt: chats have messages instead: must be absent"
    with pytest.raises(RequestError, match="tools: only chats have it: must be absent"):
        read_completion({"prompt": "x", "tools": []})


def test_fields_that_change_nothing_are_taken_but_not_of_any_type() -> None:
    assert chat(user="x", metadata={"a": "1"}, prediction={"type": "content"}) == chat()
    assert refusal(user=3) == "user: is a number: must be a string"
    assert refusal(metadata=[1]) == "metadata: is a list of 1: must be an object"


def test_an_answers_message_can_be_sent_again_as_it_came() -> None:
    answer: dict[str, object] = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "annotations": [],
    }
    call = read_chat({"messages": [*HELLO, {**answer, "audio": None, "function_call": None}]})
    assert call.messages[1] == Message(role="assistant", content="hi")


def test_a_prompt_that_ends_open_is_one_that_is_continued() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "so"}]
    both = {"continue_final_message": True, "add_generation_prompt": False}
    assert read_chat({"messages": begun, **both}).continue_final_message
    assert chat(add_generation_prompt=True) == chat()
    assert refusal(add_generation_prompt=False).startswith("add_generation_prompt: false: must be")


def test_what_a_stream_has_is_asked_of_streams_only() -> None:
    asked = {"stream_options": {"include_usage": True}}
    assert chat(stream=True, **asked).include_usage
    assert refusal(**asked).startswith("stream_options: is there: must come with stream")
    assert "not supported" in refusal(stream=True, stream_options={"include_obfuscation": True})


def test_developer_is_system_and_parts_join_as_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = read_chat({"messages": [{"role": "developer", "content": parts}]})
    assert call.messages == (Message(role="system", content="one\ntwo"),)


def test_top_k_can_be_off_in_other_servers_ways() -> None:
    assert chat(top_k=0).sampling.top_k is None
    assert chat(top_k=-1).sampling.top_k is None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", 3, "temperature: 3: must be a number from 0 to 2"),
        ("temperature", float("nan"), "temperature: nan: must be"),
        ("temperature", True, "temperature: true: must be"),
        ("max_tokens", 0, "max_tokens: 0: must be an integer from 1"),
        ("max_tokens", "9", "max_tokens: '9': must be"),
        ("max_tokens", 10**400, "max_tokens: a number of 1329 bits: must be"),
        ("top_p", -0.1, "top_p: -0.1: must be"),
        ("seed", -1, "seed: -1: must be"),
        ("model", 3, "model: 3: must be a string"),
        ("model", "m" * 999, "model: 'mmmm"),
        ("stream", "yes", "stream: 'yes': must be true or false"),
        ("stop", 5, "stop: is a number: must be"),
        ("stop", ["a", 5], "stop[1]: is a number"),
        ("stop", [""], "stop: must be at most 16 strings"),
        ("stream_options", [], "stream_options: is a list of 0: must be a JSON object"),
        ("messages", [], "messages: is a list of 0: must be"),
        ("messages", None, "messages: is absent"),
        ("messages", "hi", "messages: is a string"),
        ("messages", ["hi"], "messages[0]: is a string"),
        ("messages", [{"content": "x"}], "messages[0].role: is absent"),
        ("messages", [{"role": "king", "content": "x"}], "messages[0].role: 'king': must be"),
        ("messages", [{"role": "user"}], "messages[0].content: is null"),
        ("messages", [{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "[0].type: 'image_u"),
        ("response_format", "json", "response_format: is a string: must be a JSON object"),
        ("response_format", {}, "response_format.type: is absent: must be 'text', 'json_object'"),
        ("response_format", {"type": "xml"}, "response_format.type: 'xml': must be"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema: is absent"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}, "name: is abs"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "schema: is ab"),
        ("structured_outputs", {}, "structured_outputs: has none: must have one of 'json', 'reg"),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}, "structured_outputs: has 2: must"),
        ("structured_outputs", {"xml": "a"}, "structured_outputs.xml: is an unknown field: must"),
        ("structured_outputs", {"json_object": False}, "json_object: false: must be true or abs"),
        ("structured_outputs", {"json": 3}, "structured_outputs.json: is a number: must be a JSON"),
        ("structured_outputs", {"json": {"const": 10**5000}}, "too long a number"),
        ("structured_outputs", {"choice": "a"}, "choice: is a string: must be a list of strings"),
        ("structured_outputs", {"choice": [1]}, "structured_outputs.choice[0]: is a number"),
        ("structured_outputs", {"regex": "\ud800"}, "regex: has half a surrogate pair"),
        ("guided_grammar", 3, "guided_grammar: is a number: must be a string"),
        ("tidegate", "edge", "tidegate: is a string"),
        ("tidegate", {"route": "moon"}, "tidegate.route: 'moon': must be 'auto', 'edge' or"),
        ("tidegate", {"context_policy": "cut"}, "tidegate.context_policy: 'cut': must be 'error',"),
        ("tidegate", {"deadline_ms": 0}, "tidegate.deadline_ms: 0: must be"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    field: str, value: object, said: str
) -> None:
    assert said in refusal(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("echo", True),
        ("store", True),
        ("service_tier", "flex"),
        ("modalities", ["text", "audio"]),
        ("modalities", []),
        ("audio", {"voice": "x"}),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("functions", [{"name": "x"}]),
        ("function_call", {"name": "x"}),
        ("moderation", {}),
        ("use_beam_search", True),
        ("length_penalty", 2),
        ("skip_special_tokens", False),
        ("return_token_ids", True),
        ("chat_template", "x"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("truncate_prompt_tokens", 5),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused(
    field: str, value: object
) -> None:
    said = refusal(**{field: value})
    assert said.startswith(f"{field}: ")
    assert "not supported" in said


def test_neutral_values_of_unserved_fields_pass() -> None:
    assert chat(n=1, logprobs=False, tools=[], response_format={"type": "text"}) == chat()
    assert chat(presence_penalty=0, frequency_penalty=0.0, logit_bias={}) == chat()
    assert chat(store=False, service_tier="auto", modalities=["text"], verbosity="medium") == chat()
    assert chat(length_penalty=1, functions=[], function_call="none", bad_words=[]) == chat()


def test_both_token_limits_must_agree() -> None:
    assert chat(max_tokens=5, max_completion_tokens=5) == chat(max_tokens=5)
    assert "must be the same" in refusal(max_tokens=5, max_completion_tokens=6)


def test_a_refusal_never_quotes_the_prompt() -> None:
    secret = "my diagnosis is"
    for body in (
        {"messages": [{"role": "user", "content": {"text": secret}}]},
        {"messages": {"content": secret}},
        {"messages": [[secret]]},
        {"messages": [{"role": "user", "content": [secret]}]},
    ):
        with pytest.raises(RequestError) as caught:
            read_chat(body)
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))],
)
def test_a_prompt_is_text_or_tokens_or_a_batch_of_one(prompt: object, read: object) -> None:
    assert read_completion({"prompt": prompt}).prompt == read


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], ["a", "b"], [[1], [2]], [1, "a"], [-1], [True], [2**31], {}, 5]
)
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(RequestError, match=r"^prompt"):
        read_completion({"prompt": prompt})


texts = st.text(max_size=20)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, REST_OF_CONTEXT),
    temperature=st.floats(0, 2),
    top_k=st.none() | st.integers(1, 10**6),
    top_p=st.floats(0, 1),
    seed=st.none() | st.integers(0, 2**63 - 1),
    min_p=st.floats(0, 1),
    stop=st.lists(st.text(min_size=1, max_size=9), max_size=4).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 10),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=4).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
    logprobs=st.none() | st.integers(0, 5),
)
options = st.builds(
    Options,
    route=st.sampled_from(["auto", "edge", "cloud"]),
    privacy=st.sampled_from(["local", "redact", "sealed", "any"]),
    priority=st.sampled_from(Priority),
    deadline_ms=st.none() | st.integers(1, 86_400_000),
    cache=st.booleans(),
    speculation=st.booleans(),
    context_policy=st.sampled_from([None, "error", "truncate_oldest", "truncate_middle"]),
)
roles = st.sampled_from(["system", "user", "assistant", "tool"])
chats = st.builds(
    Call,
    kind=st.just("chat"),
    model=st.none() | st.text(min_size=1, max_size=30),
    messages=st.lists(st.builds(Message, role=roles, content=texts), min_size=1, max_size=4).map(
        tuple
    ),
    sampling=sampling,
    max_tokens_given=st.just(True),
    n=st.integers(1, 16),
    stream=st.just(True),
    include_usage=st.booleans(),
    options=options,
)
prompts = st.text(min_size=1) | st.lists(st.integers(0, 2**31 - 1), min_size=1).map(tuple)


@given(chats, st.booleans())
@settings(deadline=None, max_examples=200)
def test_a_chat_call_survives_its_journey_as_json(call: Call, limited: bool) -> None:
    if not limited:
        rest = replace(call.sampling, max_tokens=REST_OF_CONTEXT)
        call = replace(call, sampling=rest, max_tokens_given=False)
    assert read_chat(json.loads(json.dumps(call_to_json(call)))) == call


@given(chats, prompts)
@settings(deadline=None, max_examples=200)
def test_a_completion_call_survives_its_journey_as_json(call: Call, prompt: Any) -> None:
    call = replace(call, kind="completion", messages=(), prompt=prompt)
    assert read_completion(json.loads(json.dumps(call_to_json(call)))) == call


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "text", "edge", "\ud800", 10**4000]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "route", "deadline_ms", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
SAMPLING = (
    *("n", "best_of", "logprobs", "top_logprobs", "logit_bias", "stop_token_ids", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p"),
)
field_names = st.sampled_from(
    [
        *(*SAMPLING, "prompt", "tools", "echo", "stop", "seed", "response_format", "guided_json"),
        *("structured_outputs", *call_to_json(chat())),
    ]
)


def outcome(read: Callable[[object], Call], data: object) -> str:
    """What the refusal said; empty if it was read."""
    try:
        read(data)
    except RequestError as error:
        return str(error)
    return ""


@given(json_values | st.dictionaries(field_names, json_values))
@settings(deadline=None, max_examples=200)
def test_whatever_comes_is_read_or_refused_with_a_request_error(data: object) -> None:
    for read in (read_chat, read_completion):
        assert len(outcome(read, data)) < 400


def test_deep_nesting_and_huge_numbers_are_harmless() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    for field in ("messages", "tools", "response_format", "tidegate", "model", "stop", "user"):
        assert len(outcome(read_chat, {"messages": HELLO, field: deep})) < 400
        assert len(outcome(read_chat, {"messages": HELLO, field: 10**5000})) < 400
