"""Experts of one layer, from one token's decode to a prefill, beside torch with an expert loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernels.case import Case, Work, half_type, worst
from kernels.linear import random_tiles
from torch.nn import functional

from tidegate.kernels.linear import DenseWeight
from tidegate.kernels.linear.reference import weight_matrix
from tidegate.kernels.moe import ExpertWeights, MoeWorkspace, moe, route
from tidegate.kernels.moe.weights import Stacked

_ALLOWED = 2**-6
"""Between products, of each answer and of the sum numbers are rounded to bf16."""
_QWEN3_30B = (2048, 768, 128, 8)
"""Width, inner width, experts and how many a token has (Qwen3-30B-A3B's config.json)."""


def cases(quick: bool) -> Iterator[Case]:
    """4 bits and dense, at rows of one request, of a few and of a prefill."""
    shape = (128, 128, 4, 2) if quick else _QWEN3_30B
    for rows in (1, 20) if quick else (1, 4, 16, 64, 256, 4096):
        for bits in (4, 16):
            yield _experts(rows, *shape, bits=bits)
        yield _routing(rows, shape[2], shape[3])


def _experts(rows: int, width: int, inner: int, count: int, chosen: int, *, bits: int) -> Case:
    # Tokens choose apart from one another: so many experts have at least one.
    touched = count * (1 - (1 - chosen / count) ** rows)
    return Case(
        name=f"moe {'bf16' if bits == 16 else 'w4a16'} {rows}x{width}x{inner}, {chosen} of {count}",
        make=partial(_work, rows, width, inner, count, chosen, bits),
        bytes_moved=int(touched * 3 * width * inner * bits / 8),
        flops=6 * rows * chosen * width * inner,
        baseline="torch, an expert after another, bf16",
    )


def _work(
    rows: int, width: int, inner: int, count: int, chosen: int, bits: int, device: torch.device
) -> Work:
    def stacked(outputs: int, inputs: int) -> Stacked:
        tiles = random_tiles(count * outputs, inputs, device)
        if bits == 4:
            return tiles
        return DenseWeight(weight=weight_matrix(tiles).to(half_type(device)).contiguous())

    weights = ExpertWeights(
        gate=stacked(inner, width),
        up=stacked(inner, width),
        down=stacked(width, inner),
        count=count,
        width=width,
        inner=inner,
    )
    draw = torch.Generator(device).manual_seed(rows)
    x = torch.randn(rows, width, generator=draw, device=device).to(half_type(device))
    logits = torch.randn(rows, count, generator=draw, device=device)
    experts, shares = route(logits, chosen=chosen, normalised=True)
    room = MoeWorkspace.of(weights, most_tokens=rows, chosen=chosen, dtype=x.dtype, device=device)
    run = partial(moe, x, experts, shares, weights, "silu", workspace=room)

    def dense(dtype: torch.dtype) -> list[torch.Tensor]:
        parts = (weights.gate, weights.up, weights.down)
        return [weight_matrix(part).to(dtype).unflatten(0, (count, -1)) for part in parts]

    def loop(matrices: list[torch.Tensor], rows_in: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(rows_in)
        for number in torch.unique(experts).tolist():
            tokens, place = (experts == number).nonzero(as_tuple=True)
            gate, up, down = (matrix[number] for matrix in matrices)
            mine = rows_in[tokens]
            mixed = (functional.silu(mine @ gate.T) * (mine @ up.T)) @ down.T
            total.index_add_(0, tokens, mixed * shares[tokens, place, None].to(mixed.dtype))
        return total

    def error() -> float:
        few = slice(0, 64)
        exact = loop(dense(torch.float64), x.double())
        return worst(run()[few], exact[few], _ALLOWED)

    return Work(run=run, baseline=partial(loop, dense(x.dtype), x), error=error)


def _routing(rows: int, count: int, chosen: int) -> Case:
    def make(device: torch.device) -> Work:
        logits = torch.randn(rows, count, device=device).to(half_type(device))

        def baseline() -> object:
            return logits.float().softmax(-1).topk(chosen)

        return Work(run=partial(route, logits, chosen=chosen, normalised=True), baseline=baseline)

    return Case(
        name=f"route {rows}, {chosen} of {count}",
        make=make,
        bytes_moved=rows * (2 * count + 8 * chosen),
        baseline="torch softmax and topk",
    )
