"""What the pointwise kernels compute, in plain torch: float32 inside, rounded once at the end.

Same arguments as the wrappers in `tidegate.kernels.pointwise`, where they are described.
"""

from __future__ import annotations

import torch

from tidegate.kernels.linear.retile import untile
from tidegate.kernels.linear.weights import TiledLinear
from tidegate.kernels.pointwise.table import PackedTable, Table
from tidegate.kernels.torch_ops import activate, root_mean_square_norm
from tidegate.model.architecture import Activation

Tensor = torch.Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `tidegate.kernels.pointwise.rms_norm`."""
    if residual is not None:
        x = residual.copy_(residual.float() + x.float())
    normed = root_mean_square_norm(x.float().contiguous(), weight.float(), eps)
    return _given(normed.to(x.dtype), out), x


def gated_activation(gate_up: Tensor, act: Activation, *, out: Tensor | None = None) -> Tensor:
    """See `tidegate.kernels.pointwise.gated_activation`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return _given((activate(gate, act) * up).to(gate_up.dtype), out)


def adjust(
    x: Tensor,
    *,
    factor: float = 1.0,
    limit: float | None = None,
    cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `tidegate.kernels.pointwise.adjust`."""
    y = x.float() * factor
    if limit is not None:
        y = y.clamp(-limit, limit)
    if cap is not None:
        y = cap * torch.tanh(y / cap)
    return _given(y.to(x.dtype), out)


def embed_rows(
    table: Table,
    tokens: Tensor,
    *,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `tidegate.kernels.pointwise.embed_rows`."""
    if isinstance(table, PackedTable):
        rows, own = table.rows(tokens), torch.float32
    elif isinstance(table, TiledLinear):
        rows, own = untile(table)[tokens.long()], torch.float32
    else:
        rows, own = table[tokens.long()].float(), table.dtype
    return _given((rows * factor).to(dtype or own), out)


def gather_rows(x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `tidegate.kernels.pointwise.gather_rows`."""
    return _given(x[rows.long()], out)


def _given(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)
