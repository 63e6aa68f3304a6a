"""What the experts' kernels compute, in plain torch: each expert alone, on those who chose it.

Kept apart as the kernels are: `route` chooses, `moe` computes what was chosen. Products are in
float32; what lies between them is rounded to the type of `x`, as it is written to memory.
"""

from __future__ import annotations

import torch

from tidegate.kernels.linear.reference import weight_matrix
from tidegate.kernels.moe.weights import ExpertWeights, Stacked
from tidegate.kernels.torch_ops import activate
from tidegate.model.architecture import Activation

Tensor = torch.Tensor


def route(
    logits: Tensor,
    *,
    chosen: int,
    normalised: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts; see `Ops.moe`. Of equal ones the lower number goes first.

    Args:
        logits: [T, E], the router's output.
        chosen: experts of a token.
        normalised: whether a token's shares are scaled to sum to 1.
        out: where both results go.

    Returns:
        Experts, int32 [T, chosen], best first, and their shares, float32 [T, chosen].
    """
    odds = logits.float().softmax(dim=-1)
    order = odds.sort(dim=-1, descending=True, stable=True).indices[:, :chosen]
    shares = odds.gather(1, order)
    if normalised:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    if out is None:
        return order.to(torch.int32), shares
    return out[0].copy_(order), out[1].copy_(shares)


def moe(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    weights: ExpertWeights,
    act: Activation,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of the chosen experts' gated MLPs, weighted by `shares`, in the order of the choice.

    Args:
        x: [T, width].
        experts: int32 [T, chosen].
        shares: float32 [T, chosen].
        weights: the layer's experts.
        act: between gate and product.
        out: [T, width], to write into.

    Returns:
        [T, width] in the type of `x`.
    """
    answers = torch.zeros(*experts.shape, weights.width, device=x.device)
    for number in range(weights.count):
        tokens, place = (experts == number).nonzero(as_tuple=True)
        if len(tokens):
            mine = x[tokens].float()
            gated = mine @ expert_matrix(weights.gate, number, weights.count, weights.inner).T
            wide = mine @ expert_matrix(weights.up, number, weights.count, weights.inner).T
            inner = (activate(gated, act) * wide).to(x.dtype).float()
            down = expert_matrix(weights.down, number, weights.count, weights.width)
            answers[tokens, place] = (inner @ down.T).to(x.dtype).float()
    whole = (answers * shares[..., None]).sum(dim=1).to(x.dtype)
    return whole if out is None else out.copy_(whole)


def expert_matrix(stacked: Stacked, number: int, count: int, rows: int) -> Tensor:
    """One expert's weight, float32 [rows, in]."""
    whole = weight_matrix(stacked)
    return whole.view(count, -1, whole.shape[1])[number, :rows]
