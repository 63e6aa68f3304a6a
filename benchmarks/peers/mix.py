"""Mixed requests of people who mean well, people who do not, and programs that go away.

A request is a pure function of its number, so a soak can be repeated. What it may end in is part of
it: an answer with so many choices, a refusal, or nothing, when the client leaves before the end.
Kinds that the service does not know yet are found by asking once (`PROBES`) and replaced.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "known", "sampled", "long", "tokens", "abort", "bad", "structured", "logprobs", "several"
]
WEIGHTS: Mapping[Kind, int] = {
    "known": 30,
    "sampled": 16,
    "long": 10,
    "tokens": 6,
    "abort": 14,
    "bad": 14,
    "structured": 5,
    "logprobs": 3,
    "several": 2,
}
SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "action": {"enum": ["set", "get"]},
        "device": {"type": "string", "maxLength": 12},
        "minutes": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["action", "device"],
    "additionalProperties": False,
}
FORMAT: Mapping[str, object] = {
    "type": "json_schema",
    "json_schema": {"name": "action", "strict": True, "schema": SCHEMA},
}
PROBES: Mapping[Kind, Mapping[str, object]] = {
    "structured": {"response_format": FORMAT},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "several": {"n": 2},
}
"""What a kind needs that a service may not have."""

_BAD: Sequence[Mapping[str, object] | bytes] = (
    b"{",
    b"\xff\xfe",
    b"[]",
    {},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "nobody", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}], "temperature": 9},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
    {"messages": [{"role": "user", "content": "x"}], "model": "no-such-model"},
    {"messages": [{"role": "user", "content": "x"}], "stop": ["" for _ in range(99)]},
    {"messages": [{"role": "user", "content": "x " * 9000}], "tidegate": {"route": "edge"}},
    {"messages": [{"role": "user", "content": "x"}], "tidegate": {"route": "moon"}},
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, and what it may end in."""

    kind: Kind
    path: str
    body: Mapping[str, object] | bytes = field(repr=False)
    stream: bool = False
    choices: int = 1
    """Answers of which each ends exactly once; 0 where the request has to be refused."""
    leave_after: int | None = None
    """Pieces of the stream that are read before the client goes away; None to read to the end."""
    known: int | None = None
    """Which of the known chats it is: a greedy answer that is compared with the one alone."""


def ask(number: int, chats: Sequence[object], lacking: Collection[Kind]) -> Asked:
    """The request of that number, over `chats`, as JSON; kinds in `lacking` are left out."""
    rng = random.Random(number)
    kinds = [kind for kind in WEIGHTS if kind not in lacking]
    kind = rng.choices(kinds, [WEIGHTS[one] for one in kinds])[0]
    if kind == "bad":
        return Asked(kind=kind, path=CHAT, body=rng.choice(_BAD), choices=0)
    if kind == "tokens":
        tokens = [rng.randrange(3, 500) for _ in range(rng.randint(1, 200))]
        body = {"prompt": tokens, "max_tokens": rng.randint(1, 40), "seed": number}
        return Asked(kind=kind, path="/v1/completions", body=body)
    known = rng.randrange(len(chats))
    stream = kind == "abort" or rng.random() < 0.5
    body = {"messages": chats[known], "max_tokens": rng.randint(1, 60), "stream": stream}
    if kind == "known":
        body |= known_options()
    else:
        body |= {"temperature": rng.choice((0.7, 1.0)), "top_p": 0.95, "seed": number}
        body |= {"tidegate": {"route": "edge", "cache": rng.random() < 0.5}}
    if kind == "long":
        body |= {"messages": longer(rng, chats), "max_tokens": 64}
    body |= PROBES.get(kind, {})
    return Asked(
        kind=kind,
        path=CHAT,
        body=body,
        stream=stream,
        choices=2 if kind == "several" else 1,
        leave_after=rng.choice((0, 1, 3, 8)) if kind == "abort" else None,
        known=known if kind == "known" else None,
    )


CHAT = "/v1/chat/completions"


def known_options() -> dict[str, object]:
    """How a known chat is asked, alone and among others; never answered from a cache."""
    return {"temperature": 0, "max_tokens": 48, "tidegate": {"route": "edge", "cache": False}}


def longer(rng: random.Random, chats: Sequence[object]) -> list[object]:
    """Several chats as one, which fills most of a context."""
    found: list[object] = []
    for _ in range(rng.randint(2, 4)):
        chat = rng.choice(chats)
        assert isinstance(chat, list)
        found += [one for one in chat if one["role"] == "user"]
        found.append({"role": "assistant", "content": "ok"})
    return found[:-1]
