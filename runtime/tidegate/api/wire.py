"""Answer events as JSON bytes: the payload that the link seals, one event per payload.

Compact and strict. What comes in was sent by another machine, so the reader bounds everything,
refuses unknown kinds, keys and non-finite numbers, and quotes nothing of what it refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Final, assert_never, cast, get_args

from tidegate.api.backend import AnswerEvent, Route, Routed
from tidegate.api.tools import ToolDelta
from tidegate.api.wire_scores import read_scores, write_scores
from tidegate.engine.events import (
    Cancelled,
    EnergySource,
    EnergyUse,
    Failed,
    Finished,
    FinishReason,
    TextDelta,
    Timing,
    Usage,
)
from tidegate.errors import LinkError

EVENT_BYTES: Final = 1 << 20
"""The longest payload that is read; a text event is a few tokens, so this is generous."""

_NAME_CHARS = 256
_REASON_CHARS = 4096
_COUNT = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""
_TOKEN_IDS = 2**31 - 1
_CALLS = 4096
"""Of one answer; a call takes more tokens than a context of this length leaves room for."""

_Json = dict[str, object]


def parse_json(body: bytes) -> object:
    """JSON as parsed by `json`, without NaN and Infinity, of any depth.

    Raises:
        ValueError: it is no UTF-8, no JSON or nested too deeply. Quotes nothing of the body.
    """
    try:
        return json.loads(body.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("holds a number that is not allowed") from None


def _no_constant(name: str) -> float:
    raise ValueError(name)


# Kept, because `json.dumps` with options builds an encoder for every call.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def write_event(event: AnswerEvent) -> bytes:
    """The payload of one event; `read_event` gives an equal one back.

    Only the texts for people, a reason and an error's message, are cut to what the reader takes.
    """
    return _to_json(_event_json(event)).encode()


def _event_json(event: AnswerEvent) -> _Json:
    match event:
        case Routed():
            return {
                "event": "routed",
                "route": event.route,
                "reason": event.reason[:_REASON_CHARS],
                "model": event.model,
                "request_id": event.request_id,
                **{name: count for name in _DROPPED if (count := getattr(event, name))},
            }
        case TextDelta():
            scored = {"scored": write_scores(event.scored)} if event.scored else {}
            return {"event": "text", "text": event.text, "tokens": list(event.tokens), **scored}
        case ToolDelta():
            return {
                "event": "tool",
                "index": event.index,
                "id": event.id,
                "name": event.name,
                "arguments": event.arguments,
            }
        case Finished(timing=timing):
            energy = {} if event.energy is None else {"energy": _energy_json(event.energy)}
            return {
                "event": "finished",
                "reason": event.reason,
                "usage": _usage_json(event.usage),
                "timing": {name: getattr(timing, name) for name in _TIMING},
                **energy,
            }
        case Failed():
            return {
                "event": "failed",
                "code": event.code,
                "message": event.message[:_REASON_CHARS],
                "retryable": event.retryable,
            }
        case Cancelled():
            return {"event": "cancelled", "usage": _usage_json(event.usage)}
        case _:
            assert_never(event)


_DROPPED = ("dropped_messages", "dropped_tokens")
"""Told when anything was."""
_TIMING = ("first_scheduled_s", "first_token_s", "total_s", "decode_s")
_ENERGY = ("joules", "scope", "source")
_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")
_GUESSES = ("accepted_draft_tokens", "rejected_draft_tokens")
"""A part of the usage that is told when there were any."""


def _usage_json(usage: Usage) -> _Json:
    guesses = {name: getattr(usage, name) for name in _GUESSES}
    counts = {name: getattr(usage, name) for name in _USAGE}
    return counts | {name: count for name, count in guesses.items() if count}


def _energy_json(use: EnergyUse) -> _Json:
    return {name: getattr(use, name) for name in _ENERGY}


def read_event(payload: bytes) -> AnswerEvent:
    """One event as its peer wrote it.

    Raises:
        LinkError: the payload is no event of this version, or beyond a bound. Names the field.
    """
    if len(payload) > EVENT_BYTES:
        raise LinkError(f"event of {len(payload)} bytes: must be at most {EVENT_BYTES}")
    try:
        data = parse_json(payload)
    except ValueError as error:
        raise LinkError(f"event {error}") from None
    if not isinstance(data, dict):
        raise LinkError("event: must be a JSON object")
    kind = data.get("event")
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise LinkError(f"event.event: must be one of {', '.join(_READERS)}")
    return read(data)


def _routed(data: _Json) -> Routed:
    _only(data, "event", "route", "reason", "model", "request_id", *_DROPPED)
    for name in _DROPPED:
        if not _is_count(data.get(name, 0), _COUNT):
            raise LinkError(f"event.{name}: must be an integer from 0 to {_COUNT}")
    return Routed(
        route=cast(Route, _choice(data, "route", get_args(Route))),
        reason=_text(data, "reason", _REASON_CHARS),
        model=_text(data, "model", _NAME_CHARS),
        request_id=_text(data, "request_id", _NAME_CHARS),
        **{name: cast(int, data.get(name, 0)) for name in _DROPPED},
    )


def _delta(data: _Json) -> TextDelta:
    _only(data, "event", "text", "tokens", "scored")
    tokens = data.get("tokens")
    if not isinstance(tokens, list) or not all(_is_count(one, _TOKEN_IDS) for one in tokens):
        raise LinkError(f"event.tokens: must be a list of integers from 0 to {_TOKEN_IDS}")
    return TextDelta(
        text=_text(data, "text", EVENT_BYTES),
        tokens=tuple(tokens),
        scored=read_scores(data.get("scored", [])),
    )


def _tool(data: _Json) -> ToolDelta:
    _only(data, "event", "index", "id", "name", "arguments")
    index = data.get("index")
    if not _is_count(index, _CALLS):
        raise LinkError(f"event.index: must be an integer from 0 to {_CALLS}")
    return ToolDelta(
        index=cast(int, index),
        id=None if data.get("id") is None else _text(data, "id", _NAME_CHARS),
        name=None if data.get("name") is None else _text(data, "name", _NAME_CHARS),
        arguments=_text(data, "arguments", EVENT_BYTES),
    )


def _finished(data: _Json) -> Finished:
    _only(data, "event", "reason", "usage", "timing", "energy")
    timing = _object(data, "timing", _TIMING)
    return Finished(
        reason=cast(FinishReason, _choice(data, "reason", get_args(FinishReason))),
        usage=_usage(data),
        timing=Timing(**{name: _amount(timing, name, "event.timing") for name in _TIMING}),
        energy=_energy(data) if "energy" in data else None,
    )


def _energy(data: _Json) -> EnergyUse:
    use = _object(data, "energy", _ENERGY)
    return EnergyUse(
        joules=_amount(use, "joules", "event.energy"),
        scope=_text(use, "scope", _NAME_CHARS, "event.energy"),
        source=cast(EnergySource, _choice(use, "source", get_args(EnergySource), "event.energy")),
    )


def _failed(data: _Json) -> Failed:
    _only(data, "event", "code", "message", "retryable")
    retryable = data.get("retryable")
    if not isinstance(retryable, bool):
        raise LinkError("event.retryable: must be true or false")
    return Failed(
        code=_text(data, "code", _NAME_CHARS),
        message=_text(data, "message", _REASON_CHARS),
        retryable=retryable,
    )


def _cancelled(data: _Json) -> Cancelled:
    _only(data, "event", "usage")
    return Cancelled(usage=_usage(data))


_READERS: dict[str, Callable[[_Json], AnswerEvent]] = {
    "routed": _routed,
    "text": _delta,
    "tool": _tool,
    "finished": _finished,
    "failed": _failed,
    "cancelled": _cancelled,
}


def _only(data: _Json, *names: str) -> None:
    if unknown := data.keys() - set(names):
        raise LinkError(f"event: {len(unknown)} unknown keys: may hold {', '.join(names)}")


def _object(data: _Json, name: str, keys: tuple[str, ...]) -> _Json:
    value = data.get(name)
    if not isinstance(value, dict):
        raise LinkError(f"event.{name}: must be a JSON object")
    _only(value, *keys)
    return value


def _usage(data: _Json) -> Usage:
    usage = {**dict.fromkeys(_GUESSES, 0), **_object(data, "usage", (*_USAGE, *_GUESSES))}
    for name in (*_USAGE, *_GUESSES):
        if not _is_count(usage.get(name), _COUNT):
            raise LinkError(f"event.usage.{name}: must be an integer from 0 to {_COUNT}")
    return Usage(**{name: cast(int, count) for name, count in usage.items()})


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _amount(data: _Json, name: str, where: str) -> float:
    """Seconds or joules."""
    value, allowed = data.get(name), "must be a finite number, at least 0"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise LinkError(f"{where}.{name}: {allowed}")
    try:
        return float(value)
    except OverflowError:
        raise LinkError(f"{where}.{name}: {allowed}") from None


def _text(data: _Json, name: str, most_chars: int, where: str = "event") -> str:
    value = data.get(name)
    if not isinstance(value, str) or len(value) > most_chars:
        raise LinkError(f"{where}.{name}: must be a string of at most {most_chars} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LinkError(f"{where}.{name}: must be valid Unicode") from None
    return value


def _choice(data: _Json, name: str, allowed: tuple[str, ...], where: str = "event") -> str:
    value = data.get(name)
    if not isinstance(value, str) or value not in allowed:
        raise LinkError(f"{where}.{name}: must be one of {', '.join(allowed)}")
    return value
