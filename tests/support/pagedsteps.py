"""Random ragged steps over a paged cache, with NaN wherever a request has nothing to look for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidegate.kernels.kv_write.reference import quantised
from tidegate.kernels.paged_kv import KvLayer, KvPrecision, StepTensors

Tensor = torch.Tensor


def ragged_step(
    new: Sequence[int],
    past: Sequence[int],
    *,
    block_tokens: int = 16,
    padding: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> StepTensors:
    """Requests of `new` tokens behind `past` ones in shuffled blocks, then `padding` rows."""
    lengths = [n + p for n, p in zip(new, past, strict=True)]
    counts = [-(-length // block_tokens) for length in lengths]
    drawn = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
    blocks = torch.zeros(len(new) + padding, max(counts), dtype=torch.int32)
    positions, places = [], []
    for index, own in enumerate(torch.split_with_sizes(drawn, counts)):
        blocks[index, : len(own)] = own
        at = torch.arange(past[index], lengths[index])
        positions.append(at)
        places.append(own[at // block_tokens] * block_tokens + at % block_tokens)
    ends = torch.tensor([0, *new, *[1] * padding]).cumsum(0)
    rows = int(ends[-1])
    zeros = torch.zeros(padding, dtype=torch.int64)
    return StepTensors(
        tokens=torch.zeros(rows, dtype=torch.int32, device=device),
        positions=torch.cat([*positions, zeros]).int().to(device),
        starts=ends.int().to(device),
        lengths=torch.tensor([*lengths, *[0] * padding], dtype=torch.int32, device=device),
        blocks=blocks.to(device),
        places=torch.cat([*places, zeros]).to(device),
        most_tokens=max(new),
        most_length=max(lengths),
    )


def filled_layer(
    step: StepTensors,
    *,
    kv_heads: int,
    head_size: int,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    precision: KvPrecision = "same",
    seed: int = 0,
) -> KvLayer:
    """Random keys and values for a step's requests; NaN in every other place."""
    generator = torch.Generator().manual_seed(seed)
    device = step.blocks.device
    shape = (int(step.blocks.max()) + 1, kv_heads, block_tokens, head_size)
    kv = KvLayer.allocate(
        blocks=shape[0],
        block_tokens=block_tokens,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=dtype,
        precision=precision,
        device=device,
    )
    used = _used(step, shape[0], block_tokens)
    for stored, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
        drawn = torch.randn(shape, generator=generator).to(device)
        if scales is None:
            stored.copy_(drawn.masked_fill(~used[..., None], torch.nan))
        else:
            eight, scale = quantised(drawn, stored.dtype)
            stored.copy_(eight)
            scales.copy_(scale.masked_fill(~used, torch.nan))
    return kv


def _used(step: StepTensors, blocks: int, block_tokens: int) -> Tensor:
    """Whether a place holds a token of some request, [blocks, 1, block_tokens]."""
    used = torch.zeros(blocks, block_tokens, dtype=torch.bool, device=step.blocks.device)
    for length, row in zip(step.lengths.tolist(), step.blocks.long(), strict=True):
        at = torch.arange(length, device=row.device)
        used[row[at // block_tokens], at % block_tokens] = True
    return used[:, None]
