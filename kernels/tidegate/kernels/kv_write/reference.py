"""Norm, clip, rotation, quantisation and the cache write in plain torch operations.

Everything between reading and storing is float32. The order is the walk's: RMS norm of query and
key, clip of all three, rotation of query and key; 8-bit scales are taken from what would be stored.
"""

from __future__ import annotations

import torch

from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.paged_kv import KvLayer, StepTensors

Tensor = torch.Tensor


def write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: KvLayer,
    step: StepTensors,
    *,
    rope: RopeTables | None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What `tidegate.kernels.kv_write.write_kv` computes; see there for the arguments."""
    out = q if out is None else out
    query, key, value = _normed(q, q_norm, eps), _normed(k, k_norm, eps), v.float()
    if clip is not None:
        query, key, value = (part.clamp(-clip, clip) for part in (query, key, value))
    if rope is not None:
        query, key = (rotated(part, rope, step.positions) for part in (query, key))
    out.copy_(query)
    _store(key, kv.keys, kv.key_scales, step.places)
    _store(value, kv.values, kv.value_scales, step.places)
    return out


def rotated(x: Tensor, rope: RopeTables, positions: Tensor) -> Tensor:
    """[T, heads, H] rotated at `positions` [T], halves paired (Su et al. 2021)."""
    at = positions.long()
    cos, sin = rope.cos[at][:, None], rope.sin[at][:, None]
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Float32 [..., H] as 8-bit values of `dtype` and one float32 scale per run of H."""
    largest = x.abs().amax(dim=-1)
    limit = 127.0 if dtype == torch.int8 else 448.0
    inverse = torch.where(largest > 0, limit / largest, 0.0)[..., None]
    steps = x * inverse
    if dtype == torch.int8:
        steps = steps.round()
    return steps.to(dtype), largest / limit


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Float32 of [T, heads, H], normed over each run of `len(weight)` values of a token's row."""
    x = x.float()
    if weight is None:
        return x
    runs = x.reshape(len(x), -1, len(weight))
    normal = runs * torch.rsqrt(runs.pow(2).mean(dim=-1, keepdim=True) + eps) * weight
    return normal.view(x.shape)


def _store(x: Tensor, stored: Tensor, scales: Tensor | None, places: Tensor) -> None:
    """Write [T, K, H] to its places of [blocks, K, block_tokens, H]."""
    block_tokens = stored.shape[2]
    block = places.div(block_tokens, rounding_mode="floor")
    at = places.remainder(block_tokens)
    if scales is None:
        stored[block, :, at] = x.to(stored.dtype)
    else:
        stored[block, :, at], scales[block, :, at] = quantised(x, stored.dtype)
