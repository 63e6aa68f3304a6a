"""What goes between a front and a replica: a call whose prompt is tokens, and why it was refused.

Both ends are processes of one cluster and one version, so these are pickled. Errors are not: theirs
take more than a message to be built again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tidegate.api.schema import Call
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    RequestError,
    TidegateError,
    UnavailableError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One call, ready to run."""

    call: Call
    prompt: tuple[int, ...] = field(repr=False)
    request_id: str
    """16 bytes in hex."""
    anchor: bytes | None = field(repr=False)
    """See `tidegate.cloud.ray.affinity.anchor_of`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a front must know of the model behind it."""

    model_id: str
    context_tokens: int
    created_s: int
    block_tokens: int | None
    """Of its KV; None where it has no blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An error that was raised instead of an answer, in a form that travels."""

    kind: Literal["request", "capacity", "unavailable", "execution"]
    message: str
    field: str = ""
    status: int = 400
    retry_after_s: float = 1.0

    @classmethod
    def of(cls, error: TidegateError) -> Refusal:
        """Of an error that a replica raised."""
        match error:
            case RequestError():
                problem = str(error).removeprefix(f"{error.field}: ")
                return cls(kind="request", message=problem, field=error.field, status=error.status)
            case CapacityError():
                return cls(kind="capacity", message=str(error), retry_after_s=error.retry_after_s)
            case UnavailableError():
                return cls(kind="unavailable", message=str(error))
            case _:
                return cls(kind="execution", message=str(error))

    def error(self) -> TidegateError:
        """As it was raised."""
        match self.kind:
            case "request":
                return RequestError(self.field, self.message, status=self.status)
            case "capacity":
                return CapacityError(self.message, retry_after_s=self.retry_after_s)
            case "unavailable":
                return UnavailableError(self.message)
            case "execution":
                return ExecutionError(self.message)
