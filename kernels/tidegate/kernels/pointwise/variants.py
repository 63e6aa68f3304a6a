"""How the pointwise kernels are compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

import triton

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.pointwise.norm import norm_long_rows, norm_rows
from tidegate.kernels.variant import Variant

_ANY = Gpu(name="any", processors=132)
_STRIDES = ("x_stride", "residual_stride", "out_stride")


def _norm(dtype: str, size: int, *, fused: bool) -> Variant:
    launch = launch_for("pointwise", "rms_norm", _ANY, columns=size)
    pointers = {"x": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{dtype}"}
    if fused:
        pointers["residual"] = f"*{dtype}"
    block, values = triton.next_power_of_2(size), launch["values_per_program"]
    long = size > values
    constants = {"BLOCK": values} if long else {"BLOCK": block, "RUNS": max(1, values // block)}
    numbers = {"runs_per_row": "i32", **dict.fromkeys(_STRIDES, "i64"), "eps": "fp32"}
    return Variant(
        name=f"rms_norm {dtype} {size}{' with residual' if fused else ''}",
        kernel=norm_long_rows if long else norm_rows,
        signature=pointers | numbers | ({} if long else {"runs": "i32"}),
        constexprs={"SIZE": size, **constants, **({} if fused else {"residual": None})},
        num_warps=launch["num_warps"],
        divisible=_STRIDES,
    )


COMPILED = (
    _norm("bf16", 128, fused=False),
    _norm("bf16", 4096, fused=True),
    _norm("fp16", 5120, fused=True),
    _norm("bf16", 16384, fused=True),
    _norm("bf16", 20480, fused=True),
    _norm("bf16", 20480, fused=False),
)
