"""What a call is charged for in the end: the same for callers with keys and for devices. Pure."""

from __future__ import annotations

from typing import Final

from tidegate.api.admission import Tally
from tidegate.cloud.key_rules import Prices
from tidegate.engine.events import Usage

GONE: Final = 499
"""The status in the books of a request whose client left before an answer, as nginx has it."""


def billed(tally: Tally, prompt_tokens: int) -> Usage:
    """What is paid for: whole answers, and what was sent of those that the client gave up.

    Args:
        tally: of the call, which is over.
        prompt_tokens: of its prompt, for an answer that did not live to tell them.
    """
    told = tally.usage
    match tally.outcome:
        case "ok":
            return told
        case "aborted":
            read_tokens = told.prompt_tokens or prompt_tokens
            return Usage(
                prompt_tokens=read_tokens,
                completion_tokens=told.completion_tokens,
                cached_tokens=min(told.cached_tokens, read_tokens),
            )
        case _:
            return Usage(prompt_tokens=0, completion_tokens=0)


def cost_nano(prices: Prices, usage: Usage) -> int:
    """Billionths of the currency that `prices` are in."""
    return prices.cost_nano(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )
