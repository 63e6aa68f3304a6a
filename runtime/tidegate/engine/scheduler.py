"""`plan`: which requests run in the next step and with how many tokens. Pure; no clock, no I/O.

There is no prefill phase and no decode phase: every request has `computed` tokens catching up with
`tokens`, under one token budget per step (the invariant of vLLM V1's scheduler). Chunked prefill,
prefix hits and resume after preemption are that one rule. Guessed tokens come last, from what
nobody else needs, and never make anybody go. KV space is counted in units: a block of
`block_tokens` tokens, or a whole slot, so one plan serves both shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Key = int
"""The engine's own name of a request: its arrival number. Ids come from outside and may repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What the plan knows of one request; `tokens` exceeds `computed` by at least one."""

    key: Key
    tokens: int
    computed: int
    priority: int = 0
    deadline_s: float | None = None
    held: int = 0
    """KV units it has, or that its prefix hit would bring."""
    drawn: int = 0
    """Waiting: how many of `held` come out of the free units."""
    exclusive: int = 0
    """Running: how many of `held` become free when it is preempted; a lower bound is enough."""
    stored: int = 0
    """How many of `missing`, the first of them, are to be loaded from disk and not computed."""
    draft: int = 0
    """Running: guessed tokens that a step may verify after its own."""

    @property
    def missing(self) -> int:
        """Tokens to compute until its next token can be sampled."""
        return self.tokens - self.computed

    @property
    def rank(self) -> tuple[int, float, Key]:
        """Lower runs first and is preempted last."""
        return self.priority, math.inf if self.deadline_s is None else self.deadline_s, self.key


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """KV space. `headroom` units stay free on admission, so that running answers can grow."""

    free: int
    unit_tokens: int
    headroom: int = 0

    def units(self, tokens: int) -> int:
        """Units that hold `tokens` tokens of one request."""
        return -(-tokens // self.unit_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The requests as the plan sees them, in any order."""

    running: tuple[Candidate, ...]
    waiting: tuple[Candidate, ...]
    room: Room


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one step may hold.

    `prefill_reserve` tokens are kept from decoding by admitting fewer requests than `tokens`, so
    a prompt moves on in every step; every running request has one token for sure, so an answer
    does too. `chunk_tokens` bounds what one prompt may take of a step.
    """

    tokens: int
    rows: int
    chunk_tokens: int
    prefill_reserve: int = 0
    load_tokens: int = 0
    """Stored tokens that one step may load, for all requests together."""
    logits: int = 0
    """Tokens that can have logits; what is left beside one per row is for guesses."""

    @property
    def most_running(self) -> int:
        """Requests that may run at once."""
        return min(self.rows, max(1, self.tokens - self.prefill_reserve))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """`tokens` of request `key` run in this step, or are loaded beside it."""

    key: Key
    tokens: int
    loaded: bool = False
    draft: int = 0
    """Guessed tokens that may run after its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One step. Apply in this order: preempt, admit, then give KV to every chunk."""

    chunks: tuple[Chunk, ...]
    admitted: tuple[Key, ...] = ()
    preempted: tuple[Key, ...] = ()
    draft_tokens: int = 0
    """Guessed tokens of all chunks together; their `draft` says what fits into the KV."""


@dataclass(slots=True)
class _Sketch:
    """A plan in the making, with what is left of the budget and of the KV space."""

    tokens: int
    loads: int
    free: int
    chunks: list[Chunk] = field(default_factory=list)
    kept: list[Candidate] = field(default_factory=list)
    """Running requests that stay, in rank order."""
    promised: int = 0
    """Units that prompts now being computed will still need."""
    admitted: list[Key] = field(default_factory=list)
    preempted: list[Key] = field(default_factory=list)


def plan(state: State, budget: Budget) -> Plan:
    """Decide one step: running requests first, then waiting ones, each by rank.

    Rank is (priority, deadline, arrival). A step that preempted admits nobody, or what it just
    freed would be taken by the next in line and taken back a step later.
    """
    sketch = _Sketch(tokens=budget.tokens, loads=budget.load_tokens, free=state.room.free)
    waiting = sorted(state.waiting, key=lambda one: one.rank)
    _continue_running(sketch, state, budget)
    if not sketch.preempted:
        _make_way(sketch, waiting, state.room, budget)
    if not sketch.preempted:
        _admit(sketch, waiting, state.room, budget)
    draft_tokens = 0 if sketch.preempted else _allow_drafts(sketch, state, budget)
    return Plan(
        chunks=tuple(sketch.chunks),
        admitted=tuple(sketch.admitted),
        preempted=tuple(sketch.preempted),
        draft_tokens=draft_tokens,
    )


def _continue_running(sketch: _Sketch, state: State, budget: Budget) -> None:
    """Give every running request its next tokens; where KV ends, the lowest ranked makes room."""
    room, running = state.room, sorted(state.running, key=lambda one: one.rank)
    index = 0
    while index < min(len(running), budget.rows, budget.tokens):
        one = running[index]
        later = min(len(running), budget.rows, budget.tokens) - index - 1  # one token each is kept
        tokens = _share(sketch, one, budget, sketch.tokens - later)
        if tokens < 1:  # others load what this step may
            sketch.promised += room.units(one.tokens) - one.held
            index += 1
            continue
        while (fits := _fitting(one, tokens, sketch.free, room)) < 1 and index < len(running):
            victim = running.pop()
            sketch.preempted.append(victim.key)
            sketch.free += victim.exclusive
        if index >= len(running):
            break  # it was the lowest itself
        _give(sketch, one, fits)
        filled = room.units(one.computed + fits)
        sketch.free -= max(0, filled - one.held)
        sketch.promised += room.units(one.tokens) - filled
        index += 1
    sketch.kept = running


def _share(sketch: _Sketch, one: Candidate, budget: Budget, most: int) -> int:
    """Tokens for `one` of what a step may load, or, when nothing of it is stored, compute."""
    if one.stored:
        return min(one.stored, sketch.loads)
    return min(one.missing, budget.chunk_tokens, most)


def _give(sketch: _Sketch, one: Candidate, tokens: int) -> None:
    sketch.chunks.append(Chunk(key=one.key, tokens=tokens, loaded=one.stored > 0))
    if one.stored:
        sketch.loads -= tokens
    else:
        sketch.tokens -= tokens


def _fitting(one: Candidate, tokens: int, free: int, room: Room) -> int:
    return min(tokens, (one.held + free) * room.unit_tokens - one.computed)


def _make_way(sketch: _Sketch, waiting: list[Candidate], room: Room, budget: Budget) -> None:
    """Preempt one request of a lower class when the first in line finds no room.

    Only across classes: an interactive request does not wait for a background answer to end, and
    two of one class can not chase each other.
    """
    if not waiting or not sketch.kept or sketch.kept[-1].priority <= waiting[0].priority:
        return
    if len(sketch.kept) < budget.most_running and _has_room(sketch, waiting[0], room):
        return
    victim = sketch.kept.pop()
    sketch.preempted.append(victim.key)
    sketch.chunks = [chunk for chunk in sketch.chunks if chunk.key != victim.key]


def _has_room(sketch: _Sketch, one: Candidate, room: Room) -> bool:
    headroom = room.headroom if sketch.chunks else 0
    return _need(one, room) + sketch.promised + headroom <= sketch.free


def _need(one: Candidate, room: Room) -> int:
    return room.units(one.tokens) - one.held + one.drawn


def _admit(sketch: _Sketch, waiting: list[Candidate], room: Room, budget: Budget) -> None:
    """Start waiting requests while tokens, rows and KV last; nobody overtakes the first in line.

    The whole prompt is accounted for even when only a chunk of it runs now.
    """
    rows = budget.most_running - len(sketch.kept)
    for one in waiting[: max(0, rows)]:
        if sketch.tokens < 1 or not _has_room(sketch, one, room):
            return
        tokens = _share(sketch, one, budget, sketch.tokens)
        if tokens < 1:
            return
        sketch.admitted.append(one.key)
        _give(sketch, one, tokens)
        sketch.free -= _need(one, room)


def _allow_drafts(sketch: _Sketch, state: State, budget: Budget) -> int:
    """Let running requests guess with the tokens and the KV that nobody else needs.

    Returns:
        How many tokens all may guess together.
    """
    spare = min(sketch.tokens, budget.logits - len(sketch.chunks))
    wishing = {one.key: one for one in state.running if one.draft} if spare > 0 else {}
    free = max(0, sketch.free - sketch.promised)
    for index, chunk in enumerate(sketch.chunks):
        one = wishing.get(chunk.key)
        if one is None or chunk.loaded or chunk.tokens < one.missing:
            continue
        held = max(one.held, state.room.units(one.tokens))
        fits = min(one.draft, spare, (held + free) * state.room.unit_tokens - one.tokens)
        sketch.chunks[index] = Chunk(key=chunk.key, tokens=chunk.tokens, draft=fits)
        free -= max(0, state.room.units(one.tokens + fits) - held)
    return spare if any(chunk.draft for chunk in sketch.chunks) else 0
