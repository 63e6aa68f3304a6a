"""How the pointwise kernels are compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

import triton

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.pointwise.elementwise import adjust_values, gate_rows
from tidegate.kernels.pointwise.norm import norm_long_rows, norm_rows
from tidegate.kernels.pointwise.rows import copy_rows, unpack_rows
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


def _gate(dtype: str, act: str) -> Variant:
    launch = launch_for("pointwise", "gated_activation", _ANY)
    strides = ("gate_up_stride", "out_stride")
    return Variant(
        name=f"gated_activation {dtype} {act}",
        kernel=gate_rows,
        signature={"gate_up": f"*{dtype}", "out": f"*{dtype}", "inner": "i32"}
        | dict.fromkeys(strides, "i64"),
        constexprs={"ACT": act, "BLOCK": launch["values_per_program"]},
        num_warps=launch["num_warps"],
        divisible=("inner", *strides),
    )


def _adjust(dtype: str) -> Variant:
    launch = launch_for("pointwise", "adjust", _ANY)
    numbers = dict.fromkeys(("factor", "limit", "cap"), "fp32")
    return Variant(
        name=f"adjust {dtype}",
        kernel=adjust_values,
        signature={"x": f"*{dtype}", "out": f"*{dtype}", "count": "i64", **numbers},
        constexprs={"LIMITED": True, "CAPPED": True, "BLOCK": launch["values_per_program"]},
        num_warps=launch["num_warps"],
    )


def _rows(dtype: str, bits: int | None) -> Variant:
    launch = launch_for("pointwise", "embed_rows", _ANY)
    signature = {"rows": "*i32", "out": f"*{dtype}", "factor": "fp32", "out_stride": "i64"}
    constants: dict[str, int] = {"WIDTH": 4096, "BLOCK": launch["values_per_program"]}
    if bits is None:
        signature |= {"table": f"*{dtype}", "table_stride": "i64"}
        constants |= {"SCALED": 1}
    else:
        signature |= {"values": "*u8", "scales": "*fp16", "zeros": "*u8"}
        constants |= {"GROUPS": 32, "GROUP_SIZE": 128, "BITS": bits}
    return Variant(
        name=f"embed_rows {dtype} {bits or 'dense'}",
        kernel=copy_rows if bits is None else unpack_rows,
        signature=signature,
        constexprs=constants,
        num_warps=launch["num_warps"],
        divisible=("out_stride", "table_stride") if bits is None else ("out_stride",),
    )


COMPILED = (
    _norm("bf16", 128, fused=False),
    _norm("bf16", 4096, fused=True),
    _norm("fp16", 5120, fused=True),
    _norm("bf16", 16384, fused=True),
    _norm("bf16", 20480, fused=True),
    _norm("bf16", 20480, fused=False),
    *(_gate("bf16", act) for act in ("silu", "gelu", "gelu_tanh", "relu")),
    _gate("fp16", "silu"),
    _adjust("bf16"),
    _adjust("fp32"),
    *(_rows("bf16", bits) for bits in (None, 4, 8)),
)
