"""Paged attention in plain torch operations, one request after the other: the definition.

Scores are `q . k * scale`, softcapped, hidden where the query must not look, and softmaxed in
float32; a sink is one more score per query head that takes its share of the softmax and adds
nothing. Keys and values of 8 bits are multiplied by their scales first.
"""

from __future__ import annotations

import torch

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
    """What `tidegate.kernels.attention.paged_attention` computes; see there for the arguments.

    `workspace` and `deterministic` change nothing here. Rows of padding are 0.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out.zero_()
    starts, lengths = step.starts.tolist(), step.lengths.tolist()
    requests = zip(starts[:-1], starts[1:], lengths, strict=True)
    for index, (start, end, length) in enumerate(requests):
        if length == 0 or start == end:
            continue
        keys = gather(kv.keys, kv.key_scales, step.blocks[index], length)
        values = gather(kv.values, kv.value_scales, step.blocks[index], length)
        out[start:end] = attend(
            q[start:end].float(),
            keys,
            values,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    return out


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The last tokens of one request, in the precision of what is given.

    Args:
        q: [tokens, N, H], of the last of the keys' positions.
        keys: [K, length, H].
        values: likewise.
        scale: factor on q.k.
        window: see `paged_attention`.
        softcap: likewise.
        sinks: likewise.
    """
    tokens, length = len(q), keys.shape[1]
    scores = _scores(q, keys, scale, softcap)
    if tokens > 1 or window is not None:
        hidden = _hidden(length - tokens, length, window, q.device)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("kgts,ksh->tkgh", _softmax(scores, sinks), values).flatten(1, 2)


def gather(stored: Tensor, scales: Tensor | None, blocks: Tensor, length: int) -> Tensor:
    """The first `length` keys or values of a request as float32 [K, length, H].

    Args:
        stored: [blocks, K, block_tokens, H], of any precision.
        scales: of 8 bits, [blocks, K, block_tokens].
        blocks: the request's block ids in order, [most blocks].
        length: tokens of the request.
    """
    block_tokens = stored.shape[2]
    chosen = blocks[: -(-length // block_tokens)].long()
    values = stored[chosen].float()
    if scales is not None:
        values = values * scales[chosen][..., None]
    return values.transpose(0, 1).flatten(1, 2)[:, :length]


def _scores(q: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores [K, N / K, tokens, length] of q [tokens, N, H] with keys [K, length, H]."""
    kv_heads, _, head_size = keys.shape
    grouped = q.view(len(q), kv_heads, -1, head_size)
    scores = torch.einsum("tkgh,ksh->kgts", grouped, keys) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _hidden(past: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Keys that the queries at positions `past` to `length` must not see, [tokens, length]."""
    queries = torch.arange(past, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None]
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax over [..., length], one more score per head in its denominator."""
    if sinks is None:
        return scores.softmax(dim=-1)
    kv_heads, share, tokens, _ = scores.shape
    column = sinks.to(scores.dtype).view(kv_heads, share, 1, 1).expand(-1, -1, tokens, 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
