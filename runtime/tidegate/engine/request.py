"""What the engine is asked: prompt tokens, how to sample, when it matters.

Everything is validated on construction, so the loop never meets a request it cannot run. Times are
seconds on the engine's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NewType

from tidegate.errors import RequestError

RequestId = NewType("RequestId", str)


class Priority(IntEnum):
    """Lower runs first."""

    INTERACTIVE = 0
    NORMAL = 1
    BACKGROUND = 2


def _between(field_name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(field_name, f"{value!r}: must be between {low:g} and {high:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when the answer ends.

    `temperature` 0 is greedy. `top_k` None and `top_p` 1 keep the whole vocabulary. The same seed
    gives the same tokens whatever else is in the batch; None draws one when the request starts.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError("max_tokens", f"{self.max_tokens!r}: must be at least 1")
        _between("temperature", self.temperature, 0, 2)
        _between("top_p", self.top_p, 0, 1)
        if self.top_k is not None and self.top_k < 1:
            raise RequestError("top_k", f"{self.top_k!r}: must be at least 1, or absent")
        if len(self.stop) > 16 or not all(0 < len(text) <= 256 for text in self.stop):
            raise RequestError("stop", "must be at most 16 strings of 1 to 256 characters")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt to continue. `prompt` holds token ids, so a hand-off can be token exact."""

    id: RequestId
    prompt: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    """When the answer stops being useful, on the engine's clock; orders the queue, ends nothing."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("prompt", "is empty: must hold at least one token")
