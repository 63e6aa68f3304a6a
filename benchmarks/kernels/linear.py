"""Linear layers of few and of many tokens, beside torch's product of the same size in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernels.case import Bar, Case, Work, half_type, worst
from torch.nn import functional

from tidegate.kernels.linear import (
    DenseWeight,
    GpuLinear,
    Int8Linear,
    LinearWorkspace,
    TiledLinear,
    apply_linear,
    dequantise,
    w8a8_linear,
)
from tidegate.kernels.linear.reference import weight_matrix
from tidegate.kernels.linear.weights import TILE_ROWS, Bits

_ALLOWED = 2**-7
"""Weights written out and results are rounded to bf16 once each."""
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (16384, 16384))
_ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)


def cases(quick: bool) -> Iterator[Case]:
    """Widths of 8B and 70B models; rows from one request's decode to a prefill."""
    for outputs, inputs in ((130, 256),) if quick else _SHAPES:
        for rows in (1, 17) if quick else _ROWS:
            yield _tiled(rows, outputs, inputs)
    outputs, inputs = (64, 128) if quick else (4096, 4096)
    for rows in (2,) if quick else (1, 16, 128):
        yield _tiled(rows, outputs, inputs, symmetric=False)
        yield _tiled(rows, outputs, inputs, step=64)
        yield _tiled(rows, outputs, inputs, bits=8)
        yield _tiled(rows, outputs, inputs, deterministic=True)
        yield _dense_in_order(rows, outputs, inputs)
    for rows in (3,) if quick else (1, 16, 256, 4096):
        yield _w8a8(rows, outputs, inputs)
    yield _written_out(outputs, inputs)


def _bars(rows: int, outputs: int, inputs: int) -> tuple[Bar, ...]:
    """The issue's: of symmetric 4 bits in groups of 128."""
    least = {(4096, 4096): {1: 2.3, 4: 2.1, 16: 2.1}, (14336, 4096): {1: 2.6, 4: 2.6, 16: 2.6}}
    wanted = 0.9 if rows >= 128 else least.get((outputs, inputs), {}).get(rows)
    return () if wanted is None else (Bar(kind="baseline", at_least=wanted),)


def _tiled(
    rows: int,
    outputs: int,
    inputs: int,
    *,
    bits: Bits = 4,
    step: int = 128,
    symmetric: bool = True,
    deterministic: bool = False,
) -> Case:
    packing = f"w{bits}a16 group {step}{'' if symmetric else ' with zero-points'}"
    as_issued = (bits, step, symmetric, deterministic) == (4, 128, True, False)
    weight_bytes = outputs * inputs * bits // 8 + 2 * outputs * inputs // step

    def make(device: torch.device) -> Work:
        weight = random_tiles(outputs, inputs, device, bits=bits, step=step, symmetric=symmetric)
        return _work(rows, weight, device, deterministic=deterministic)

    return Case(
        name=f"{packing} {rows}x{outputs}x{inputs}{' in one order' if deterministic else ''}",
        make=make,
        bytes_moved=weight_bytes + 2 * rows * (outputs + inputs),
        flops=2 * rows * outputs * inputs,
        baseline="torch linear bf16",
        bars=_bars(rows, outputs, inputs) if as_issued else (),
    )


def _dense_in_order(rows: int, outputs: int, inputs: int) -> Case:
    def make(device: torch.device) -> Work:
        dense = _drawn(outputs, inputs, device) / inputs**0.5
        return _work(rows, DenseWeight(weight=dense), device, deterministic=True)

    return Case(
        name=f"dense bf16 {rows}x{outputs}x{inputs} in one order",
        make=make,
        bytes_moved=2 * (outputs * inputs + rows * (outputs + inputs)),
        flops=2 * rows * outputs * inputs,
        baseline="torch linear bf16",
    )


