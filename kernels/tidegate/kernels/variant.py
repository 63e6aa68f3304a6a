"""`Variant`: one way in which a kernel is compiled for production.

A folder lists its own in `COMPILED` of its `variants.py`; the compile gate builds each for every
supported architecture without a GPU and refuses spills, too much shared memory and dots that do
not reach the tensor cores (`tests/kernels/test_compile_gate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Variant:
    """What `triton.compile` has to know; between them, types and constants name every argument."""

    name: str
    """Unique in its folder, such as `rms_norm bf16 4096`."""
    kernel: object = field(repr=False)
    """The function that `triton.jit` made."""
    signature: Mapping[str, str]
    """Triton's types: `*bf16`, `*fp32`, `*i32`, `i32`, `fp32`. Pointers are 16-byte aligned."""
    constexprs: Mapping[str, object]
    """Constants, `None` for pointers that are absent."""
    num_warps: int = 4
    num_stages: int = 3
    dot: bool = False
    """Whether tensor-core instructions have to be there."""
    divisible: tuple[str, ...] = ()
    """Integers that are multiples of 16 in production, as Triton finds out by itself there."""
    architectures: tuple[int, ...] = (80, 90)
    """What it is for: 90 alone for a row of Hopper's and for fp8, which 80 has no types for."""
