"""A step on the GPU: what waits for its tokens, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from tidegate.engine.device_sampling import SampledStep
from tidegate.engine.executor import ExecutorStep
from tidegate.errors import ExecutionError

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PendingStep:
    """See `tidegate.engine.device_sampling.Pending`."""

    step: ExecutorStep
    tokens: Tensor
    """On the host, once the device has reached what was submitted."""
    reached: torch.cuda.Event | None

    def result(self) -> SampledStep:
        """See `Pending.result`."""
        with failing(self.step):
            if self.reached is not None:
                self.reached.synchronize()
            tokens = self.tokens.numpy().astype(np.int64)
        return SampledStep(tokens=tokens, sound=tokens >= 0, logits=np.empty((0, 0), np.float32))


def reached(at: torch.device) -> torch.cuda.Event | None:
    """What tells that the device has come so far; a CPU has when it is asked."""
    if at.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


@contextmanager
def failing(step: ExecutorStep) -> Iterator[None]:
    """Name the step that fails."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        rows, tokens = len(step.rows), sum(len(row.tokens) for row in step.rows)
        raise ExecutionError(
            f"a step of {rows} rows and {tokens} tokens failed: {error}"
        ) from error
