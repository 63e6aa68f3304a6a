"""A token per row of a large vocabulary: microseconds, beside torch's sort and multinomial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from kernels.case import Case, Work

from tidegate.kernels import sampling
from tidegate.kernels.sampling import Column, Depth, SamplingAsks, SamplingWorkspace, reference

VOCAB = 151936
TOP_K, TOP_P, TEMPERATURE = 20, 0.95, 0.6
"""What Qwen3's cards recommend."""


def cases(quick: bool) -> Iterator[Case]:
    """Every depth, for one row and for many."""
    for rows in (2,) if quick else (1, 32, 256):
        for depth in Depth:
            vocab = 300 if quick else VOCAB
            yield Case(
                name=f"{depth.name.lower()}, {rows} rows of {vocab}",
                make=partial(_work, rows, vocab, depth),
                bytes_moved=rows * vocab * 4,
                baseline="torch argmax" if depth == Depth.GREEDY else "torch sort and multinomial",
            )


def _work(rows: int, vocab: int, depth: Depth, device: torch.device) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator, device=device) * 4
    asks = _asks(rows, depth, device)
    space = SamplingWorkspace.allocate(rows=rows, vocab=vocab, edits=0, device=device)
    out = torch.empty(rows, dtype=torch.int32, device=device)

    def error() -> float:
        found = sampling.sample(logits, asks, out=out, workspace=space)
        different = int((found != reference.sample(logits, asks)).sum())
        # A draw on the border between two tokens may go either way in float32; that is rare.
        allowed = rows // 128
        return different / allowed if allowed else 2.0 * different

    return Work(
        run=lambda: sampling.sample(logits, asks, out=out, workspace=space),
        baseline=_baseline(logits, depth),
        error=error,
    )


def _asks(rows: int, depth: Depth, device: torch.device) -> SamplingAsks:
    numbers = torch.zeros(rows, sampling.asks.NUMBERS, dtype=torch.float64)
    numbers[:, Column.TEMPERATURE] = 0 if depth == Depth.GREEDY else TEMPERATURE
    numbers[:, Column.TOP_P] = TOP_P if depth >= Depth.CUT else 1
    numbers[:, Column.UNIFORM] = torch.linspace(0.001, 0.999, rows)
    numbers[:, Column.REPETITION] = 1
    integers = torch.zeros(rows, 2, dtype=torch.int32)
    integers[:, 0] = TOP_K if depth == Depth.CUT_TWICE else 0
    return SamplingAsks(numbers=numbers.to(device), integers=integers.to(device), depth=depth)


def _baseline(logits: torch.Tensor, depth: Depth) -> Callable[[], object]:
    def drawn() -> object:
        scaled, ids = (logits / TEMPERATURE).sort(dim=-1, descending=True)
        if depth == Depth.CUT_TWICE:
            scaled[:, TOP_K:] = -torch.inf
        shares = scaled.softmax(dim=-1)
        if depth >= Depth.CUT:
            shares[shares.cumsum(dim=-1) - shares > TOP_P] = 0
        return ids.gather(1, shares.multinomial(1))

    return (lambda: logits.argmax(dim=-1)) if depth == Depth.GREEDY else drawn
