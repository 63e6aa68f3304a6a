"""The cache write with norm and rotation: how near it comes to a copy of the same bytes.

Shapes are those of Qwen3-8B. What moves: query, key and value read once and written once, angles
of every token read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernels.attention import H, K, N, filled, step_of
from kernels.case import Case, Work, half_type, worst

from tidegate.kernels import kv_write
from tidegate.kernels.kv_write import reference
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.paged_kv import KvPrecision
from tidegate.model.rope import Rope

_ALLOWED = 2**-8


def cases(quick: bool) -> Iterator[Case]:
    """A prefill step, a large decode step and a single token; 16 and 8 bits."""
    for requests, new in ((2, 5), (3, 1)) if quick else ((1, 8192), (256, 1), (1, 1)):
        yield _case(requests, new, "same")
    yield _case(1, 5 if quick else 8192, "int8")


def _case(requests: int, new: int, precision: KvPrecision) -> Case:
    tokens = requests * new
    kept = 2 * H if precision == "same" else H + 4
    moved = tokens * ((2 * N + 2 * K) * H * 2 + 2 * K * kept + H * 4)
    return Case(
        name=f"kv_write {'bf16' if precision == 'same' else precision} {requests} x {new}",
        make=partial(_work, requests, new, precision),
        bytes_moved=moved,
        baseline="the same in torch operations",
    )


def _work(requests: int, new: int, precision: KvPrecision, device: torch.device) -> Work:
    dtype = half_type(device)
    step = step_of([new] * requests, [new + 100] * requests, device)
    kv, kept = (filled(step, precision, dtype) for _ in range(2))
    rope = RopeTables.from_rope(Rope.plain(1e6, H), new + 100, device)
    tokens = requests * new
    fused = torch.randn(tokens, (N + 2 * K) * H, device=device).to(dtype)
    q, k, v = (
        part.view(tokens, -1, H) for part in fused.split_with_sizes([N * H, K * H, K * H], dim=1)
    )
    weight = torch.rand(H, device=device) + 0.5
    out, expected = torch.empty_like(q), torch.empty_like(q)

    def run() -> object:
        return kv_write.write_kv(
            q, k, v, kv, step, rope=rope, q_norm=weight, k_norm=weight, eps=1e-6, out=out
        )

    def baseline() -> object:
        return reference.write_kv(
            q, k, v, kept, step, rope=rope, q_norm=weight, k_norm=weight, eps=1e-6, out=expected
        )

    def error() -> float:
        out.fill_(torch.nan)
        run()
        baseline()
        return worst(out, expected.double(), 2 * _ALLOWED)

    return Work(run=run, baseline=baseline, error=error)
