"""How the experts' kernels are compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.linear.plan import DENSE_STEP
from tidegate.kernels.moe.few import few_down_kernel, few_gate_up_kernel
from tidegate.kernels.moe.products import combine_kernel, down_kernel, gate_up_kernel
from tidegate.kernels.moe.routing import group_kernel, route_kernel
from tidegate.kernels.variant import Variant

_ANY = Gpu(name="any", processors=132)
_SORTED = {"experts": "*i32", "counts": "*i32", "order": "*i32"}


def _constants(bits: int, pairs_per_expert: int, *, direct: bool, symmetric: bool) -> Variant:
    """Everything but the kernel: what both products share."""
    launch = launch_for("moe", "products", _ANY, pairs_per_expert=pairs_per_expert)
    return Variant(
        name=f"{bits} bits {'direct' if direct else pairs_per_expert}"
        f"{'' if symmetric else ' with zero-points'}",
        kernel=None,
        signature=_SORTED,
        constexprs={
            "COUNT": 128,
            "COUNT_BLOCK": 128,
            "DIRECT": direct,
            "TILES": launch["tiles"],
            "TOKENS": launch["tokens"],
            "STEP": DENSE_STEP if bits == 16 else 128,
            "BITS": bits,
            "SYMMETRIC": symmetric,
            "EVEN": bits != 16,
            "STAGES": launch["num_stages"],
        },
        num_warps=launch["num_warps"],
    )


def _weight(
    name: str, dtype: str, bits: int, *, symmetric: bool
) -> tuple[dict[str, str], set[str]]:
    """Types of one weight's tensors, and which of them are absent."""
    values, scales, zeros = (f"{name}{part}" for part in ("values", "scales", "zeros"))
    if bits == 16:
        return {values: f"*{dtype}"}, {scales, zeros}
    absent = {zeros} if symmetric else set()
    return {one: "*i32" for one in (values, scales, zeros) if one not in absent}, absent


def _gate_up(
    dtype: str, bits: int, pairs: int, *, direct: bool = False, symmetric: bool = True
) -> Variant:
    base = _constants(bits, pairs, direct=direct, symmetric=symmetric)
    gate, no_gate = _weight("gate_", dtype, bits, symmetric=symmetric)
    up, no_up = _weight("up_", dtype, bits, symmetric=symmetric)
    sizes = dict.fromkeys(("x_stride", "width", "rows"), "i32")
    return Variant(
        name=f"gate_up {dtype} {base.name}",
        kernel=gate_up_kernel,
        signature={"x": f"*{dtype}", **_SORTED, **gate, **up, "inner": f"*{dtype}", **sizes},
        constexprs={
            **base.constexprs,
            **dict.fromkeys(no_gate | no_up),
            "CHOSEN": 8,
            "ACT": "silu",
        },
        num_warps=base.num_warps,
        dot=True,
        divisible=("x_stride", "width", "rows"),
    )


def _down(
    dtype: str, bits: int, pairs: int, *, direct: bool = False, symmetric: bool = True
) -> Variant:
    base = _constants(bits, pairs, direct=direct, symmetric=symmetric)
    weight, absent = _weight("", dtype, bits, symmetric=symmetric)
    pointers = {"inner": f"*{dtype}", **_SORTED, **weight, "answers": f"*{dtype}"}
    return Variant(
        name=f"down {dtype} {base.name}",
        kernel=down_kernel,
        signature={**pointers, "inputs": "i32", "width": "i32"},
        constexprs={**base.constexprs, **dict.fromkeys(absent)},
        num_warps=base.num_warps,
        dot=True,
        divisible=("inputs", "width"),
    )


def _few(dtype: str, *, symmetric: bool) -> tuple[Variant, Variant]:
    launch = launch_for("moe", "few", _ANY)
    gate, no_gate = _weight("gate_", dtype, 4, symmetric=symmetric)
    up, no_up = _weight("up_", dtype, 4, symmetric=symmetric)
    down, no_down = _weight("", dtype, 4, symmetric=symmetric)
    shared = {
        "ABREAST": launch["num_warps"],
        "STEP": 128,
        "BITS": 4,
        "SYMMETRIC": symmetric,
        "EVEN": True,
        "STAGES": launch["num_stages"],
    }
    ends = {"x": f"*{dtype}", "experts": "*i32", "inner": f"*{dtype}"}
    sizes = dict.fromkeys(("x_stride", "width", "rows"), "i32")
    gate_up = Variant(
        name=f"few gate_up {dtype}",
        kernel=few_gate_up_kernel,
        signature={**ends, **gate, **up, **sizes},
        constexprs={**shared, **dict.fromkeys(no_gate | no_up), "CHOSEN": 8, "ACT": "silu"},
        num_warps=launch["num_warps"],
        dot=True,
        divisible=tuple(sizes),
    )
    ends = {"inner": f"*{dtype}", "experts": "*i32", "answers": f"*{dtype}"}
    narrow = Variant(
        name=f"few down {dtype}",
        kernel=few_down_kernel,
        signature={**ends, **down, "inputs": "i32", "width": "i32"},
        constexprs={**shared, **dict.fromkeys(no_down), "EVEN": False},
        num_warps=launch["num_warps"],
        dot=True,
        divisible=("inputs", "width"),
    )
    return gate_up, narrow


_ROUTE = Variant(
    name="route bf16 8 of 128",
    kernel=route_kernel,
    signature={"logits": "*bf16", "experts": "*i32", "shares": "*fp32", "stride": "i32"},
    constexprs={"COUNT": 128, "CHOSEN": 8, "NORMALISED": True, "BLOCK": 128, "CHOSEN_BLOCK": 8},
    num_warps=1,
)
_GROUP = Variant(
    name="group 1024",
    kernel=group_kernel,
    signature={"experts": "*i32", "order": "*i32", "counts": "*i32", "pairs": "i32"},
    constexprs={"BLOCK": 1024},
)
_COMBINE = Variant(
    name="combine bf16 8",
    kernel=combine_kernel,
    signature={
        "answers": "*bf16",
        "shares": "*fp32",
        "out": "*bf16",
        "width": "i32",
        "out_stride": "i32",
    },
    constexprs={"CHOSEN": 8, "BLOCK": 1024},
    divisible=("width", "out_stride"),
)

COMPILED = (
    *_few("bf16", symmetric=True),
    *_few("fp16", symmetric=False),
    _gate_up("bf16", 4, 1, direct=True),
    _gate_up("bf16", 4, 16),
    _gate_up("bf16", 4, 64, symmetric=False),
    _gate_up("bf16", 16, 64),
    _down("bf16", 4, 1, direct=True),
    _down("fp16", 4, 64, symmetric=False),
    _down("bf16", 16, 16),
    _ROUTE,
    _GROUP,
    _COMBINE,
)
