"""`EngineSettings`: the engine's own knobs; what the executor can hold, it says itself."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Policy of one engine. Every default suits a device; a server raises `most_waiting`."""

    most_waiting: int = 64
    """Requests that may wait; the next one is refused with a hint when to come back."""
    chunk_tokens: int | None = None
    """The most that one prompt takes of a step; None: the whole step."""
    prefill_reserve_tokens: int | None = None
    """Tokens of a step that decoding never takes; None: a quarter of the step."""
    prefix_reuse: bool = True
    speculation: bool = True
    """Guess tokens ahead where that is faster; the answers are the same."""
    shared_guesses: bool = True
    """Answers to one request help to guess another's; not where callers are strangers, since how
    many guesses held would tell one of them what another was answered."""
    most_guessing: int = 4
    """Nobody guesses while more requests run on an executor that takes a step while another runs:
    it then runs ahead instead, which guesses would forbid. By rule, not measured."""
    stall_after_s: float = 30.0
    """Work exists and no step finished for this long: unhealthy."""
    unload_after_s: float | None = None
    """Without work for this long, an executor that can is unloaded; None: never."""

    def __post_init__(self) -> None:
        if self.most_waiting < 1:
            raise ConfigError("most_waiting", self.most_waiting, "at least 1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigError("chunk_tokens", self.chunk_tokens, "at least 1, or absent")
        reserve = self.prefill_reserve_tokens
        if reserve is not None and reserve < 0:
            raise ConfigError("prefill_reserve_tokens", reserve, "at least 0, or absent")
        if self.unload_after_s is not None and not self.unload_after_s > 0:
            raise ConfigError("unload_after_s", self.unload_after_s, "more than 0, or absent")
        if not self.stall_after_s > 0:
            raise ConfigError("stall_after_s", self.stall_after_s, "more than 0")