def _work(rows: int, weight: GpuLinear, device: torch.device, *, deterministic: bool) -> Work:
    x = _drawn(rows, weight.inputs, device)
    out = torch.empty(rows, weight.outputs, dtype=x.dtype, device=device)
    dense = weight_matrix(weight).to(x.dtype)
    workspace = LinearWorkspace.of(
        [weight], most_tokens=rows, dtype=x.dtype, device=device, deterministic=deterministic
    )

    def run() -> object:
        return apply_linear(x, weight, out=out, deterministic=deterministic, workspace=workspace)

    def error() -> float:
        found = run()
        assert isinstance(found, torch.Tensor)
        return worst(found, x.double() @ weight_matrix(weight).double().T, _ALLOWED)

    return Work(run=run, baseline=partial(functional.linear, x, dense), error=error)


def _w8a8(rows: int, outputs: int, inputs: int) -> Case:
    def make(device: torch.device) -> Work:
        values = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, device=device)
        scales = torch.rand(inputs // 128, outputs, device=device) / (64 * inputs**0.5)
        weight = Int8Linear(
            values=values, scales=scales, shifts=None, bias=None, inputs=inputs, step=128
        )
        x = _drawn(rows, inputs, device)
        room = LinearWorkspace.of([weight], most_tokens=rows, dtype=x.dtype, device=device)
        dense = values.to(x.dtype)
        wide = values.view(outputs, -1, 128).double() * scales.T.double()[..., None]

        def error() -> float:
            # Beside bf16: inputs are off by up to 1 / 254 of a token's largest.
            exact = x.double() @ wide.flatten(1).T
            return worst(w8a8_linear(x, weight, workspace=room), exact, 0.03)

        return Work(
            run=partial(w8a8_linear, x, weight, workspace=room),
            baseline=partial(functional.linear, x, dense),
            error=error,
        )

    return Case(
        name=f"w8a8 {rows}x{outputs}x{inputs}",
        make=make,
        bytes_moved=outputs * inputs + 2 * rows * (outputs + inputs),
        flops=2 * rows * outputs * inputs,
        baseline="torch linear bf16",
    )


def _written_out(outputs: int, inputs: int) -> Case:
    def make(device: torch.device) -> Work:
        weight = random_tiles(outputs, inputs, device)
        out = torch.empty(outputs, inputs, dtype=half_type(device), device=device)
        run = partial(dequantise, weight, out.dtype, out=out)
        return Work(run=run, error=lambda: worst(run(), weight_matrix(weight).double(), _ALLOWED))

    return Case(
        name=f"dequantise {outputs}x{inputs}",
        make=make,
        bytes_moved=outputs * inputs * 5 // 2,
    )


def _drawn(rows: int, width: int, device: torch.device) -> torch.Tensor:
    draw = torch.Generator(device).manual_seed(rows)
    return torch.randn(rows, width, generator=draw, device=device).to(half_type(device))


def random_tiles(
    outputs: int,
    inputs: int,
    device: torch.device,
    *,
    bits: Bits = 4,
    step: int = 128,
    symmetric: bool = True,
) -> TiledLinear:
    """Weights of about 1 / sqrt(inputs), drawn where they are used."""
    draw = torch.Generator(device).manual_seed(0)
    tiles, steps = -(-outputs // TILE_ROWS), inputs // step
    shape = (tiles, steps, TILE_ROWS * step * bits // 8)
    stored = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=draw)
    sides = torch.rand(2, tiles, steps, TILE_ROWS, device=device, generator=draw)
    scales = (0.5 + sides[0]) / (2 ** (bits - 2) * inputs**0.5)
    zeros = (sides[1] * 2**bits).floor()
    return TiledLinear(
        values=stored.view(torch.int32),
        scales=scales.half().view(torch.int32),
        zeros=None if symmetric else zeros.half().view(torch.int32),
        bias=None,
        inputs=inputs,
        outputs=outputs,
        bits=bits,
        step=step,
    )
