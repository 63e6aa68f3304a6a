"""Requests of the OpenAI-compatible API, read from JSON and validated field by field.

A `Call` keeps what the engine needs in its own types; every wrong field is one `RequestError` that
names it, what it was and what is allowed. Fields that clients send and that change nothing here
(`user`, `metadata`, `store`, ...) are ignored, as OpenAI's own API does with unknown ones; those
that would change the answer and are not supported are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tidegate.engine.request import Priority, SamplingParams

RouteWish = Literal["auto", "edge", "cloud"]
Privacy = Literal["local", "redact", "sealed", "any"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat message; text only."""

    role: Role
    content: str = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The `tidegate` object of a request: where it may run and how soon it is needed."""

    route: RouteWish = "auto"
    privacy: Privacy = "sealed"
    priority: Priority = Priority.NORMAL
    deadline_ms: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One validated request. Exactly one of `messages` and `prompt` is set."""

    kind: Literal["chat", "completion"]
    model: str | None
    messages: tuple[Message, ...] = field(default=(), repr=False)
    prompt: str | tuple[int, ...] | None = field(default=None, repr=False)
    sampling: SamplingParams
    """`max_tokens` is the context's rest when the client did not say; see `max_tokens_given`."""
    max_tokens_given: bool
    stream: bool = False
    include_usage: bool = False
    options: Options = field(default_factory=Options)
