"""Likelihoods of tokens, read from either of OpenAI's `logprobs` objects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BYTES = re.compile(r"(?:bytes:)?((?:\\x[0-9a-f]{2})+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """A token, how likely the model held it, and the likeliest tokens in its place."""

    token: str
    r"""Its text; for one that is a part of a character its bytes, as `\xe2\x82`."""
    logprob: float
    data: bytes
    """Its bytes in UTF-8, also where they are half a character."""
    top: tuple[Likelihood, ...] = ()
    """As many as were asked for, likeliest first."""


def read_likelihoods(value: object) -> tuple[Likelihood, ...]:
    """The tokens of a choice or of a chunk; empty when there are none.

    Raises:
        ValueError: `value` is not as it must be.
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise ValueError("logprobs")
    if "tokens" in value:
        return _columns(value)
    return tuple(_entry(_object(one), with_top=True) for one in _list(value.get("content") or []))


def _entry(value: Mapping[str, object], *, with_top: bool) -> Likelihood:
    token, data = _text(value.get("token")), value.get("bytes")
    top = _list(value.get("top_logprobs") or []) if with_top else []
    return Likelihood(
        token=token,
        logprob=_number(value.get("logprob")),
        data=_bytes_of(token) if data is None else _bytes(data),
        top=tuple(_entry(_object(one), with_top=False) for one in top),
    )


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError("logprobs.content")
    return value


def _columns(value: Mapping[str, object]) -> tuple[Likelihood, ...]:
    tokens, logprobs = _list(value.get("tokens")), _list(value.get("token_logprobs"))
    tops = _list(value.get("top_logprobs") or [None] * len(tokens))
    if not len(tokens) == len(logprobs) == len(tops):
        raise ValueError("logprobs.tokens")
    return tuple(
        _named(_text(token), _number(logprob), _top(top))
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
    )


def _top(value: object) -> tuple[Likelihood, ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise ValueError("logprobs.top_logprobs")
    found = [_named(_text(token), _number(logprob)) for token, logprob in value.items()]
    return tuple(sorted(found, key=lambda one: -one.logprob))


def _named(token: str, logprob: float, top: tuple[Likelihood, ...] = ()) -> Likelihood:
    data = _bytes_of(token)
    return Likelihood(
        token=token.removeprefix("bytes:") if data != token.encode() else token,
        logprob=logprob,
        data=data,
        top=top,
    )


def _bytes_of(token: str) -> bytes:
    spelled = _BYTES.fullmatch(token)
    return token.encode() if spelled is None else bytes.fromhex(spelled[1].replace("\\x", ""))


def _bytes(value: object) -> bytes:
    numbers = _list(value)
    if not all(type(one) is int and 0 <= one < 256 for one in numbers):
        raise ValueError("logprobs.bytes")
    return bytes(one for one in numbers if isinstance(one, int))


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError("logprobs")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("logprobs.token")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 < value < 1e9:
        raise ValueError("logprobs.logprob")
    return float(value)
