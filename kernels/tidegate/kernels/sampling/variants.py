"""How the sampling kernels are compiled in production; see `tidegate.kernels.variant`."""

from __future__ import annotations

import math

import triton

from tidegate.kernels.launch import Gpu, launch_for
from tidegate.kernels.sampling.draw import draw_tokens, weigh_tiles
from tidegate.kernels.sampling.peaks import edit_rows, find_peaks, settle_rows
from tidegate.kernels.sampling.search import search
from tidegate.kernels.variant import Variant

_ANY = Gpu(name="any", processors=132)
_VOCAB = 151936
_TYPES = {
    "logits": "*fp32",
    "masks": "*i32",
    "numbers": "*fp64",
    "integers": "*i32",
    "starts": "*i32",
    "edits": "*i32",
    "saved": "*fp32",
    "part_peaks": "*fp32",
    "tile_peaks": "*fp32",
    "tile_tokens": "*i32",
    "peaks": "*fp32",
    "tokens": "*i32",
    "partials": "*i64",
    "states": "*i64",
    "firsts": "*i64",
    "cuts": "*i64",
    "tile_weights": "*i64",
    "tile_ties": "*i32",
    "vocab": "i32",
    "stride": "i64",
    "words": "i32",
    "parts": "i32",
    "launch": "i32",
}


def _constants(part: int, parts: int, levels: int) -> dict[str, int]:
    tiles = -(-_VOCAB // (part * parts))
    return {
        "BLOCK": launch_for("sampling", "peaks", _ANY)["edits"],
        "PART": part,
        "PARTS": parts,
        "LEVELS": levels,
        "LAUNCHES": math.ceil(32 / math.log2(levels)),
        "TILE_COUNT": tiles,
        "TILES": triton.next_power_of_2(tiles),
        "TILE": part * parts,
    }


def _variant(name: str, kernel: object, launch: str, *, masked: bool, **constants: int) -> Variant:
    row = launch_for("sampling", "search", _ANY)
    known = _constants(row["part"], row["parts"], row["levels"]) | constants
    names: list[str] = kernel.arg_names  # type: ignore[attr-defined]
    absent = set() if masked else {"masks", "starts", "edits"}
    return Variant(
        name=f"{name}{' masked' if masked else ''}",
        kernel=kernel,
        signature={one: _TYPES[one] for one in names if one in _TYPES and one not in absent},
        constexprs={one: known[one] for one in names if one in known}
        | dict.fromkeys(absent & set(names)),
        num_warps=launch_for("sampling", launch, _ANY)["num_warps"],
        divisible=("vocab", "stride"),
    )


COMPILED = (
    _variant("edit_rows", edit_rows, "peaks", masked=True),
    *(
        variant
        for masked in (False, True)
        for variant in (
            _variant("find_peaks", find_peaks, "peaks", masked=masked),
            _variant("settle_rows", settle_rows, "peaks", masked=masked),
            _variant("search", search, "search", masked=masked, SECOND=0),
            _variant("second search", search, "search", masked=masked, SECOND=1),
            _variant("weigh_tiles twice", weigh_tiles, "search", masked=masked, SEARCHES=2),
            _variant("draw_tokens", draw_tokens, "draw", masked=masked),
        )
    ),
)
