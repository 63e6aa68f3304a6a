"""What the engine answers: text as it comes, then exactly one terminal event per request.

`TERMINAL` events are `Finished`, `Failed` and `Cancelled`; nothing follows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
EnergySource = Literal["measured", "calibrated", "estimated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token counts of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_draft_tokens: int = 0
    """Tokens of the answer that were guessed ahead, and below guesses that did not hold."""
    rejected_draft_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Where a request's time went, in seconds since it was submitted."""

    first_scheduled_s: float
    first_token_s: float
    total_s: float
    decode_s: float
    """From the first token to the last, where they were generated: what tokens/s is taken from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyUse:
    """What a request took of a device's energy: its share of what was drawn above idling.

    It is a number of one scope and one way of knowing; sums over different ones mean nothing.
    """

    joules: float
    scope: str
    """What is covered: a rail, the package, the module, the board, the wall or the radio."""
    source: EnergySource
    """Read off a sensor; from costs fitted on this device; or from a profile's numbers."""


def summed(uses: Iterable[EnergyUse | None]) -> EnergyUse | None:
    """What the parts of an answer took together.

    None where one part is unknown, where two are of different scopes or ways of knowing, or where
    there is none: such a sum would be a number of nothing.
    """
    known = []
    for one in uses:
        if one is None:
            return None
        known.append(one)
    if len({(one.scope, one.source) for one in known}) != 1:
        return None
    joules = sum(one.joules for one in known)
    return EnergyUse(joules=joules, scope=known[0].scope, source=known[0].source)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """A token and how likely the model held it; see `tidegate.engine.logprobs`."""

    token: int = field(repr=False)
    data: bytes = field(repr=False)
    """What it stands for, in UTF-8; one token may hold half a character."""
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredToken:
    """One token of an answer, and the likeliest ones in its place, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
    text_offset: int
    """Characters of the answer's text before the one that it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDelta:
    """New text, never half a character; `tokens` are the ids it came from, possibly none yet."""

    text: str = field(repr=False)
    tokens: tuple[int, ...] = field(default=(), repr=False)
    scored: tuple[ScoredToken, ...] = field(default=(), repr=False)
    """For requests with `logprobs`: the tokens, less those that only a stop string came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason
    usage: Usage
    timing: Timing
    energy: EnergyUse | None = None
    """The device's, where it keeps account of it; an engine leaves it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The request could not be answered. `code` is stable, `message` is for people."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancelled:
    """The caller went away or asked for it; its KV was freed within one step."""

    usage: Usage


Terminal = Finished | Failed | Cancelled
Event = TextDelta | Terminal
