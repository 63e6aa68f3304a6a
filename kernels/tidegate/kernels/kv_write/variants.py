"""How the cache write is compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

from tidegate.kernels.kv_write.launch import tile_of
from tidegate.kernels.kv_write.write import write
from tidegate.kernels.variant import Variant

_STRIDES = ("q_stride", "k_stride", "v_stride", "out_stride")


def _write(
    dtype: str = "bf16",
    kept: str | None = None,
    *,
    heads: int = 32,
    head_size: int = 128,
    rotated: int = 128,
    norm: str = "none",
    clip: bool = False,
) -> Variant:
    kept = kept or dtype
    row = norm == "row"
    columns, tile_heads, warps = tile_of(heads, 8, head_size, whole_row=row)
    types = dict.fromkeys(("q_at", "k_at", "v_at", "out_at"), f"*{dtype}")
    types |= {"keys_at": f"*{kept}", "values_at": f"*{kept}", "positions": "*i32"}
    types |= {"places": "*i64", **dict.fromkeys((*_STRIDES, "heads", "kv_heads"), "i32")}
    optional = {
        "key_scales": ("*fp32", kept != dtype),
        "value_scales": ("*fp32", kept != dtype),
        "q_norm": ("*fp32", norm != "none"),
        "k_norm": ("*fp32", norm != "none"),
        "cos_at": ("*fp32", rotated > 0),
        "sin_at": ("*fp32", rotated > 0),
        "clip": ("fp32", clip),
    }
    types |= {name: kind for name, (kind, there) in optional.items() if there}
    return Variant(
        name=f"write {dtype} {kept} {heads}x{head_size} rotated {rotated} norm {norm} {clip}",
        kernel=write,
        signature=types | {"eps": "fp32"},
        constexprs={
            **{name: None for name, (_, there) in optional.items() if not there},
            "HEAD_SIZE": head_size,
            "HALF": rotated // 2,
            "BLOCK_TOKENS": 128,
            "TILE_HEADS": tile_heads,
            "BLOCK_H": columns,
            "Q_ROW": row,
            "K_ROW": row,
        },
        num_warps=warps,
        divisible=_STRIDES,
        architectures=(90,) if kept == "fp8e4nv" else (80, 90),
    )


COMPILED = (
    _write(),
    _write(norm="head"),
    _write("fp16", norm="head"),
    _write("bf16", "i8", norm="head"),
    _write("bf16", "fp8e4nv", norm="head"),
    _write(heads=40, norm="row", clip=True),
    _write(head_size=64, rotated=0),
    _write(head_size=80, rotated=32),
    _write(head_size=256, rotated=256, norm="head"),
)
