"""The corpus: every conversation is a pure function of one integer seed.

Three splits have disjoint seed ranges, and no prompt of one occurs in another: a digest of the
prompt decides which split it belongs to. Held-out combinations occur in the test split only.
Training conversations hold several turns, often about one table; test examples hold one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .commands import COMMAND_TASKS, arithmetic
from .domain import SENSORS
from .readings import (
    READING_TASKS,
    Table,
    conditional,
    count,
    draw_table,
    extreme,
    lookup,
    which,
)
from .turns import Turn

Split = Literal["train", "validation", "test"]
Message = dict[str, str]

SEEDS: Final[dict[Split, range]] = {
    "train": range(0, 1_000_000_000),
    "validation": range(1_000_000_000, 1_001_000_000),
    "test": range(1_001_000_000, 1_002_000_000),
}
TIERS: Final = (1, 2, 3, 4)
COMMAND_SHARE: Final = {1: 0.4, 2: 0.45, 3: 0.2, 4: 0.15}
HELD_OUT_SHARE: Final = 0.3
DRILL_TURNS: Final = 12
DRILL_TABLE_SHARE: Final = 0.5
LIMIT_TASKS: Final = (which, which, extreme, count, conditional)

SYSTEM_PROMPTS: Final = (
    "You are the assistant of a home and its workshop.",
    "You control a house. Answer briefly.",
    "Answer with one JSON action or a short answer.",
    "You are a helpful assistant.",
)
SMALL_TALK: Final = (
    ("hello", "Hello. What can I do for you?"),
    ("hi", "Hello. What can I do for you?"),
    ("hi there", "Hello. What can I do for you?"),
    ("good morning", "Good morning. What can I do for you?"),
    ("good evening", "Good evening. What can I do for you?"),
    ("thanks", "You are welcome."),
    ("thank you", "You are welcome."),
    ("bye", "Goodbye."),
    ("good night", "Good night."),
    ("who are you?", "I am the assistant of this house and its workshop."),
    ("what are you?", "I am the assistant of this house and its workshop."),
    ("what can you do?", "I switch devices, plan schedules and answer about readings."),
    ("help", "I switch devices, plan schedules and answer about readings."),
    ("how are you?", "I am running well, thank you."),
    ("tell me a joke", "I only know about this house and its workshop."),
    ("what is the capital of France?", "I only know about this house and its workshop."),
    ("who won the game?", "I only know about this house and its workshop."),
    ("write a poem", "I only know about this house and its workshop."),
    ("what is the meaning of life?", "I only know about this house and its workshop."),
    ("what is the weather tomorrow?", "I only know about this house and its workshop."),
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns that follow each other, with a system message and a table where they have one."""

    system: str | None
    table: Table | None
    table_in_system: bool
    turns: tuple[Turn, ...]

    def messages(self) -> list[Message]:
        """Return the conversation as chat messages; the table comes before the first question."""
        system, shown = self.system, None
        if self.table is not None and self.table_in_system:
            system = "\n".join(part for part in (self.system, str(self.table)) if part)
        elif self.table is not None:
            shown = str(self.table)
        messages = [{"role": "system", "content": system}] if system else []
        for turn in self.turns:
            question = turn.question if shown is None else f"{shown}\n{turn.question}"
            shown = None
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages


@dataclass(frozen=True, kw_only=True)
class Example:
    """One measured question: chat messages that end with the user, and the only right answer."""

    tier: int
    kind: str
    messages: tuple[Message, ...]
    answer: str
    held_out: bool
    table: Table | None


def split_of(question: str, table: Table | None) -> Split:
    """Return the split a prompt belongs to: one in twenty test, one in twenty validation."""
    bucket = zlib.crc32(f"{table or ''}\n{question}".encode()) % 20
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def draw_turn(
    rng: random.Random, split: Split, tier: int, table: Table | None, *, held_out: bool
) -> Turn | None:
    """Draw one turn of a tier that belongs to a split, or None when the table cannot give one."""
    for _ in range(400):
        if table is None:
            turn = rng.choice(COMMAND_TASKS[tier])(rng, held_out=held_out)
        elif len(table.readings) > 12:
            turn = lookup(rng, table, held_out=held_out)
        else:
            turn = rng.choice(READING_TASKS[tier])(rng, table, held_out=held_out)
        if turn and turn.tier == tier and split_of(turn.question, table) == split:
            return turn
    return None


def draw_system(rng: random.Random) -> str | None:
    """Draw a system message; most conversations have none."""
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else None


def rows_for(rng: random.Random, tier: int) -> int:
    """Draw the size of a table for a tier."""
    return rng.randint(1, 4) if tier == 1 else rng.randint(5, 9) if tier == 2 else rng.randint(3, 8)


