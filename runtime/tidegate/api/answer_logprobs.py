r"""OpenAI's `logprobs` objects: one shape for chats, an older one for completions.

A token that is only a part of a character has no text of its own; its bytes are then spelled out,
`\xe2\x82` in a chat and `bytes:\xe2\x82` in a completion, as OpenAI does. `text_offset` counts
the characters of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.api.schema_sampling import Kind
from tidegate.engine.events import ScoredToken, TokenLogprob

Json = dict[str, object]


def logprobs_object(kind: Kind, scored: Sequence[ScoredToken]) -> Json:
    """The `logprobs` of a choice, whole or of one chunk."""
    return _chat(scored) if kind == "chat" else _completion(scored)


def _chat(scored: Sequence[ScoredToken]) -> Json:
    content = [
        {**_entry(one.chosen), "top_logprobs": [_entry(other) for other in one.top]}
        for one in scored
    ]
    return {"content": content, "refusal": None}


def _entry(one: TokenLogprob) -> Json:
    return {
        "token": _text(one.data, prefix=""),
        "logprob": one.logprob,
        "bytes": list(one.data),
    }


def _completion(scored: Sequence[ScoredToken]) -> Json:
    return {
        "tokens": [_name(one.chosen) for one in scored],
        "token_logprobs": [one.chosen.logprob for one in scored],
        "top_logprobs": [_likeliest(one) for one in scored],
        "text_offset": [one.text_offset for one in scored],
    }


def _likeliest(one: ScoredToken) -> Json:
    """The likeliest tokens, and the chosen one; of two with the same text the likelier."""
    named: Json = {}
    for other in (*one.top, one.chosen):
        named.setdefault(_name(other), other.logprob)
    return named


def _name(one: TokenLogprob) -> str:
    return _text(one.data, prefix="bytes:")


def _text(data: bytes, *, prefix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
