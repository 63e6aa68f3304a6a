"""`Executor`: what runs one step of the model. The engine decides, an executor only executes.

There is no prefill and no decode here: a row brings `tokens` whose positions start at `past`, and
asks for the logits of its last few tokens, or of none. A decode row has one token, a prefill chunk
many; one that verifies guessed tokens asks for as many logits as it has tokens. Placement says
where the row's KV lives, in the shape that the executor declared: block ids, or one slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Blocks = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedGeometry:
    """KV in `blocks` blocks of `block_tokens` tokens; any block may belong to any request."""

    block_tokens: int
    blocks: int
    bytes_per_token: int
    kind: Literal["paged"] = "paged"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotGeometry:
    """KV in `slots` rows of `slot_tokens` tokens; a request owns one row from token 0 on."""

    slots: int
    slot_tokens: int
    bytes_per_token: int
    kind: Literal["slots"] = "slots"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorLimits:
    """What one step may hold; the engine plans within it."""

    context_tokens: int
    """Prompt plus answer of one request."""
    step_tokens: int
    """Tokens of all rows of one step."""
    step_rows: int
    """Requests in one step."""
    step_logits: int
    """Logits of all rows of one step, at least `step_rows`."""
    vocab: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One request's part of a step: `tokens` at positions `past`, `past + 1`, ..."""

    tokens: Tokens = field(repr=False)
    past: int
    blocks: Blocks | None = None
    """Paged: the request's block ids in order, enough for `past + len(tokens)` tokens."""
    slot: int | None = None
    """Slots: the request's row."""
    logits: int = 1
    """How many of its last tokens' logits are needed, 0 to `len(tokens)`."""
    fed: int | None = None
    """The last of `tokens` is the token that the step submitted before chose at this place of all
    that it chose; see `engine.device_sampling.PipelinedExecutor`. None: it is known."""
    adapter: int | None = None
    """The adapter that is added to the model for this row; see `engine.adapting`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExecutorStep:
    """Rows to run together. Within a step every request appears once."""

    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int, int], ...] = ()
    """Slots only, before the rows: (from slot, to slot, tokens) to copy, in order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepResult:
    """Logits that were asked for, float32 [sum of `Row.logits`, V], in row and token order."""

    logits: Logits


class Executor(Protocol):
    """Runs steps of one model. Called from one thread at a time."""

    @property
    def limits(self) -> ExecutorLimits:
        """Fixed for the executor's life."""

    @property
    def kv(self) -> PagedGeometry | SlotGeometry:
        """Fixed for the executor's life; all KV memory is allocated at construction."""

    def execute(self, step: ExecutorStep) -> StepResult:
        """Run one step.

        Raises:
            ExecutionError: the step failed; the KV of its rows is undefined, all else is intact.
        """

    def close(self) -> None:
        """Free the model and its KV. The executor is of no use afterwards."""


@runtime_checkable
class Unloadable(Protocol):
    """What an executor may offer besides: to give its memory back while nobody needs it."""

    @property
    def loaded(self) -> bool:
        """Whether it holds the model; without it, the next step loads it first."""

    def unload(self) -> None:
        """Free the model and its KV, whose content is lost. Called like `Executor.execute`."""
