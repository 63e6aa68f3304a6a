"""The fields that shape sampling: OpenAI's, and those of other servers under their names."""

from __future__ import annotations

import pytest

from tidegate.api.schema import Call, read_chat, read_completion
from tidegate.engine.request import SamplingParams
from tidegate.errors import RequestError

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: object) -> Call:
    return read_chat({"messages": HELLO, **fields})


def completion(**fields: object) -> Call:
    return read_completion({"prompt": "hello", **fields})


def test_every_sampling_field_arrives() -> None:
    call = chat(
        max_tokens=9,
        n=3,
        min_p=0.1,
        min_tokens=2,
        presence_penalty=-0.5,
        frequency_penalty=1,
        repetition_penalty=1.1,
        logit_bias={"50256": -100, "7": 2.5},
        stop_token_ids=[4, 5],
        logprobs=True,
        top_logprobs=4,
    )
    assert call.n == 3
    assert call.sampling == SamplingParams(
        max_tokens=9,
        min_p=0.1,
        min_tokens=2,
        presence_penalty=-0.5,
        frequency_penalty=1.0,
        repetition_penalty=1.1,
        logit_bias=((7, 2.5), (50256, -100.0)),
        stop_token_ids=(4, 5),
        logprobs=4,
    )


def test_chats_ask_for_likelihoods_with_a_flag_and_completions_with_a_number() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).sampling.logprobs is None
    assert completion(logprobs=0).sampling.logprobs == 0
    assert completion(logprobs=5).sampling.logprobs == 5
    assert completion().sampling.logprobs is None


def test_values_that_change_nothing_are_as_good_as_absent() -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1}
    assert chat(n=1, best_of=1, logit_bias={}, min_p=0, min_tokens=0, **neutral) == chat()
    assert chat(n=2, best_of=2) == chat(n=2)


def test_the_order_of_biases_does_not_matter() -> None:
    assert chat(logit_bias={"9": 1, "10": 2}) == chat(logit_bias={"10": 2, "9": 1})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 0}, "n: 0: must be an integer from 1 to 16"),
        ({"n": 17}, "n: 17: must be"),
        ({"best_of": 2}, "best_of: 2 is not supported: must be n, 1, or absent"),
        ({"n": 2, "best_of": 3}, "best_of: 3 is not supported: must be n, 2, or absent"),
        ({"logprobs": 2}, "logprobs: 2: must be true or false"),
        ({"top_logprobs": 2}, "top_logprobs: 2: must come with logprobs, true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: 21: must be an integer from 0 to"),
        ({"min_p": 2}, "min_p: 2: must be a number from 0 to 1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: 5: must be between 0 and max_tokens, 4"),
        ({"presence_penalty": 2.5}, "presence_penalty: 2.5: must be a number from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty: '1': must be"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0: must be a number from 0.01 to 10"),
        ({"logit_bias": [1]}, "logit_bias: is a list of 1: must be a JSON object"),
        ({"logit_bias": {"x": 1}}, "logit_bias: unknown key 'x': must be a token id from 0 to"),
        ({"logit_bias": {"07": 1}}, "logit_bias: unknown key '07'"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias: unknown key '9999999999'"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7: 101: must be a number from -100 to 100"),
        ({"logit_bias": {str(n): 0 for n in range(301)}}, "logit_bias: holds 301 tokens: must be"),
        ({"stop_token_ids": 4}, "stop_token_ids: is a number: must be a list of token ids"),
        ({"stop_token_ids": [4, "5"]}, "stop_token_ids[1]: a string: must be a token id from 0 to"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids: 65 ids: must be at most 64"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    fields: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logprobs": 6}, "logprobs: 6: must be an integer from 0 to 5"),
        ({"logprobs": True}, "logprobs: true: must be an integer"),
        ({"top_logprobs": 2}, "top_logprobs: only chats have it: must be absent"),
        ({"echo": True}, "echo: true is not supported"),
    ],
)
def test_completions_have_their_own_limits(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        completion(**fields)
    assert said in str(refused.value)
