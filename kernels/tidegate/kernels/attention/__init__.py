"""Paged attention over a ragged step: prefill, chunks, decode and checks of guesses alike.

`paged_attention` starts one family of programs or two: requests of few new tokens are read in
segments (`decode.py`), the others in tiles of their tokens (`prefill.py`); all in one way where
sums must have one order (`in_order.py`). Its twin in plain torch
operations is `tidegate.kernels.attention.reference.paged_attention`.

A cache in blocks of 128 tokens or more spares the search for each key's block: one block holds all
keys of a tile then.
"""

from __future__ import annotations

import torch

from tidegate.errors import ConfigError
from tidegate.kernels.attention import plan
from tidegate.kernels.attention.plan import MOST_ROWS, Shape
from tidegate.kernels.launch import gpu_of
from tidegate.kernels.paged_kv import KvLayer, StepTensors

Tensor = torch.Tensor


def paged_attention(
    q: Tensor,
    kv: KvLayer,
    step: StepTensors,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attend causally: a token at position p sees the keys of its request up to p.

    Args:
        q: [T, N, H] in bfloat16, float16 or float32; rows of tokens may be further apart than
            N * H (a view of a fused projection), a row itself is contiguous.
        kv: the cache, this step's keys and values written to it (`tidegate.kernels.kv_write`).
        step: the requests; the host reads nothing of it but `most_tokens` and `most_length`.
        scale: factor on q.k, above 0.
        window: a token sees itself and the `window - 1` before it.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: float32 [N], scores that join the denominator of the softmax and add no value.
        out: [T, N, H] contiguous, where the result goes.
        workspace: float32, flat, `workspace_floats` of the step's limits or more.
        deterministic: a token's result does not depend, bit for bit, on the step around it, nor
            on how many tokens of its request are in it: alone, in a chunk or in a whole prompt.

    Returns:
        [T, N, H] of q's dtype. Rows of padding are 0.

    Raises:
        ConfigError: a shape, dtype or number is not as above.
    """
    from tidegate.kernels.attention.launch import Call, launch, launch_in_order

    _check(q, kv, scale, sinks)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    call = Call(
        q=q,
        out=out,
        kv=kv,
        step=step,
        shape=shape_of(int(q.shape[1]), q.dtype, kv),
        gpu=gpu_of(q.device),
        sinks=sinks,
        window=window,
        scale=scale,
        softcap=softcap,
    )
    (launch_in_order if deterministic else launch)(call, workspace)
    return out


def workspace_floats(
    heads: int,
    kv: KvLayer,
    *,
    dtype: torch.dtype,
    most_requests: int,
    most_length: int,
    deterministic: bool = False,
) -> int:
    """Float32 values of a workspace that is enough for every step within the limits.

    Args:
        heads: N.
        kv: a layer of the cache.
        dtype: of q.
        most_requests: of one step, padding included.
        most_length: tokens of one request, new ones included.
        deterministic: whether steps run so, which takes more.
    """
    return plan.workspace_floats(
        shape_of(heads, dtype, kv),
        gpu_of(kv.keys.device),
        most_requests=most_requests,
        most_length=most_length,
        deterministic=deterministic,
    )


def shape_of(heads: int, dtype: torch.dtype, kv: KvLayer) -> Shape:
    """What plans need to know of a layer with `heads` query heads of `dtype`."""
    return Shape(
        heads=heads,
        kv_heads=kv.kv_heads,
        head_size=kv.head_size,
        query_bytes=dtype.itemsize,
        kv_bytes=kv.keys.element_size(),
    )


def _check(q: Tensor, kv: KvLayer, scale: float, sinks: Tensor | None) -> None:
    tokens, heads, head_size = q.shape
    if head_size != kv.head_size or heads % kv.kv_heads or heads // kv.kv_heads > MOST_ROWS:
        allowed = f"[T, N, {kv.head_size}], N = {kv.kv_heads} times 1 to {MOST_ROWS}"
        raise ConfigError("q.shape", (tokens, heads, head_size), allowed)
    if q.stride(2) != 1 or q.stride(1) != head_size:
        raise ConfigError("q.stride()", q.stride(), f"(any, {head_size}, 1)")
    if scale <= 0:
        raise ConfigError("scale", scale, "above 0")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ConfigError("sinks.shape", tuple(sinks.shape), f"[{heads}]")
    if kv.keys.dtype == torch.float8_e4m3fn and q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            raise ConfigError("compute capability", capability, "(8, 9) or more for fp8 keys")