def training_conversation(seed: int, *, tier_weights: Sequence[float]) -> Conversation:
    """Return the training conversation of one seed: up to seven turns about one table, or commands.

    Raises:
        ValueError: the seed is outside the training range.
    """
    if seed not in SEEDS["train"]:
        raise ValueError(f"seed = {seed}: must be in {SEEDS['train']}")
    rng = random.Random(seed)
    lead = rng.choices(TIERS, weights=tier_weights)[0]
    table = None
    if rng.random() >= COMMAND_SHARE[lead]:
        table = draw_table(rng, rows=rows_for(rng, lead))
    turns: list[Turn] = []
    for n in range(rng.randint(1, 6) if table is None else rng.randint(2, 7)):
        tier = lead if n == 0 else rng.choices(TIERS, weights=tier_weights)[0]
        if rng.random() < 0.02:
            question, answer = rng.choice(SMALL_TALK)
            turn = Turn(tier=0, kind="small talk", question=question, answer=answer)
            turns.append(turn)
            continue
        if table is not None:
            is_small = len(table.readings) <= 4
            tier = 1 if is_small and tier == 2 else 2 if not is_small and tier == 1 else tier
        drawn = draw_turn(rng, "train", tier, table, held_out=False)
        turns += [drawn] if drawn else []
    return Conversation(
        system=draw_system(rng),
        table=table,
        table_in_system=rng.random() < 0.25,
        turns=tuple(turns),
    )


def drill_conversation(seed: int) -> Conversation:
    """Return a training conversation of number work: bare sums, or limits over one sensor.

    Digits teach themselves slowly from the few that an ordinary conversation holds.
    """
    rng = random.Random(seed)
    table = None
    if rng.random() < DRILL_TABLE_SHARE:
        table = draw_table(rng, rows=rng.randint(3, 8))
    turns: list[Turn] = []
    for _ in range(DRILL_TURNS):
        if table is None:
            turn = arithmetic(rng, held_out=False)
        else:
            turn = rng.choice(LIMIT_TASKS)(rng, table, held_out=False)
        if turn is not None and split_of(turn.question, table) == "train":
            turns.append(turn)
    return Conversation(system=None, table=table, table_in_system=False, turns=tuple(turns))


def draw_long_table(
    rng: random.Random, *, rows: tuple[int, int], sensor_counts: tuple[int, ...]
) -> Table:
    """Draw a table with one of the numbers of rows and sensors, most places lettered."""
    return draw_table(rng, rows=rng.randint(*rows), lettered_share=0.6, sensor_counts=sensor_counts)


def long_conversation(
    seed: int, *, rows: tuple[int, int], sensor_counts: tuple[int, ...] = (len(SENSORS),)
) -> Conversation:
    """Return a training conversation of eight lookups in a table of many rows."""
    rng = random.Random(seed)
    table = draw_long_table(rng, rows=rows, sensor_counts=sensor_counts)
    drawn = [draw_turn(rng, "train", 2, table, held_out=False) for _ in range(8)]
    turns = tuple(turn for turn in drawn if turn is not None)
    return Conversation(system=None, table=table, table_in_system=False, turns=turns)


def draw_example(seed: int, split: Split, tier: int) -> Example:
    """Return the single-turn example of one seed and tier."""
    rng = random.Random(seed)
    held_out = split == "test" and rng.random() < HELD_OUT_SHARE
    turn, table = None, None
    while turn is None:
        is_command = rng.random() < COMMAND_SHARE[tier]
        table = None if is_command else draw_table(rng, rows=rows_for(rng, tier))
        turn = draw_turn(rng, split, tier, table, held_out=held_out)
    return as_example(rng, turn, table)


def long_example(
    seed: int,
    split: Split,
    *,
    rows: tuple[int, int],
    sensor_counts: tuple[int, ...] = (len(SENSORS),),
) -> Example:
    """Return a single lookup in a table of many rows."""
    rng = random.Random(seed)
    turn = None
    while turn is None:
        table = draw_long_table(rng, rows=rows, sensor_counts=sensor_counts)
        turn = draw_turn(rng, split, 2, table, held_out=False)
    return as_example(rng, turn, table)


def as_example(rng: random.Random, turn: Turn, table: Table | None) -> Example:
    """Wrap one turn as a measured example, with a system message now and then."""
    conversation = Conversation(
        system=draw_system(rng),
        table=table,
        table_in_system=rng.random() < 0.25,
        turns=(turn,),
    )
    return Example(
        tier=turn.tier,
        kind=turn.kind,
        messages=tuple(conversation.messages()[:-1]),
        answer=turn.answer,
        held_out=turn.held_out,
        table=table,
    )


def generate(split: Split, *, count: int, first: int = 0) -> Iterator[Example]:
    """Yield `count` single-turn examples of a split, the tiers in turn.

    Args:
        split: which split; it fixes the range of seeds and which prompts may occur.
        count: how many examples.
        first: offset into the split's seeds.
    """
    for n in range(first, first + count):
        yield draw_example(SEEDS[split][n], split, TIERS[n % len(TIERS)])
