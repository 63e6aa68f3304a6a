"""How the attention kernels are compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

from tidegate.kernels.attention.decode import combine, decode
from tidegate.kernels.attention.in_order import attend, join
from tidegate.kernels.attention.launch import COMBINED_AT_ONCE
from tidegate.kernels.attention.plan import (
    SEGMENT,
    SHORT,
    Shape,
    decode_tile,
    ordered_tile,
    power_of_two,
    prefill_tile,
)
from tidegate.kernels.attention.prefill import prefill
from tidegate.kernels.launch import Gpu
from tidegate.kernels.variant import Variant

_HOPPER = Gpu(name="NVIDIA H200", processors=132)
_ANY = Gpu(name="any", processors=108)
_ON_HOPPER = (90,)
_EVERYWHERE = (80, 90)
_BYTES = {"bf16": 2, "fp16": 2, "i8": 1, "fp8e4nv": 1}
_TYPES = {
    "starts": "*i32",
    "lengths": "*i32",
    "blocks": "*i32",
    "q_stride": "i32",
    "blocks_stride": "i32",
    "kv_heads": "i32",
    "factor": "fp32",
}
_OPTIONAL = {
    "key_scales": "*fp32",
    "value_scales": "*fp32",
    "sinks": "*fp32",
    "window": "i32",
    "cap": "fp32",
}


def _shape(dtype: str, kept: str, head_size: int, share: int) -> Shape:
    return Shape(
        heads=8 * share,
        kv_heads=8,
        head_size=head_size,
        query_bytes=_BYTES[dtype],
        kv_bytes=_BYTES[kept],
    )


def _types(dtype: str, kept: str, features: str) -> tuple[dict[str, str], dict[str, object]]:
    """What both kernels take: types of what is there, None for what is not."""
    there = set(features.split()) | ({"key_scales", "value_scales"} if kept != dtype else set())
    pointers = {"q_at": dtype, "out_at": dtype, "keys_at": kept, "values_at": kept}
    types = _TYPES | {name: f"*{stored}" for name, stored in pointers.items()}
    types |= {name: _OPTIONAL[name] for name in there}
    return types, dict.fromkeys(_OPTIONAL.keys() - there)


def _prefill(
    gpu: Gpu,
    dtype: str = "bf16",
    kept: str | None = None,
    *,
    head_size: int = 128,
    block_tokens: int = 128,
    features: str = "",
) -> Variant:
    kept = kept or dtype
    shape = _shape(dtype, kept, head_size, 4)
    tile = prefill_tile(shape, gpu, windowed="window" in features)
    types, absent = _types(dtype, kept, features)
    return Variant(
        name=f"prefill {gpu.name} {dtype} {kept} {head_size} {block_tokens} {features}".strip(),
        kernel=prefill,
        signature=types | {"requests": "i32"},
        constexprs={
            **absent,
            "SHORT": SHORT,
            "SHARE": shape.share,
            "HEAD_SIZE": head_size,
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_H": shape.columns,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        dot=True,
        divisible=("q_stride",),
        architectures=_ON_HOPPER if gpu is _HOPPER or kept == "fp8e4nv" else _EVERYWHERE,
    )


def _decode(
    dtype: str = "bf16",
    kept: str | None = None,
    *,
    head_size: int = 128,
    block_tokens: int = 128,
    share: int = 4,
    tokens: int = 1,
    segments: bool = True,
    features: str = "",
) -> Variant:
    kept = kept or dtype
    shape = _shape(dtype, kept, head_size, share)
    tile = decode_tile(shape, _ANY, power_of_two(max(16, share * tokens)))
    types, absent = _types(dtype, kept, features)
    between: dict[str, str] = {"parts_at": "*fp32", "logs_at": "*fp32"} if segments else {}
    kind = "segments" if segments else "whole"
    sizes = f"{head_size} {block_tokens} x{share} {tokens}"
    return Variant(
        name=f"decode {dtype} {kept} {sizes} {kind} {features}".strip(),
        kernel=decode,
        signature=types | between | {"tiles": "i32", "most_tokens": "i32"},
        constexprs={
            **absent,
            **({} if segments else {"parts_at": None, "logs_at": None}),
            "SHORT": SHORT,
            "SHARE": share,
            "HEAD_SIZE": head_size,
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_H": shape.columns,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        dot=True,
        divisible=("q_stride",),
        architectures=_ON_HOPPER if kept == "fp8e4nv" else _EVERYWHERE,
    )


def _combine(dtype: str, head_size: int, features: str = "") -> Variant:
    types, absent = _types(dtype, dtype, features)
    wanted = ("out_at", "starts", "lengths", *features.split())
    counts = dict.fromkeys(("heads", "most_tokens", "segments"), "i32")
    return Variant(
        name=f"combine {dtype} {head_size} {features}".strip(),
        kernel=combine,
        signature={name: types[name] for name in wanted}
        | {"parts_at": "*fp32", "logs_at": "*fp32"}
        | counts,
        constexprs={
            **{name: None for name in ("sinks", "window") if name in absent},
            "SHORT": SHORT,
            "TILE_TOKENS": 4,
            "HEAD_SIZE": head_size,
            "BLOCK_N": 64,
            "BLOCK_H": power_of_two(head_size),
            "BLOCK_S": COMBINED_AT_ONCE,
        },
    )


def _in_order(
    gpu: Gpu,
    dtype: str = "bf16",
    kept: str | None = None,
    *,
    head_size: int = 128,
    block_tokens: int = 16,
    share: int = 4,
    features: str = "",
) -> Variant:
    kept = kept or dtype
    shape = _shape(dtype, kept, head_size, share)
    tile = ordered_tile(shape, gpu)
    types, absent = _types(dtype, kept, features)
    between = {"parts_at": "*fp32", "logs_at": "*fp32"}
    counts = dict.fromkeys(("requests", "least_tokens", "most_tokens"), "i32")
    sizes = f"{head_size} {block_tokens} x{share}"
    return Variant(
        name=f"in order {gpu.name} {dtype} {kept} {sizes} {features}".strip(),
        kernel=attend,
        signature=types | between | counts,
        constexprs={
            **absent,
            "SEGMENT": SEGMENT,
            "SHARE": share,
            "HEAD_SIZE": head_size,
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_H": shape.columns,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        dot=True,
        divisible=("q_stride",),
        architectures=_ON_HOPPER if gpu is _HOPPER or kept == "fp8e4nv" else _EVERYWHERE,
    )


def _join(dtype: str, head_size: int, features: str = "") -> Variant:
    combined = _combine(dtype, head_size, features)
    others = ("SHORT", "BLOCK_S")
    kept = {name: one for name, one in combined.constexprs.items() if name not in others}
    return Variant(
        name=combined.name.replace("combine", "join"),
        kernel=join,
        signature=combined.signature,
        constexprs=kept | {"SEGMENT": SEGMENT},
    )


COMPILED = (
    _prefill(_HOPPER),
    _prefill(_HOPPER, "fp16", block_tokens=16, features="window"),
    _prefill(_HOPPER, "bf16", "i8"),
    _prefill(_HOPPER, "bf16", "fp8e4nv"),
    _prefill(_HOPPER, head_size=64, features="sinks window"),
    _prefill(_HOPPER, head_size=80),
    _prefill(_HOPPER, head_size=256, features="cap window"),
    _prefill(_ANY),
    _prefill(_ANY, "fp16", "i8", block_tokens=16, features="window"),
    _prefill(_ANY, head_size=256, features="cap window"),
    _decode(),
    _decode(segments=False),
    _decode("fp16", block_tokens=16, features="window"),
    _decode(tokens=8),
    _decode("bf16", "i8"),
    _decode("fp16", "i8", block_tokens=16),
    _decode("bf16", "fp8e4nv"),
    _decode(head_size=64, share=8, features="sinks window"),
    _decode(head_size=96, share=7),
    _decode(head_size=256, share=2, features="cap window"),
    _decode(share=64),
    _combine("bf16", 128),
    _combine("fp16", 64, "sinks window"),
    _in_order(_HOPPER),
    _in_order(_HOPPER, "fp16", block_tokens=128, features="sinks window"),
    _in_order(_HOPPER, "bf16", "i8"),
    _in_order(_HOPPER, "bf16", "fp8e4nv"),
    _in_order(_ANY),
    _in_order(_ANY, "fp16", "i8", features="sinks window"),
    _in_order(_ANY, head_size=64, share=8, features="window"),
    _in_order(_ANY, head_size=256, share=2, features="cap window"),
    _in_order(_ANY, share=64),
    _in_order(_ANY, share=128),
    _join("bf16", 128),
    _join("fp16", 64, "sinks window"),
)
