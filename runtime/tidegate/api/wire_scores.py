"""Likelihoods of tokens as a part of a text event on the link; see `tidegate.api.wire`.

One short list per token, `[id, hex of its bytes, logprob]`: an answer with twenty alternatives for
every token is long enough as it is.
"""

from __future__ import annotations

import math

from tidegate.engine.events import ScoredToken, TokenLogprob
from tidegate.engine.request import MOST_TOP_LOGPROBS
from tidegate.errors import LinkError

_IDS = 2**31 - 1
_CHARS = 2**53 - 1
_TOKEN_HEX = 2048
"""Digits for one token's bytes; the longest in use are runs of blanks of some hundred bytes."""


def write_scores(scored: tuple[ScoredToken, ...]) -> list[dict[str, object]]:
    """JSON that `read_scores` reads back."""
    return [
        {
            "at": one.text_offset,
            "token": _write(one.chosen),
            "top": [_write(other) for other in one.top],
        }
        for one in scored
    ]


def read_scores(value: object) -> tuple[ScoredToken, ...]:
    """Likelihoods as a peer wrote them.

    Raises:
        LinkError: they are not of this version or beyond a bound.
    """
    if not isinstance(value, list):
        raise LinkError("event.scored: must be a list")
    return tuple(_scored(one) for one in value)


def _write(one: TokenLogprob) -> list[object]:
    return [one.token, one.data.hex(), one.logprob]


def _scored(value: object) -> ScoredToken:
    if not isinstance(value, dict) or value.keys() != {"at", "token", "top"}:
        raise LinkError("event.scored: must hold objects of at, token and top")
    at, top = value["at"], value["top"]
    if type(at) is not int or not 0 <= at <= _CHARS:
        raise LinkError(f"event.scored.at: must be an integer from 0 to {_CHARS}")
    if not isinstance(top, list) or len(top) > MOST_TOP_LOGPROBS:
        raise LinkError(f"event.scored.top: must be a list of at most {MOST_TOP_LOGPROBS}")
    return ScoredToken(
        chosen=_read(value["token"]), top=tuple(_read(one) for one in top), text_offset=at
    )


def _read(value: object) -> TokenLogprob:
    if not isinstance(value, list) or len(value) != 3:
        raise LinkError("event.scored: a token must be a list of id, bytes and logprob")
    token, data, logprob = value
    if type(token) is not int or not 0 <= token <= _IDS:
        raise LinkError(f"event.scored: a token id must be from 0 to {_IDS}")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        raise LinkError("event.scored: a logprob must be a number")
    if not -math.inf < logprob <= 0 or logprob < -1e9:
        raise LinkError("event.scored: a logprob must be finite and at most 0")
    return TokenLogprob(token=token, data=_bytes(data), logprob=float(logprob))


def _bytes(value: object) -> bytes:
    if not isinstance(value, str) or len(value) > _TOKEN_HEX or not value.isascii():
        raise LinkError(f"event.scored: bytes must be at most {_TOKEN_HEX} hex digits")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise LinkError("event.scored: bytes must be hex digits") from None
