"""Who may enter the engine's line: requests that can run here at all, while there is room. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.engine.request import GenerationRequest
from tidegate.errors import CapacityError, RequestError

WAITING_CONTEXTS: Final = 16
"""Prompt tokens that may wait, in contexts: what bounds the memory of the line."""
_LEAST_RETRY_S: Final = 1.0


def check_request(
    request: GenerationRequest, *, vocab: int, context_tokens: int, adapts: bool = False
) -> None:
    """Refuse what can never run here.

    Args:
        request: what to answer.
        vocab: tokens of the model.
        context_tokens: that a prompt and its answer may have together.
        adapts: the executor takes adapters, and no KV of theirs is kept on a disk.

    Raises:
        RequestError: the message names the limit.
    """
    if request.adapter is not None and not adapts:
        raise RequestError("model", "is an adapter: this executor runs the model alone")
    if len(request.prompt) >= context_tokens:
        raise RequestError(
            "prompt",
            f"{len(request.prompt)} tokens: must be less than the context of"
            f" {context_tokens}, which the answer shares",
            status=413,
        )
    if not all(0 <= token < vocab for token in request.prompt):
        raise RequestError("prompt", f"token ids must be between 0 and {vocab - 1}")
    request.sampling.check_tokens(vocab)


def check_line(
    prompt_tokens: int,
    waiting: Sequence[int],
    *,
    most_waiting: int,
    context_tokens: int,
    request_s: float | None,
) -> None:
    """Refuse one request more than the line takes.

    Args:
        prompt_tokens: of the request.
        waiting: tokens of every request that waits.
        most_waiting: requests that may.
        context_tokens: of one request.
        request_s: how long a request runs, if that is known: when to come back.

    Raises:
        CapacityError: the line is full.
    """
    retry_after_s = max(_LEAST_RETRY_S, request_s or 0.0)
    if len(waiting) >= most_waiting:
        raise CapacityError(
            f"{len(waiting)} requests are waiting: at most {most_waiting} may",
            retry_after_s=retry_after_s,
        )
    tokens, most_tokens = prompt_tokens + sum(waiting), WAITING_CONTEXTS * context_tokens
    if tokens > most_tokens:
        raise CapacityError(
            f"{tokens} prompt tokens would be waiting: at most {most_tokens} may",
            retry_after_s=retry_after_s,
        )
