"""Kernels that touch every value once: how near they come to a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernels.case import Bar, Case, Work, half_type, worst
from torch.nn import functional

from tidegate.kernels import pointwise

_BF16_ROUNDING = 2**-8


def cases(quick: bool) -> Iterator[Case]:
    """Norms of the widths of 0.6B to 70B models, at prefill and at decode sizes."""
    shapes = [(3, 96)] if quick else [(16384, 4096), (8192, 8192), (4096, 16384), (256, 4096)]
    for rows, width in shapes:
        for fused in (False, True):
            yield _norm(rows, width, fused=fused)
    for rows, inner in [(3, 96)] if quick else [(8192, 14336), (256, 14336)]:
        yield _gated(rows, inner)
    for tokens in (4,) if quick else (8192,):
        yield _embedded(tokens, *((50, 64) if quick else (151936, 4096)))


def _norm(rows: int, width: int, *, fused: bool) -> Case:
    values = rows * width * 2
    large = values >= 64 * 2**20
    return Case(
        name=f"rms_norm bf16 {rows}x{width}{' with residual' if fused else ''}",
        make=partial(_norm_work, rows, width, fused),
        bytes_moved=values * (4 if fused else 2),
        baseline="torch add and rms_norm" if fused else "torch rms_norm",
        bars=(Bar(kind="copy", at_least=0.95),) if large else (),
    )


def _norm_work(rows: int, width: int, fused: bool, device: torch.device) -> Work:
    x, stream = (_drawn(rows, width, device, seed) for seed in (0, 1))
    weight = _drawn(1, width, device, 2)[0]
    out, total = torch.empty_like(x), torch.empty_like(x)

    def run() -> object:
        residual = stream if fused else None
        return pointwise.rms_norm(x, weight, 1e-6, residual=residual, out=out)

    def baseline() -> object:
        source = torch.add(x, stream, out=total) if fused else x
        return functional.rms_norm(source, (width,), weight, 1e-6)

    def error() -> float:
        residual = stream.clone() if fused else None
        normed, _ = pointwise.rms_norm(x, weight, 1e-6, residual=residual)
        exact = ((x.float() + stream.float()).to(x.dtype) if fused else x).double()
        scale = (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return worst(normed, exact * scale * weight.double(), _BF16_ROUNDING)

    return Work(run=run, baseline=baseline, error=error)


def _gated(rows: int, inner: int) -> Case:
    values = rows * inner * 2
    return Case(
        name=f"gated_activation silu bf16 {rows}x{inner}",
        make=partial(_gated_work, rows, inner),
        bytes_moved=values * 3,
        baseline="torch silu and multiplication",
        bars=(Bar(kind="copy", at_least=0.95),) if values >= 64 * 2**20 else (),
    )


def _gated_work(rows: int, inner: int, device: torch.device) -> Work:
    gate_up = _drawn(rows, 2 * inner, device, 0)
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=device)
    gate, up = gate_up.chunk(2, dim=-1)

    def error() -> float:
        exact = functional.silu(gate.double()) * up.double()
        return worst(pointwise.gated_activation(gate_up, "silu"), exact, _BF16_ROUNDING)

    return Work(
        run=lambda: pointwise.gated_activation(gate_up, "silu", out=out),
        baseline=lambda: torch.mul(functional.silu(gate), up, out=out),
        error=error,
    )


def _embedded(tokens: int, vocab: int, width: int) -> Case:
    group_size = 32
    read = width // 2 + width // group_size * 3
    return Case(
        name=f"embed_rows 4 bits of {vocab}x{width}, {tokens} tokens",
        make=partial(_embedded_work, tokens, vocab, width, group_size),
        bytes_moved=tokens * (read + width * 2),
        baseline="torch embedding of a bf16 table",
    )


def _embedded_work(
    tokens: int, vocab: int, width: int, group_size: int, device: torch.device
) -> Work:
    table = pointwise.PackedTable(
        values=torch.randint(0, 256, (vocab, width // 2), dtype=torch.uint8, device=device),
        scales=torch.rand(vocab, width // group_size, device=device).half(),
        zeros=torch.randint(0, 16, (vocab, width // group_size), dtype=torch.uint8, device=device),
        width=width,
        bits=4,
        group_size=group_size,
    )
    ids = torch.randint(0, vocab, (tokens,), dtype=torch.int32, device=device)
    dense = torch.empty(vocab, width, dtype=half_type(device), device=device)
    out = torch.empty(tokens, width, dtype=dense.dtype, device=device)
    return Work(
        run=lambda: pointwise.embed_rows(table, ids, out=out),
        baseline=lambda: functional.embedding(ids, dense),
        error=lambda: worst(
            pointwise.embed_rows(table, ids, out=out), table.rows(ids).double(), _BF16_ROUNDING
        ),
    )


def _drawn(rows: int, width: int, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, width, generator=generator, device=device).to(half_type(device))
