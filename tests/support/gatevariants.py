"""Kernels that a compile gate must let through, and others that it must not."""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.variant import Variant


@triton.jit  # type: ignore[untyped-decorator]
def _square(
    x: tl.tensor,
    y: tl.tensor,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    rows, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    left = tl.load(x + rows[:, None] * INNER + inner[None, :])
    right = tl.load(x + inner[:, None] * ROWS + rows[None, :])
    product = tl.dot(left, right, input_precision="ieee" if EXACT else "tf32")
    tl.store(y + rows[:, None] * ROWS + rows[None, :], product)


def _of(name: str, types: str, *, warps: int = 4, **constants: int) -> Variant:
    return Variant(
        name=name,
        kernel=_square,
        signature={"x": types, "y": "*fp32"},
        constexprs=constants,
        num_warps=warps,
        dot=True,
    )


COMPILED = (
    _of("good", "*fp16", ROWS=64, INNER=64, EXACT=0),
    _of("no tensor cores", "*fp32", ROWS=16, INNER=16, EXACT=1),
    _of("spills", "*fp16", warps=1, ROWS=128, INNER=16, EXACT=0),
    _of("too much shared memory", "*fp16", warps=4, ROWS=16, INNER=4096, EXACT=0),
    _of("wrong arguments", "*fp32", ROWS=4, DEPTH=4, EXACT=0),
)
