"""The definition of paged attention against dense attention, query by query in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pagedsteps import filled_layer, ragged_step

from tidegate.kernels.attention.reference import gather, paged_attention
from tidegate.kernels.paged_kv import KvLayer, KvPrecision, StepTensors

Tensor = torch.Tensor


def one_query(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One token's q [N, H] over all of keys and values [K, S, H], head by head in float64."""
    share = len(q) // len(keys)
    rows = []
    for head, row in enumerate(q.double()):
        scores = keys[head // share].double() @ row * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
        rows.append((weights / total) @ values[head // share].double())
    return torch.stack(rows)


def dense(
    q: Tensor,
    kv: KvLayer,
    step: StepTensors,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Paged attention as the sum over what each token sees."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for index, length in enumerate(step.lengths.tolist()):
        if length == 0:
            continue
        keys = gather(kv.keys, kv.key_scales, step.blocks[index], length)
        values = gather(kv.values, kv.value_scales, step.blocks[index], length)
        for token in range(int(step.starts[index]), int(step.starts[index + 1])):
            last = int(step.positions[token]) + 1
            first = 0 if window is None else max(0, last - window)
            seen = (keys[:, first:last], values[:, first:last])
            out[token] = one_query(q[token], *seen, scale=scale, softcap=softcap, sinks=sinks)
    return out


@pytest.mark.parametrize("precision", ["same", "int8", "fp8"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_token_attends_to_what_is_before_it(
    precision: KvPrecision, window: int | None, softcap: float | None
) -> None:
    step = ragged_step([5, 1, 20, 1], [0, 33, 12, 0], padding=2)
    kv = filled_layer(step, kv_heads=2, head_size=12, precision=precision)
    q = torch.randn(29, 6, 12, generator=torch.Generator().manual_seed(1))
    sinks = torch.linspace(-1, 2, 6) if softcap is None else None

    def by(function: Callable[..., Tensor]) -> Tensor:
        return function(q, kv, step, scale=0.3, window=window, softcap=softcap, sinks=sinks)

    assert torch.allclose(by(paged_attention).double(), by(dense), atol=2e-6)
