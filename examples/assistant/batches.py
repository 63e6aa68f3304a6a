"""Packing: conversations laid end to end in rows, each seeing only itself.

A batch is a pure function of the first seed it reads, so a training run resumes from one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import drill_conversation, long_conversation, training_conversation
from .domain import SENSORS
from .tokenizer import PAD_ID, encode_messages

FILL: Final = 0.95
"""Share of a batch's tokens drawn before packing; more is dropped, less is padding."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a training run reads and in what portions."""

    tier_weights: tuple[float, ...] = (1.2, 1.2, 1.2, 1.6)
    easy_weights: tuple[float, ...] = (1.0, 0.3, 0.0, 0.0)
    easy_steps: int = 0
    drill_share: float = 0.0
    rows: int = 10
    row_tokens: int = 256
    long_every: int = 20
    long_rows: int = 4
    long_row_tokens: int = 1024
    long_table_rows: tuple[int, int] = (110, 160)
    long_table_sensors: tuple[int, ...] = (len(SENSORS),)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids, targets and conversation numbers, all (B, T); a target of -1 is not learned."""

    ids: Tensor
    targets: Tensor
    segments: Tensor
    next_seed: int


Encoded = tuple[list[int], list[bool]]


def pack(conversations: Sequence[Encoded], rows: int, row_tokens: int, next_seed: int) -> Batch:
    """Lay conversations into rows, longest first, each where least room is left; drop the rest."""
    ids = torch.full((rows, row_tokens), PAD_ID)
    targets = torch.full((rows, row_tokens), -1)
    segments = torch.zeros((rows, row_tokens), dtype=torch.long)
    used = [0] * rows
    for number, (tokens, learned) in enumerate(
        sorted(conversations, key=lambda pair: len(pair[0]), reverse=True), start=1
    ):
        fitting = [row for row in range(rows) if used[row] + len(tokens) <= row_tokens]
        if not fitting:
            continue
        row = max(fitting, key=lambda row: used[row])
        start, stop = used[row], used[row] + len(tokens)
        ids[row, start:stop] = torch.tensor(tokens)
        following = [
            token if flag else -1 for token, flag in zip(tokens[1:], learned[1:], strict=True)
        ]
        targets[row, start : stop - 1] = torch.tensor(following, dtype=torch.long)
        segments[row, start:stop] = number
        used[row] = stop
    return Batch(ids=ids, targets=targets, segments=segments, next_seed=next_seed)


def draw_batch(tokenizer: Tokenizer, mix: Mix, seed: int, *, step: int) -> Batch:
    """Return the batch of a step, read from a seed on."""
    is_easy = step < mix.easy_steps
    is_long = not is_easy and step % mix.long_every == mix.long_every - 1
    weights = mix.easy_weights if is_easy else mix.tier_weights
    rows = mix.long_rows if is_long else mix.rows
    row_tokens = mix.long_row_tokens if is_long else mix.row_tokens
    conversations: list[Encoded] = []
    drawn = 0
    while drawn < FILL * rows * row_tokens:
        if is_long:
            conversation = long_conversation(
                seed, rows=mix.long_table_rows, sensor_counts=mix.long_table_sensors
            )
        elif seed * 37 % 100 < 100 * mix.drill_share:
            conversation = drill_conversation(seed)
        else:
            conversation = training_conversation(seed, tier_weights=weights)
        seed += 1
        encoded = encode_messages(tokenizer, conversation.messages())
        while len(encoded[0]) > row_tokens:
            conversation = replace(conversation, turns=conversation.turns[:-1])
            encoded = encode_messages(tokenizer, conversation.messages())
        if conversation.turns:
            conversations.append(encoded)
            drawn += len(encoded[0])
    return pack(conversations, rows, row_tokens, seed)
