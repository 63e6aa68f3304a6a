"""`StepReport`: what one step did and for whom, told to whoever accounts for time and energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tidegate.engine.batch import Batch
from tidegate.engine.request import RequestId
from tidegate.engine.stepper import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShare:
    """What of a step was one request's."""

    request_id: RequestId
    computed_tokens: int
    """Tokens of its row that were run through the model, those guessed ahead left out."""
    past_tokens: int
    """Tokens whose keys and values its row read."""
    is_prompt: bool
    """They were of its prompt, or of an answer computed again after it had lost its place."""
    sampled_tokens: int
    """New tokens of its answer; 0 for all but the last part of a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One step that ran, well or not; `ended_s` is on the engine's clock."""

    ended_s: float
    elapsed_s: float
    shares: tuple[StepShare, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(one.computed_tokens for one in self.shares if one.is_prompt)

    @property
    def decoding_rows(self) -> int:
        """Rows that went on with an answer."""
        return sum(not one.is_prompt for one in self.shares)


StepWatcher = Callable[[StepReport], None]
"""Called on the engine's event loop after each step, before its tokens are handed out. It must be
quick, and what it raises ends the step's requests as any defect does."""


def report_of(batch: Batch, outcome: Outcome, *, began_s: float, ended_s: float) -> StepReport:
    """The report of a step; one that failed gave no token and took all the time since it began."""
    choices = iter(outcome.choices)
    failed = outcome.error is not None
    shares = []
    for (generation, tokens), row in zip(batch.chunks, batch.step.rows, strict=True):
        choice = next(choices, None) if row.logits and not failed else None
        shares.append(
            StepShare(
                request_id=generation.request.id,
                computed_tokens=tokens,
                past_tokens=row.past,
                is_prompt=tokens > 1 or row.past < len(generation.request.prompt),
                sampled_tokens=0 if choice is None else len(choice.sampled),
            )
        )
    elapsed_s = ended_s - began_s if failed else outcome.elapsed_s
    return StepReport(ended_s=ended_s, elapsed_s=elapsed_s, shares=tuple(shares))
