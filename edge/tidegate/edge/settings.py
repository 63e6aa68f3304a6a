"""`EdgeSettings`: one device daemon, as its flags and its board's profile say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from tidegate.api.schema import ContextPolicy
from tidegate.api.tls import TlsFiles
from tidegate.api.trace_settings import TraceSettings
from tidegate.edge.energy.settings import EnergySettings
from tidegate.edge.executors.choice import ExecutorSettings
from tidegate.edge.link_settings import LinkSettings
from tidegate.engine.settings import EngineSettings
from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSettings:
    """One daemon."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8080
    api_key_hashes: tuple[str, ...] = ()
    """SHA-256 of the keys that may call; without one only loopback is served."""
    tls: TlsFiles | None = None
    traces: TraceSettings | None = None
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    queue_limit: int = 32
    """Requests that may wait for the device's engine before new ones overflow."""
    answer_cache_mib: int = 8
    answer_ttl_s: float = 600.0
    prefix_reuse: bool = True
    """Prompts that begin alike share what was computed of the beginning."""
    speculation: bool = True
    """Guess tokens ahead where that is faster; the answers are the same."""
    draft: Path | None = None
    """Bundle of a smaller model with the same tokenizer that guesses too, where that is faster."""
    prefix_cache: Path | None = None
    """A folder in which such beginnings survive a restart; None keeps them in memory only."""
    prefix_cache_mib: int = 1024
    """Of its files together; the longest unused go first."""
    embedder: Path | None = None
    """Bundle of an encoder, for `/v1/embeddings` and the semantic cache."""
    classifier: Path | None = None
    """Bundle of an encoder with labels, for `/classify`."""
    encoder_wait_s: float = 0.0
    """How long a text waits for others to be run with, while neither encoder has work."""
    semantic_cache: float | None = None
    """The cosine from which two messages share an answer; None for only identical calls."""
    trusted_signers: frozenset[str] | None = None
    """Public keys of which one must have signed the bundle; None accepts any signer, or none."""
    longest_prompt_tokens: int = 8192
    """Longer prompts are refused unread; between the device's context and this they may go out."""
    link: LinkSettings | None = None
    energy: EnergySettings | None = None
    """Schedule by energy, heat and battery; None: by the clock alone."""
    context_policy: ContextPolicy = "error"
    """For prompts that are too long, when the caller names no policy."""
    drain_s: float = 30.0
    memory_mib: int | None = None
    """What the daemon may take; None for what the system has available when it starts."""
    max_model_mib: int | None = None
    """What the weights of all bundles may take of it; None for all of it."""
    unload_after_s: float | None = None
    """Without work for so long the model leaves memory, until the next request; None: never."""
    restart_when_stuck: bool = False
    """Exit when work makes no progress, for a supervisor to start the daemon again."""

    def __post_init__(self) -> None:
        if self.queue_limit < 1:
            raise ConfigError("queue_limit", self.queue_limit, "at least 1")
        if self.context_policy not in get_args(ContextPolicy):
            allowed = f"one of {', '.join(get_args(ContextPolicy))}"
            raise ConfigError("context_policy", self.context_policy, allowed)
        if self.answer_cache_mib < 0:
            raise ConfigError("answer_cache_mib", self.answer_cache_mib, "at least 0")
        if self.prefix_cache_mib < 1:
            raise ConfigError("prefix_cache_mib", self.prefix_cache_mib, "at least 1")
        if self.memory_mib is not None and self.memory_mib < 1:
            raise ConfigError("memory_mib", self.memory_mib, "at least 1")
        if self.unload_after_s is not None and not self.unload_after_s > 0:
            raise ConfigError("unload_after_s", self.unload_after_s, "more than 0, or absent")
        if self.prefix_cache is not None and not self.prefix_reuse:
            allowed = "absent where prefixes are not reused"
            raise ConfigError("prefix_cache", str(self.prefix_cache), allowed)
        if self.draft is not None and not self.speculation:
            raise ConfigError("draft", str(self.draft), "absent where nothing is guessed")
        if self.semantic_cache is not None and self.embedder is None:
            allowed = "set together with embedder, which compares messages"
            raise ConfigError("semantic_cache", self.semantic_cache, allowed)

    def engine_settings(self) -> EngineSettings:
        """What of it is the engine's."""
        return EngineSettings(
            # A governor's line is beside the engine's. What it lets begin, and all who wait in it
            # where it gives them back, find room.
            most_waiting=2 * self.queue_limit + self.executor.rows
            if self.energy
            else self.queue_limit,
            prefix_reuse=self.prefix_reuse,
            speculation=self.speculation,
            # Several keys are several callers, who may be strangers to each other.
            shared_guesses=len(self.api_key_hashes) < 2,
            unload_after_s=self.unload_after_s,
        )
