"""The fields of a request that say how tokens are chosen, read from JSON and written back."""

from __future__ import annotations

import re
from typing import Final, Literal

from tidegate.api.fields import Fields, kind_of, prose, shown
from tidegate.engine.request import MOST_BIASED, MOST_TOP_LOGPROBS, SamplingParams
from tidegate.errors import RequestError

Kind = Literal["chat", "completion"]

REST_OF_CONTEXT: Final = 2**31 - 1
"""`max_tokens` when the client gave none; who knows the context clamps it, as with any other."""

TOKEN_IDS: Final = 2**31 - 1
"""The largest token id that is read; the engine knows the vocabulary."""

_SEEDS = 2**63 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def read_max_tokens(fields: Fields) -> int | None:
    """The longest answer that was asked for, under its old or its new name."""
    old = fields.integer("max_tokens", 1, REST_OF_CONTEXT)
    new = fields.integer("max_completion_tokens", 1, REST_OF_CONTEXT)
    if old is not None and new is not None and old != new:
        raise RequestError(
            "max_tokens", f"{old}, and max_completion_tokens is {new}: must be the same, or one"
        )
    return old if new is None else new


def read_sampling(fields: Fields, kind: Kind, max_tokens: int) -> SamplingParams:
    """How to choose the tokens of an answer of at most `max_tokens`.

    Raises:
        RequestError: a field is wrong; the message names it.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(fields.number("temperature", 0, 2), 1.0),
        # Clients of other servers say "off" with 0 or -1.
        top_k=None if fields.raw("top_k") in (0, -1) else fields.integer("top_k", 1, TOKEN_IDS),
        top_p=_or(fields.number("top_p", 0, 1), 1.0),
        min_p=_or(fields.number("min_p", 0, 1), 0.0),
        seed=fields.integer("seed", 0, _SEEDS),
        stop=_stop(fields.raw("stop")),
        stop_token_ids=_token_ids(fields.raw("stop_token_ids")),
        ignore_eos=fields.flag("ignore_eos") or False,
        min_tokens=fields.integer("min_tokens", 0, REST_OF_CONTEXT) or 0,
        presence_penalty=_or(fields.number("presence_penalty", -2, 2), 0.0),
        frequency_penalty=_or(fields.number("frequency_penalty", -2, 2), 0.0),
        repetition_penalty=_or(fields.number("repetition_penalty", 0.01, 10), 1.0),
        logit_bias=_logit_bias(fields.inner("logit_bias")),
        logprobs=_chat_logprobs(fields) if kind == "chat" else fields.integer("logprobs", 0, 5),
    )


def sampling_json(sampling: SamplingParams, kind: Kind) -> dict[str, object]:
    """The fields that `read_sampling` reads back, None for those that are absent."""
    body: dict[str, object] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "ignore_eos": sampling.ignore_eos or None,
        "min_tokens": sampling.min_tokens or None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "repetition_penalty": None if (r := sampling.repetition_penalty) == 1 else r,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias} or None,
        "logprobs": sampling.logprobs,
    }
    if kind == "chat" and sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return body


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs") or False
    top = fields.integer("top_logprobs", 0, MOST_TOP_LOGPROBS) or 0
    if top and not wanted:
        raise RequestError("top_logprobs", f"{top}: must come with logprobs, true")
    return top if wanted else None


def _logit_bias(fields: Fields | None) -> tuple[tuple[int, float], ...]:
    """Biases by token id; the ids are JSON keys, so strings."""
    if fields is None:
        return ()
    names = fields.names()
    if len(names) > MOST_BIASED:
        problem = f"holds {len(names)} tokens: must be at most {MOST_BIASED}"
        raise RequestError("logit_bias", problem)
    for name in names:
        if not _TOKEN_ID.fullmatch(name) or int(name) > TOKEN_IDS:
            allowed = f"a token id from 0 to {TOKEN_IDS} as a string"
            raise RequestError("logit_bias", f"unknown key {shown(name)}: must be {allowed}")
    biases = {int(name): fields.number(name, -100, 100) for name in names}
    return tuple(sorted((token, bias) for token, bias in biases.items() if bias is not None))


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RequestError("stop_token_ids", f"is {kind_of(value)}: must be a list of token ids")
    for index, token in enumerate(value):
        if type(token) is not int or not 0 <= token <= TOKEN_IDS:
            problem = f"{shown(token)}: must be a token id from 0 to {TOKEN_IDS}"
            raise RequestError(f"stop_token_ids[{index}]", problem)
    return tuple(value)


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (prose(value, "stop"),)
    if not isinstance(value, list):
        raise RequestError("stop", f"is {kind_of(value)}: must be a string or a list of strings")
    return tuple(prose(text, f"stop[{index}]") for index, text in enumerate(value))
