"""What happens to query, key and value before attention: norm, clip, rotation, the cache write.

`write_kv` does it in one pass. Its twin in plain torch operations is
`tidegate.kernels.kv_write.reference.write_kv`.
"""

from __future__ import annotations

import torch

from tidegate.errors import ConfigError
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
    """Norm, cut and rotate a step's queries and keys; write its keys and values to the cache.

    Args:
        q: [T, N, H] in bfloat16, float16 or float32; rows of tokens may be further apart than
            N * H (q, k and v are views of one fused projection), a row itself is contiguous.
        k: [T, K, H], likewise.
        v: [T, K, H], likewise.
        kv: the cache that is written at `step.places`.
        step: the requests; of them the positions and places are read.
        rope: the rotation; None for a layer without one.
        q_norm: float32 weights of an RMS norm over each head [H] or over the row [N * H].
        k_norm: likewise, [H] or [K * H].
        eps: added to the mean of squares.
        clip: q, k and v are cut to this magnitude, behind the norm.
        out: where the rotated queries go; None writes over q.

    Returns:
        `out`, or q.

    Raises:
        ConfigError: a shape or dtype is not as above.
    """
    from tidegate.kernels.kv_write.launch import Norms, launch

    out = q if out is None else out
    _check(q, k, v, out, kv, rope)
    norms = Norms(
        q=q_norm,
        k=k_norm,
        q_over_row=_over_row("q_norm", q_norm, int(q.shape[1]), kv.head_size),
        k_over_row=_over_row("k_norm", k_norm, kv.kv_heads, kv.head_size),
        eps=eps,
    )
    launch(q, k, v, out, kv, step, rope, norms, clip)
    return out


def _over_row(name: str, weight: Tensor | None, heads: int, head_size: int) -> bool:
    """Whether a norm is taken over the whole row and not over each head."""
    if weight is None or weight.shape == (head_size,):
        return False
    if weight.shape != (heads * head_size,):
        allowed = f"[{head_size}] or [{heads * head_size}]"
        raise ConfigError(f"{name}.shape", tuple(weight.shape), allowed)
    return True


def _check(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, kv: KvLayer, rope: RopeTables | None
) -> None:
    tokens, heads, head_size = q.shape
    wanted = (tokens, kv.kv_heads, kv.head_size)
    named = {"q": q, "k": k, "v": v, "out": out}
    for name, tensor in named.items():
        allowed = (tokens, heads, kv.head_size) if name in ("q", "out") else wanted
        if tuple(tensor.shape) != allowed:
            raise ConfigError(f"{name}.shape", tuple(tensor.shape), str(allowed))
        if tensor.stride(2) != 1 or tensor.stride(1) != head_size:
            raise ConfigError(f"{name}.stride()", tensor.stride(), f"(any, {head_size}, 1)")
    if rope is not None and rope.size > head_size:
        raise ConfigError("rope.size", rope.size, f"at most {head_size}, the head size")
    if kv.keys.dtype == torch.float8_e4m3fn and q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if capability < (8, 9):
            raise ConfigError("compute capability", capability, "(8, 9) or more for fp8 keys")
