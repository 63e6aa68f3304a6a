"""The fields of a request that say how tokens are chosen, read from JSON and written back."""

from __future__ import annotations

import re
from typing import Final, Literal

from tidegate.api.field_table import Field, Flag, Integer, Number, Raw
from tidegate.api.fields import TOKEN_ID, TOKEN_IDS, Fields, kind_of, prose, shown, token_ids
from tidegate.engine.request import (
    MOST_BIASED,
    MOST_STOP_IDS,
    MOST_STOPS,
    MOST_TOP_LOGPROBS,
    STOP_CHARS,
    SamplingParams,
)
from tidegate.errors import RequestError

Kind = Literal["chat", "completion"]

REST_OF_CONTEXT: Final = 2**31 - 1
"""`max_tokens` when the client gave none; who knows the context clamps it, as with any other."""

_SEEDS = 2**63 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

_MAX_TOKENS = Integer(
    name="max_tokens",
    low=1,
    high=REST_OF_CONTEXT,
    told="The longest answer. Without it, or with more: what the context leaves.",
)
_MAX_COMPLETION_TOKENS = Integer(
    name="max_completion_tokens",
    low=1,
    high=REST_OF_CONTEXT,
    told="Another name of max_tokens; if both are there they must be the same.",
)
_TEMPERATURE = Number(
    name="temperature", low=0, high=2, told="0 takes the likeliest token. 1 if absent."
)
_TOP_K = Integer(
    name="top_k",
    low=-1,
    high=TOKEN_IDS,
    told="Only so many of the likeliest tokens are drawn from; all with 0 or -1, or if absent.",
)
_TOP_P = Number(
    name="top_p",
    low=0,
    high=1,
    told="Only the likeliest tokens that together have this probability. 1 if absent.",
)
_MIN_P = Number(
    name="min_p",
    low=0,
    high=1,
    told="Tokens less likely than this share of the likeliest are left out. 0 if absent.",
)
_SEED = Integer(name="seed", low=0, high=_SEEDS, told="The same seed gives the same answer.")
_STOP_TEXT: Final = {"type": "string", "minLength": 1, "maxLength": STOP_CHARS}
_STOP = Raw(
    name="stop",
    schema_={"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MOST_STOPS}]},
    told="The answer ends before any of these texts.",
)
_STOP_TOKEN_IDS = Raw(
    name="stop_token_ids",
    schema_={"type": "array", "items": TOKEN_ID, "maxItems": MOST_STOP_IDS},
    told="Tokens that end the answer as the model's own ends do.",
)
_IGNORE_EOS = Flag(name="ignore_eos", told="The model's own ends do not end the answer.")
_MIN_TOKENS = Integer(
    name="min_tokens",
    low=0,
    high=REST_OF_CONTEXT,
    told="Nothing ends the answer before so many tokens. At most max_tokens.",
)
_PRESENCE_PENALTY = Number(
    name="presence_penalty",
    low=-2,
    high=2,
    told="Taken from the logit of every token that the answer holds already.",
)
_FREQUENCY_PENALTY = Number(
    name="frequency_penalty", low=-2, high=2, told="The same, as often as the answer holds it."
)
_REPETITION_PENALTY = Number(
    name="repetition_penalty",
    low=0.01,
    high=10,
    told="Positive logits of tokens in prompt or answer are divided by it, others multiplied.",
)
_MOST_BIAS: Final = 100
_BIAS: Final = {"type": ["number", "null"], "minimum": -_MOST_BIAS, "maximum": _MOST_BIAS}
_LOGIT_BIAS = Raw(
    name="logit_bias",
    schema_={
        "type": "object",
        "maxProperties": MOST_BIASED,
        "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
        "additionalProperties": _BIAS,
    },
    told="Added to the logits of tokens, by their ids as strings.",
)
_LOGPROBS_WANTED = Flag(name="logprobs", told="Tell how likely each token of the answer was.")
_TOP_LOGPROBS = Integer(
    name="top_logprobs",
    low=0,
    high=MOST_TOP_LOGPROBS,
    told="And so many of the likeliest instead. Comes with logprobs.",
)
_LOGPROBS = Integer(
    name="logprobs",
    low=0,
    high=5,
    told="Tell how likely each token of the answer was, and so many of the likeliest instead.",
)

_SAMPLING: tuple[Field, ...] = (
    *(_MAX_TOKENS, _MAX_COMPLETION_TOKENS, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _SEED, _STOP),
    *(_STOP_TOKEN_IDS, _IGNORE_EOS, _MIN_TOKENS, _PRESENCE_PENALTY, _FREQUENCY_PENALTY),
    *(_REPETITION_PENALTY, _LOGIT_BIAS),
)
SAMPLING_FIELDS: Final[dict[Kind, tuple[Field, ...]]] = {
    "chat": (*_SAMPLING, _LOGPROBS_WANTED, _TOP_LOGPROBS),
    "completion": (*_SAMPLING, _LOGPROBS),
}


def read_max_tokens(fields: Fields) -> int | None:
    """The longest answer that was asked for, under its old or its new name."""
    old, new = _MAX_TOKENS.read(fields), _MAX_COMPLETION_TOKENS.read(fields)
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
    top_k = _TOP_K.read(fields)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(_TEMPERATURE.read(fields), 1.0),
        # Clients of other servers say "off" with 0 or -1.
        top_k=None if top_k in (0, -1) else top_k,
        top_p=_or(_TOP_P.read(fields), 1.0),
        min_p=_or(_MIN_P.read(fields), 0.0),
        seed=_SEED.read(fields),
        stop=_stop(_STOP.read(fields)),
        stop_token_ids=_token_ids(_STOP_TOKEN_IDS.read(fields)),
        ignore_eos=_IGNORE_EOS.read(fields) or False,
        min_tokens=_MIN_TOKENS.read(fields) or 0,
        presence_penalty=_or(_PRESENCE_PENALTY.read(fields), 0.0),
        frequency_penalty=_or(_FREQUENCY_PENALTY.read(fields), 0.0),
        repetition_penalty=_or(_REPETITION_PENALTY.read(fields), 1.0),
        logit_bias=_logit_bias(fields.inner(_LOGIT_BIAS.name)),
        logprobs=_chat_logprobs(fields) if kind == "chat" else _LOGPROBS.read(fields),
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
    wanted = _LOGPROBS_WANTED.read(fields) or False
    top = _TOP_LOGPROBS.read(fields) or 0
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
    biases = {int(name): fields.number(name, -_MOST_BIAS, _MOST_BIAS) for name in names}
    return tuple(sorted((token, bias) for token, bias in biases.items() if bias is not None))


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RequestError("stop_token_ids", f"is {kind_of(value)}: must be a list of token ids")
    return token_ids(value, "stop_token_ids")


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (prose(value, "stop"),)
    if not isinstance(value, list):
        raise RequestError("stop", f"is {kind_of(value)}: must be a string or a list of strings")
    return tuple(prose(text, f"stop[{index}]") for index, text in enumerate(value))
