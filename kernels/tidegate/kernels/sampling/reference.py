"""What sampling is, in plain torch: row by row, in float64, by sorting.

The same stages in the same order as `tidegate.engine.sampling`, which says why.
"""

from __future__ import annotations

import torch

from tidegate.kernels.sampling.asks import Column, SamplingAsks

Tensor = torch.Tensor


def sample(logits: Tensor, asks: SamplingAsks, *, out: Tensor | None = None) -> Tensor:
    """See `tidegate.kernels.sampling.sample`; the logits stay as they are."""
    chosen = [_choose(logits[row].float(), asks, row) for row in range(asks.rows)]
    tokens = torch.tensor(chosen, dtype=torch.int32, device=logits.device)
    return tokens if out is None else out.copy_(tokens)


def _choose(raw: Tensor, asks: SamplingAsks, row: int) -> int:
    if not raw.max().isfinite():  # NaN is the largest
        return -1
    logits = _shaped(raw, asks, row)
    if not logits.max().isfinite():
        return -1
    numbers, top_k = asks.numbers[row].tolist(), int(asks.integers[row, 0])
    if numbers[Column.TEMPERATURE] == 0:
        return int(logits.argmax())
    order = torch.sort(logits, descending=True, stable=True).indices
    if top_k:
        order = order[:top_k]
    weights = logits[order].double()
    weights = torch.exp((weights - weights[0]) / numbers[Column.TEMPERATURE])
    weights[weights < numbers[Column.MIN_P]] = 0
    if numbers[Column.TOP_P] < 1:
        goal = numbers[Column.TOP_P] * weights.sum()
        kept = int((weights.cumsum(0) < goal).sum()) + 1
        order, weights = order[:kept], weights[:kept]
    order, places = order.sort()
    sums = weights[places].cumsum(0)
    beyond = int((sums <= numbers[Column.UNIFORM] * sums[-1]).sum())
    return int(order[min(beyond, int((sums < sums[-1]).sum()))])


def _shaped(raw: Tensor, asks: SamplingAsks, row: int) -> Tensor:
    logits, barred = raw.clone(), None
    if asks.edits is not None:
        assert asks.starts is not None, "edits begin somewhere"
        edits = asks.edits[asks.starts[row] : asks.starts[row + 1]]
        ids, counts = edits[:, 0].long(), edits[:, 2]
        values = logits[ids] + edits[:, 1].contiguous().view(torch.float32)
        logits[ids] = torch.where(counts >= 0, _penalised(values, counts, asks, row), values)
        barred = ids[edits[:, 3] != 0]
    if asks.masks is not None and asks.integers[row, 1]:
        places = torch.arange(len(raw), device=raw.device)
        allowed = (asks.masks[row][places // 32] >> (places % 32)) & 1
        logits[allowed == 0] = -torch.inf
    if barred is not None and len(barred):
        kept = logits[barred]
        logits[barred] = -torch.inf
        if logits.max() == -torch.inf:
            logits[barred] = kept
    return logits


def _penalised(values: Tensor, counts: Tensor, asks: SamplingAsks, row: int) -> Tensor:
    numbers, wide = asks.numbers[row].tolist(), values.double()
    factor: float = numbers[Column.REPETITION]
    wide = torch.where(wide > 0, wide / factor, wide * factor)
    frequency: float = numbers[Column.FREQUENCY]
    wide = wide - frequency * counts
    presence: float = numbers[Column.PRESENCE]
    return (wide - presence * (counts > 0)).float()
