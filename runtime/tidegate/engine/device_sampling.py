"""`SamplingExecutor`: an executor that also chooses tokens, where the logits are.

What it chooses is what `tidegate.engine.choosing` would have, from the same draws: a row that
guessed gets a token for each of its positions, drawn as if the guesses before it had held, and
as many are taken as do hold. Rows that want what a device cannot do get their logits, as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from tidegate.engine.choosing import Ask, Choice, accepted, choose, guarded
from tidegate.engine.executor import ExecutorStep, Logits, Tokens
from tidegate.engine.sampling import Draw, Sampled


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledStep:
    """What a step gave."""

    tokens: Tokens
    """One for each draw, in order."""
    sound: npt.NDArray[np.bool_]
    """Whether a draw's logits held a number at all; its token means nothing otherwise."""
    logits: Logits
    """[positions without a draw, V], in order."""


@runtime_checkable
class SamplingExecutor(Protocol):
    """What an `Executor` may offer besides."""

    def can_draw(self, draw: Draw) -> bool:
        """Whether the device can choose by this draw."""

    def execute_and_sample(self, step: ExecutorStep, draws: Sequence[Draw | None]) -> SampledStep:
        """Run one step and choose a token at each position of `Row.logits` that has a draw.

        Args:
            step: as for `Executor.execute`.
            draws: one per logit that the step asks for, in row and token order; None: give the
                logits themselves.

        Raises:
            ExecutionError: as `Executor.execute`.
        """


class Pending(Protocol):
    """A step that was submitted."""

    def result(self) -> SampledStep:
        """Wait for it.

        Raises:
            ExecutionError: it failed.
        """


@runtime_checkable
class PipelinedExecutor(SamplingExecutor, Protocol):
    """One that takes a step while the one before it runs."""

    def submit(self, step: ExecutorStep, draws: Sequence[Draw]) -> Pending:
        """Begin a step; at most one other may be pending.

        Args:
            step: rows whose `Row.fed` is set are fed with tokens of the step submitted before.
            draws: one for every logit. They bring no mask and no history and bias nothing, which
                every such executor can draw by.

        Raises:
            ExecutionError: as `Executor.execute`.
        """


class DeviceChoosing:
    """The tokens of one step, chosen on the device as far as it can."""

    def __init__(self, executor: SamplingExecutor, asks: Sequence[Ask]) -> None:
        """Find out which asks the device can answer; moves no guide on, but asks them for masks."""
        self._asks = tuple(asks)
        self._draws = [self._drawable(executor, ask) for ask in self._asks]

    def run(self, executor: SamplingExecutor, step: ExecutorStep) -> SampledStep:
        """Run the step."""
        return executor.execute_and_sample(step, list(self._all_draws()))

    def choices(self, found: SampledStep) -> tuple[Choice, ...]:
        """What came of each ask; moves guides on, so the step must not fail any more."""
        others = [ask for ask, draws in zip(self._asks, self._draws, strict=True) if not draws]
        chosen = iter(choose(found.logits, others) if others else ())
        choices, at = [], 0
        for ask, draws in zip(self._asks, self._draws, strict=True):
            if not draws:
                choices.append(next(chosen))
                continue
            part = slice(at, at + len(draws))
            choices.append(_taken(ask, found.tokens[part], found.sound[part]))
            at = part.stop
        return tuple(choices)

    def _all_draws(self) -> Iterator[Draw | None]:
        for ask, draws in zip(self._asks, self._draws, strict=True):
            if draws:
                yield from draws
            else:
                yield from (None for _ in range(1 + len(ask.draft)))

    @staticmethod
    def _drawable(executor: SamplingExecutor, ask: Ask) -> list[Draw]:
        """A draw for each position of an ask; none when the host has to choose.

        Who wants likelihoods needs all logits. The mask of a position behind a guess is known only
        once the guess is taken, so who is guided and guesses is left to the host too.
        """
        draw = ask.draw
        if draw.params.logprobs is not None:
            return []
        if ask.guide is not None:
            if len(ask.draft):
                return []
            mask = guarded(ask.guide.mask)
            if isinstance(mask, Choice):
                return []  # the host meets the trouble again, and knows whose it is
            draw = replace(draw, allowed=mask)
        draws = [draw]
        for token in ask.draft.tolist():
            draws.append(draws[-1].after(token))
        return draws if all(executor.can_draw(one) for one in draws) else []


def _taken(ask: Ask, tokens: Tokens, sound: npt.NDArray[np.bool_]) -> Choice:
    """The tokens of one ask, until one is not the guessed one."""
    found = [
        Sampled(token=token) if good else None
        for token, good in zip(tokens.tolist(), sound.tolist(), strict=True)
    ]
    first = guarded(partial(accepted, found[0], ask.guide))
    if first.error is not None:
        return first
    taken = list(first.sampled)
    for one, guess in zip(found[1:], ask.draft.tolist(), strict=True):
        # Trouble at a later position is left to the next step, as everywhere.
        if one is None or taken[-1].token != guess:
            break
        taken.append(one)
    return Choice(sampled=tuple(taken))
