"""What a model will take, part by part, before anything of it is read. Pure arithmetic.

Weights and KV follow from the architecture. Scratch is a bound on what the largest step needs at
once. What an interpreter and its libraries take is not in it, nor a tokenizer's few MiB.
"""

from __future__ import annotations

import math
from typing import Final

from tidegate.cloud.executor_choice import ExecutorSettings, torch_settings
from tidegate.cloud.gpu_memory import MemoryPart, MemorySum
from tidegate.engine.speculation import MOST_DRAFT_TOKENS
from tidegate.model.architecture import Architecture
from tidegate.model.roles import roles

_FLOAT: Final = 4
_SCORES: Final = 9
"""Attention scores at once: scaled, masked, their softmax, and copies that torch makes for its
products. Peaks of a process were 8.0 to 8.7 of them, for steps of 256 and 512 tokens and contexts
of 512 and 2048 (torch 2.13 on a CPU, one thread)."""
_WIDE: Final = 3
"""Gate, its activation and up of the MLP, at once."""
_STREAM: Final = 8
"""Values as wide as the residual stream: it, its norm, q, k, v and what is added, at once."""


def torch_memory(
    arch: Architecture, settings: ExecutorSettings, *, packed_bytes: int | None = None
) -> MemorySum:
    """Of `TorchExecutor`, which keeps weights and KV in float32.

    Args:
        arch: the model.
        settings: of the executor.
        packed_bytes: of weights that are quantised in their files; they stay beside the others.
    """
    sizes = torch_settings(settings, arch)
    weights = weight_values(arch) * _FLOAT
    parts = [MemoryPart(name="weights, float32", nbytes=weights)]
    if packed_bytes is not None:
        parts.append(MemoryPart(name="weights, packed", nbytes=packed_bytes))
    tokens = sizes.slots * sizes.context_tokens
    kv = tokens * arch.kv_values_per_token * _FLOAT
    name = f"KV, {sizes.slots} x {sizes.context_tokens} tokens, float32"
    parts.append(MemoryPart(name=name, nbytes=kv))
    rows, context = sizes.step_tokens, sizes.context_tokens
    logits = min(rows, sizes.slots * (1 + MOST_DRAFT_TOKENS)) * arch.vocab
    scores = _SCORES * arch.heads * min(rows, context) * context
    stream = rows * (_STREAM * max(arch.width, arch.heads * arch.head_size) + _WIDE * arch.inner)
    scratch = _FLOAT * (max(scores, 2 * logits) + stream)
    parts.append(MemoryPart(name=f"scratch, steps of {rows} tokens", nbytes=scratch))
    return MemorySum(parts=tuple(parts))


def weight_values(arch: Architecture) -> int:
    """Numbers of all weights, norms and biases."""
    return sum(
        math.prod(role.shape) + (role.shape[0] if role.bias else 0) for role in roles(arch).values()
    )
