"""The requests of a storm, and what each has to end in, as its client sees it. Pure.

Every request ends in one of three ways: a whole answer, an error object, or because its own client
left. Anything else is wrong, and so is an end of the wrong kind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cloud.storm_client import Asked, Exchange

GOOD: Final = ("stream", "whole", "three choices", "json")
"""Well-behaved: their answers are compared, and their times told."""
WEIGHTS: Final = {
    "stream": 30,
    "whole": 24,
    "three choices": 2,
    "json": 4,
    "slow reader": 5,
    "leaves at once": 8,
    "leaves midway": 12,
    "bad input": 8,
    "over its rate": 5,
    "no key": 2,
}
WORDS: Final = (
    "turn the lamp in the hall on",
    "is the door to the garden closed",
    "dim the light in the attic",
    "set the heating to twenty",
    "what time does the tide turn",
    "open the blinds in the kitchen",
    "close every window upstairs",
    "play something quiet",
)
BAD: Final[tuple[tuple[int, bytes], ...]] = (
    (400, b"{"),
    (400, b"\xff\xfe"),
    (400, b"[" * 20_000),
    (400, b'{"messages": []}'),
    (400, b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}'),
    (400, b'{"messages": [{"role": "user", "content": "a"}], "guided_regex": "(a"}'),
    (404, b'{"messages": [{"role": "user", "content": "a"}], "model": "nobody"}'),
    (413, b'{"messages": [{"role": "user", "content": "' + b"long " * 4000 + b'"}]}'),
)
RETRIED: Final = {"over_capacity", "unavailable"}


@dataclass(frozen=True, kw_only=True)
class Keys:
    """API keys of the storm: one without limits, and one whose rate is used up."""

    good: str
    tight: str


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request with what may come of it."""

    asked: Asked
    words: str
    statuses: tuple[int, ...]
    """That its answer may have; empty for who leaves."""


def plan(rng: random.Random, keys: Keys, tokens: int) -> Planned:
    """One request of the mix."""
    kind = rng.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
    return planned(kind, rng, keys, tokens)


def planned(kind: str, rng: random.Random, keys: Keys, tokens: int) -> Planned:
    """One request of a kind."""
    words = rng.choice(WORDS)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": words}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": kind in ("stream", "slow reader", "leaves midway") or rng.random() < 0.5,
    }
    statuses, key, way, content = (200,), keys.good, "patient", None
    match kind:
        case "whole" | "leaves at once":
            body["stream"] = False
        case "three choices":
            body["n"] = 3
        case "json":
            body["response_format"] = {"type": "json_object"}
        case "bad input":
            status, content = rng.choice(BAD)
            statuses = (status,)
        case "over its rate":
            statuses, key = (200, 429), keys.tight
        case "no key":
            statuses, key = (401, 429), "tg-" + "0" * 40
    if kind == "slow reader":
        way = "slow"
        body["max_tokens"] = 4 * tokens
    if kind in ("leaves at once", "leaves midway"):
        statuses, way = (), kind
    asked = Asked(
        kind=kind,
        content=json.dumps(body).encode() if content is None else content,
        key=key,
        way=way,  # type: ignore[arg-type]
    )
    return Planned(asked=asked, words=words, statuses=statuses)


def should_retry(one: Exchange) -> bool:
    """The service was away, or said that it has no room: a client that means well comes again."""
    if one.left:
        return False
    if one.status is None:
        return True
    return one.status in (429, 503) and code_of(one) in RETRIED


def code_of(one: Exchange) -> str | None:
    """Of an error object; None if it is none."""
    told = one.json
    if one.body.startswith(b"data: "):
        events = one.events()
        told = json.loads(events[-1]) if events and events[-1].startswith("{") else None
    error = told.get("error") if isinstance(told, dict) else None
    good = isinstance(error, dict) and error.get("message") and error.get("type")
    return str(error.get("code")) if good and isinstance(error, dict) else None


def judge(one: Exchange, wanted: Planned) -> tuple[str, str | None]:
    """How a request ended (`answer`, `error CODE`, `own abort`), and what is wrong with that."""
    if one.left:
        return "own abort", None if not wanted.statuses else "its client was to stay"
    if one.status is None or not one.whole:
        return "cut off", f"no end after status {one.status}"
    code = code_of(one)
    if one.status == 200 and code is None:
        problem = _not_whole(one)
        if problem is None and wanted.statuses and 200 not in wanted.statuses:
            problem = f"an answer, where {wanted.statuses} was to come"
        return "answer", problem
    if code is None:
        return f"status {one.status}", "no error object"
    if one.status in (429, 503) and "retry-after" not in one.headers:
        return f"error {code}", "no Retry-After"
    told = one.status in wanted.statuses or not wanted.statuses or code in RETRIED
    return f"error {code}", None if told else f"status {one.status}, not {wanted.statuses}"


def _not_whole(one: Exchange) -> str | None:
    """What an answer with status 200 lacks."""
    if not one.body.startswith(b"data: "):
        return None if _ends(one.json) else "no whole answer"
    events = one.events()
    if not events or events[-1] != "[DONE]" or events.count("[DONE]") != 1:
        return "no single [DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    ends = [
        choice["index"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"] is not None
    ]
    begun = {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    return None if sorted(ends) == sorted(begun) and ends else f"choices ended as {ends}"


def _ends(answer: object) -> bool:
    if not isinstance(answer, dict) or not answer.get("choices"):
        return False
    return all(choice.get("finish_reason") for choice in answer["choices"])


def text_of(one: Exchange) -> str:
    """The first choice's text of a whole answer."""
    if not one.body.startswith(b"data: "):
        return str(one.json["choices"][0]["message"]["content"])
    pieces = [
        choice["delta"].get("content") or ""
        for event in one.events()[:-1]
        for choice in json.loads(event)["choices"]
        if choice["index"] == 0
    ]
    return "".join(pieces)


def different(one: Exchange, wanted: Planned, calm: Mapping[str, str]) -> bool:
    """A well-behaved greedy answer is not what it is in a calm."""
    expected = calm.get(wanted.asked.kind + "/" + wanted.words) or calm.get(wanted.words)
    return text_of(one) != expected


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
