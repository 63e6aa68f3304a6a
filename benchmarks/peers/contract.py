"""`Peer`: an engine that takes its turn. Prepare its files once, then run it as often as wanted.

A turn is a process of its own: it starts, answers a first prompt, warms up, measures and ends, so
that engines never share a processor or memory and every turn gives a cold start as well. Engines
are asked for the same token ids with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one process is asked to do."""

    threads: int
    prompt_tokens: int
    decode_tokens: int
    """Steps that are timed, after every stream has its first token."""
    streams: tuple[int, ...]
    prefills: int
    """Prompts that are timed one after another; their median counts."""
    prefix_tokens: int = 0
    """A prefix to answer twice, with another end; 0 for none."""
    seed: int = 0
    """Of the random token ids: every turn gets its own."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a peer runs on, made from the checkpoint."""

    model: Path
    weight_bytes: int
    """Of its files."""
    step_bytes: int
    """Weights that one decode step reads: all but the rows of the table that nobody asked for."""
    vocab: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one turn measured."""

    cold_start_s: float
    """From the start of the process to the first token of a prompt, files in the page cache."""
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: Mapping[int, float] = field(default_factory=dict)
    """Of all streams together, by their number."""
    prefix_cold_s: float | None = None
    """To the first token of a prompt of `prefix_tokens` and a few more, never seen before."""
    prefix_warm_s: float | None = None
    """The same prefix with another end."""
    rss_mib: float = 0.0
    anonymous_mib: float = 0.0
    """Of the resident memory what no file backs: it cannot be dropped when memory is short."""
    peak_mib: float = 0.0
    kv_bytes: int | None = None
    """Configured; None where the engine does not say."""
    energy_j: float | None = None
    """Of the package while the turn ran; None where the machine has no counter to read."""


class Peer(Protocol):
    """One engine in one configuration."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    @property
    def settings(self) -> str:
        """What it runs with, for the reader."""

    @property
    def streams(self) -> tuple[int, ...] | None:
        """Numbers of streams it is asked for; None for all."""

    def missing(self) -> str | None:
        """Why it cannot run here; None when it can."""

    def prepare(self, checkpoint: Path, work: Path) -> Prepared:
        """Convert the checkpoint, or find what an earlier call made under `work`.

        Raises:
            PeerError: the peer's converter failed; the message ends with its log's last lines.
        """

    def run(self, prepared: Prepared, turn: Turn) -> Figures:
        """Take one turn.

        Raises:
            PeerError: the process failed.
        """


class PeerError(Exception):
    """A peer could not be built, converted for or run."""
