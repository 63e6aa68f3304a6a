"""How the products are compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.linear.dequantise import dequantise_kernel
from tidegate.kernels.linear.few import few_kernel
from tidegate.kernels.linear.plan import DENSE_STEP
from tidegate.kernels.linear.products import dense_kernel, tiled_kernel
from tidegate.kernels.linear.rows import rows_kernel
from tidegate.kernels.linear.w8a8 import quantise_kernel, w8a8_kernel
from tidegate.kernels.variant import Variant

_ANY = Gpu(name="any", processors=132)
_TILES = {"values": "*i32", "scales": "*i32", "zeros": "*i32"}
_SIZES = {"tokens": "i32", "inputs": "i32", "outputs": "i32"}
_STRIDES = {"x_stride": "i32", "out_stride": "i32"}
_WORKSPACE = {"partial": "*fp32", "arrived": "*i32"}


def _tiled(
    dtype: str,
    tokens: int,
    *,
    bits: int = 4,
    step: int = 128,
    symmetric: bool = True,
    apart: bool = True,
) -> Variant:
    launch = launch_for("linear", "tiled", _ANY, tokens=tokens)
    packing = f"{bits} bits {step}{'' if symmetric else ' with zero-points'}"
    pointers = {"x": f"*{dtype}", **_TILES, "out": f"*{dtype}", **_WORKSPACE}
    if symmetric:
        del pointers["zeros"]
    return Variant(
        name=f"tiled {dtype} {tokens} {packing}{'' if apart else ', splits in turn'}",
        kernel=tiled_kernel,
        signature={**pointers, **_SIZES, "steps": "i32", **_STRIDES},
        constexprs={
            "bias": None,
            **({"zeros": None} if symmetric else {}),
            "TILES": launch["tiles"],
            "TOKENS": launch["tokens"],
            "STEP": step,
            "BITS": bits,
            "SYMMETRIC": symmetric,
            "HAS_BIAS": False,
            "EVEN": True,
            "SPLITS": 8,
            "APART": apart,
            "STAGES": launch["num_stages"],
        },
        num_warps=launch["num_warps"],
        dot=True,
        divisible=("inputs", "outputs", *_STRIDES),
    )


def _few(dtype: str, tokens: int, *, bits: int = 4, step: int = 128, symmetric: bool) -> Variant:
    launch = launch_for("linear", "few", _ANY, tokens=tokens, step=step * bits // 4)
    pointers = {"x": f"*{dtype}", **_TILES, "out": f"*{dtype}"}
    if symmetric:
        del pointers["zeros"]
    return Variant(
        name=f"few {dtype} {tokens} {bits} bits {step}{'' if symmetric else ' with zero-points'}",
        kernel=few_kernel,
        signature={**pointers, **_SIZES, "steps": "i32", **_STRIDES},
        constexprs={
            "bias": None,
            **({"zeros": None} if symmetric else {}),
            "ABREAST": launch["num_warps"],
            "TOKENS": launch["tokens"],
            "STEP": step,
            "BITS": bits,
            "SYMMETRIC": symmetric,
            "HAS_BIAS": False,
            "EVEN": True,
            "STAGES": launch["num_stages"],
        },
        num_warps=launch["num_warps"],
        dot=True,
        divisible=("inputs", "outputs", *_STRIDES),
    )


def _dense(dtype: str, tokens: int, *, apart: bool) -> Variant:
    launch = launch_for("linear", "dense", _ANY, tokens=tokens)
    pointers = dict.fromkeys(("x", "weight", "out"), f"*{dtype}")
    return Variant(
        name=f"dense {dtype} {tokens}{'' if apart else ', splits in turn'}",
        kernel=dense_kernel,
        signature={**pointers, **_WORKSPACE, **_SIZES, **_STRIDES, "weight_stride": "i32"},
        constexprs={
            "bias": None,
            "TILES": launch["tiles"],
            "TOKENS": launch["tokens"],
            "STEP": DENSE_STEP,
            "HAS_BIAS": False,
            "SPLITS": 4,
            "APART": apart,
            "STAGES": launch["num_stages"],
        },
        num_warps=launch["num_warps"],
        dot=True,
        divisible=("inputs", "outputs", *_STRIDES, "weight_stride"),
    )


def _w8a8(tokens: int, *, shifted: bool, apart: bool) -> Variant:
    launch = launch_for("linear", "int8", _ANY, tokens=tokens)
    pointers = {"rows": "*i8", "row_scales": "*fp32", "values": "*i8", "scales": "*fp32"}
    shift = {"shifts": "*fp32"} if shifted else {}
    sizes = dict.fromkeys(("tokens", "padded", "outputs", "out_stride"), "i32")
    return Variant(
        name=f"w8a8 bf16 {tokens}{' with zero-points' if shifted else ''}"
        f"{'' if apart else ', splits in turn'}",
        kernel=w8a8_kernel,
        signature={**pointers, **shift, "out": "*bf16", **_WORKSPACE, **sizes},
        constexprs={
            "bias": None,
            **({} if shifted else {"shifts": None}),
            "TILES": launch["tiles"],
            "TOKENS": launch["tokens"],
            "STEP": 128,
            "SHIFTED": shifted,
            "HAS_BIAS": False,
            "SPLITS": 4,
            "APART": apart,
            "STAGES": launch["num_stages"],
        },
        num_warps=launch["num_warps"],
        dot=True,
        divisible=("padded", "outputs", "out_stride"),
    )


_QUANTISE = Variant(
    name="quantise bf16 4096",
    kernel=quantise_kernel,
    signature={
        "x": "*bf16",
        "out": "*i8",
        "scales": "*fp32",
        **dict.fromkeys(("inputs", "padded", "x_stride"), "i32"),
    },
    constexprs={"BLOCK": 4096},
    divisible=("inputs", "padded", "x_stride"),
)


def _dequantise(dtype: str, bits: int) -> Variant:
    return Variant(
        name=f"dequantise {dtype} {bits} bits",
        kernel=dequantise_kernel,
        signature={**_TILES, "out": f"*{dtype}", "steps": "i32", "inputs": "i32", "outputs": "i32"},
        constexprs={"STEP": 128, "BITS": bits, "SYMMETRIC": False},
        divisible=("inputs", "outputs"),
    )


_ROWS = Variant(
    name="rows bf16 4 bits",
    kernel=rows_kernel,
    signature={
        "values": "*i32",
        "scales": "*fp16",
        "tokens": "*i32",
        "out": "*bf16",
        **dict.fromkeys(("steps", "inputs", "out_stride"), "i32"),
    },
    constexprs={"zeros": None, "STEP": 128, "BITS": 4, "SYMMETRIC": True},
    num_warps=1,
    divisible=("inputs", "out_stride"),
)

COMPILED = (
    _few("bf16", 1, symmetric=True),
    _few("fp16", 4, step=64, symmetric=False),
    _few("bf16", 4, bits=8, symmetric=True),
    _tiled("bf16", 16),
    _tiled("bf16", 16, step=64, symmetric=False),
    _tiled("bf16", 32, step=32),
    _tiled("fp16", 16, symmetric=False),
    _tiled("bf16", 16, bits=8),
    _tiled("bf16", 256),
    _tiled("fp16", 256, bits=8, step=64),
    _tiled("bf16", 256, symmetric=False, apart=False),
    _tiled("bf16", 256, bits=8, symmetric=False, apart=False),
    _dense("bf16", 16, apart=True),
    _dense("bf16", 256, apart=True),
    _dense("bf16", 256, apart=False),
    _dequantise("bf16", 4),
    _w8a8(16, shifted=False, apart=True),
    _w8a8(256, shifted=False, apart=False),
    _w8a8(256, shifted=True, apart=False),
    _w8a8(256, shifted=True, apart=True),
    _QUANTISE,
    _ROWS,
)
