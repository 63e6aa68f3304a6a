"""Runs an executor over known tokens: what it would say after each of them, and what it answers.

Every token is a decode step, as in use, with several sequences side by side. For evaluation and
benchmarks; the engine has no part in it, so nothing is scheduled, cached or sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from tidegate.engine.executor import Executor, ExecutorStep, Logits, Row

Sequences = Sequence[Sequence[int]]

_GROUP_BYTES = 1 << 28
"""Logits that are held at once."""


def teacher_forced(executor: Executor, sequences: Sequences) -> Iterator[Logits]:
    """Logits [tokens, V] after every token of each sequence, in order.

    Raises:
        ExecutionError: a sequence is longer than the executor's context.
    """
    for group in _groups(executor, sequences):
        logits = [np.empty((len(one), executor.limits.vocab), np.float32) for one in group]
        for position in range(max(len(one) for one in group)):
            live = [place for place, one in enumerate(group) if position < len(one)]
            rows = tuple(
                _row(executor, place, group[place][position : position + 1], position)
                for place in live
            )
            for place, found in zip(
                live, executor.execute(ExecutorStep(rows=rows)).logits, strict=True
            ):
                logits[place][position] = found
        yield from logits


def greedy_answers(
    executor: Executor, prompts: Sequences, *, longest: int, ends: Collection[int]
) -> Iterator[list[int]]:
    """The most likely continuation of each prompt, without the token that ended it.

    Args:
        executor: what runs the model.
        prompts: tokens, at least one each.
        longest: tokens at most.
        ends: tokens that end an answer.
    """
    for group in _groups(executor, prompts):
        answers: list[list[int]] = [[] for _ in group]
        following = {place: _prefill(executor, place, one) for place, one in enumerate(group)}
        while following:
            for place, token in list(following.items()):
                room = len(group[place]) + len(answers[place]) < executor.limits.context_tokens
                if token in ends or len(answers[place]) == longest or not room:
                    del following[place]
                else:
                    answers[place].append(token)
            following = _decode(executor, group, answers, sorted(following))
        yield from answers


def _prefill(executor: Executor, place: int, prompt: Sequence[int]) -> int:
    """Run a prompt in the largest steps allowed; the most likely token after it."""
    best = 0
    for past in range(0, len(prompt), executor.limits.step_tokens):
        chunk = prompt[past : past + executor.limits.step_tokens]
        step = ExecutorStep(rows=(_row(executor, place, chunk, past),))
        best = int(executor.execute(step).logits[0].argmax())
    return best


def _decode(
    executor: Executor, prompts: Sequences, answers: Sequences, places: Sequence[int]
) -> dict[int, int]:
    """Run the last token of each answer; the most likely token after each."""
    if not places:
        return {}
    rows = tuple(
        _row(executor, place, answers[place][-1:], len(prompts[place]) + len(answers[place]) - 1)
        for place in places
    )
    best = executor.execute(ExecutorStep(rows=rows)).logits.argmax(axis=-1).tolist()
    return dict(zip(places, best, strict=True))


def _groups(executor: Executor, sequences: Sequences) -> Iterator[Sequences]:
    """As many at a time as a step and the memory for their logits allow."""
    start = 0
    while start < len(sequences):
        row_bytes = max(len(sequences[start]), 1) * executor.limits.vocab * 4
        count = max(1, min(_rows(executor), _GROUP_BYTES // row_bytes))
        yield sequences[start : start + count]
        start += count


def _rows(executor: Executor) -> int:
    """Sequences that may have KV at once, each a whole context."""
    kv, limits = executor.kv, executor.limits
    rows = min(limits.step_rows, limits.step_tokens)
    if kv.kind == "slots":
        return rows
    return min(rows, kv.blocks // _own_blocks(executor, kv.block_tokens))


def _own_blocks(executor: Executor, block_tokens: int) -> int:
    return -(-executor.limits.context_tokens // block_tokens)


def _row(executor: Executor, place: int, tokens: Sequence[int], past: int) -> Row:
    """Tokens of the sequence at `place` of the group, which owns that slot or those blocks."""
    array, kv = np.array(tokens, np.int64), executor.kv
    if kv.kind == "slots":
        return Row(tokens=array, past=past, slot=place)
    own = _own_blocks(executor, kv.block_tokens)
    used = -(-(past + len(tokens)) // kv.block_tokens)
    blocks = np.arange(place * own, place * own + used, dtype=np.int32)
    return Row(tokens=array, past=past, blocks=blocks)
