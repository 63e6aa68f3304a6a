"""`EngineSnapshot`: the engine's state in numbers, for the router, the metrics and the watchdog.

Counters only ever grow; rates are exponentially weighted means, None until something was measured.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

from tidegate.engine.events import Cancelled, Failed, Finished, Terminal
from tidegate.engine.prefix_disk import StoreNumbers

_WEIGHT = 0.2
"""Of the newest measurement: the last ten or so decide, which follows throttling in seconds."""


STEP_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Steps are counted by how many tokens they have at most; vLLM's bounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSnapshot:
    """One moment. Times are seconds on the engine's clock."""

    running: int
    waiting: int
    kv_usage: float
    """Share of the KV units that requests own, 0 to 1; reusable but free ones do not count."""
    prefix_query_tokens: int
    """Prompt tokens of all started requests, and below those that were not computed again."""
    prefix_hit_tokens: int
    preemptions: int
    prompt_tokens: int
    """Prompt tokens computed, recomputation included."""
    generated_tokens: int
    drafts: int
    """Rows that ran with guessed tokens."""
    draft_tokens: int
    accepted_draft_tokens: int
    finished: int
    failed: int
    cancelled: int
    steps: int
    """Steps that succeeded."""
    failed_steps: int
    prefill_tokens_per_s: float | None
    """Over steps that computed some request's prompt."""
    decode_step_s: float | None
    """Seconds of decoding for one more token of every running request, guesses counted in."""
    request_s: float | None
    """Seconds from the first step of a request to its end."""
    last_progress_s: float
    """When a step last finished, or when work last appeared."""
    healthy: bool
    """Work makes progress, and not every step of late has failed."""
    accepting: bool
    """False once draining or stopped."""
    loaded: bool = True
    """False while the model is unloaded for want of work; the next request brings it back."""
    disk_hit_tokens: int = 0
    """Tokens loaded from the disk tier instead of computed; `prefix_hit_tokens` has them too."""
    disk: StoreNumbers | None = None
    """None without a disk tier."""
    kv_units: int = 0
    """Blocks or slots of the KV memory, and below tokens that one of them holds."""
    kv_unit_tokens: int = 0
    step_tokens: tuple[int, ...] = ()
    """Steps that fell between the bounds of `STEP_TOKENS`, the last one has those above all."""
    tokens_of_steps: int = 0
    """Of all steps: prompt tokens that they computed and tokens that they gave."""
    accepted_lengths: tuple[int, ...] = ()
    """Rows with guessed tokens by how many of those held: none, one, two ..."""


@dataclass(slots=True)
class Meter:
    """The counters behind a snapshot."""

    last_progress_s: float = 0.0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    steps: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    tokens_of_steps: int = 0
    accepted_lengths: list[int] = field(default_factory=lambda: [0])
    failed_steps: int = 0
    failed_in_a_row: int = 0
    ended: dict[type[Terminal], int] = field(
        default_factory=lambda: {Finished: 0, Failed: 0, Cancelled: 0}
    )
    prefill_tokens_per_s: float | None = None
    decode_step_s: float | None = None
    request_s: float | None = None

    def stepped(self, *, prompt_tokens: int, rows: int, tokens: int, elapsed_s: float) -> None:
        """Book a finished step of `rows` rows that gave `tokens` tokens.

        `prompt_tokens` of those it computed were prefill.
        """
        self.steps += 1
        self.failed_in_a_row = 0
        self.prompt_tokens += prompt_tokens
        self.step_tokens[bisect_left(STEP_TOKENS, prompt_tokens + tokens)] += 1
        self.tokens_of_steps += prompt_tokens + tokens
        if elapsed_s <= 0:
            return
        if prompt_tokens:
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, prompt_tokens / elapsed_s)
        elif tokens:
            self.decode_step_s = _mean(self.decode_step_s, elapsed_s * rows / tokens)

    def guessed(self, *, guessed: int, accepted: int) -> None:
        """Book a row that ran `guessed` guessed tokens."""
        self.drafts += 1
        self.draft_tokens += guessed
        self.accepted_draft_tokens += accepted
        lengths = self.accepted_lengths
        lengths.extend([0] * (accepted + 1 - len(lengths)))
        lengths[accepted] += 1

    def failed(self) -> None:
        """Book a failed step."""
        self.failed_steps += 1
        self.failed_in_a_row += 1

    def served(self, seconds: float) -> None:
        """Book how long a request ran."""
        self.request_s = _mean(self.request_s, seconds)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _WEIGHT) * old + _WEIGHT * new
