"""`sample`: a token for each row of logits, chosen where they are. `reference` defines it.

Biases, penalties, masks, temperature, min-p, top-k, top-p and one draw, as in
`tidegate.engine.sampling`. Every row is cut into tiles that several programs read at once; nothing
is sorted, no grid depends on numbers of the device, and nothing is allocated where a workspace and
`out` are given, so the whole is captured in a graph. A row's token does not depend on the rows
beside it, nor on how often it is drawn: sums are of integers (`weighing`).

It differs from the reference where float32 does from float64: when the draw falls within about
1e-5 of a weight of the border between two tokens, or top-p and min-p of the border of their sets.
"""

from __future__ import annotations

import torch
import triton

from tidegate.kernels.launch import Launch, gpu_of, launch_for
from tidegate.kernels.sampling.asks import Column, Depth, SamplingAsks
from tidegate.kernels.sampling.draw import draw_tokens, weigh_tiles
from tidegate.kernels.sampling.peaks import edit_rows, find_peaks, settle_rows
from tidegate.kernels.sampling.search import search
from tidegate.kernels.sampling.workspace import SamplingWorkspace

__all__ = ["Column", "Depth", "SamplingAsks", "SamplingWorkspace", "sample"]

Tensor = torch.Tensor

MOST_VOCAB = 2**18
"""So many of the heaviest weights still fit an int64 sum."""


def sample(
    logits: Tensor,
    asks: SamplingAsks,
    *,
    out: Tensor | None = None,
    workspace: SamplingWorkspace | None = None,
) -> Tensor:
    """A token for each row.

    Args:
        logits: float32 [B, V], V at most 2 ** 18, rows contiguous. Edited in place where there
            are edits.
        asks: what the rows want.
        out: int32 [B] for the result.
        workspace: for at least B rows of V tokens; without it one is made.

    Returns:
        int32 [B] token ids; -1 for a row that holds a NaN or plus infinity, or no token to choose.
    """
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32, "edits are exact"
    assert logits.stride(1) == 1, "rows are contiguous"
    assert vocab <= MOST_VOCAB, f"{vocab} tokens: at most {MOST_VOCAB}"
    if out is None:
        out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if workspace is None:
        edits = 0 if asks.edits is None else len(asks.edits)
        workspace = SamplingWorkspace.allocate(
            rows=rows, vocab=vocab, edits=edits, device=logits.device
        )
    assert rows <= workspace.rows, f"{rows} rows: the workspace has {workspace.rows}"
    assert vocab == workspace.vocab, f"{vocab} tokens: the workspace has {workspace.vocab}"
    if rows:
        _likeliest(logits, asks, workspace, out)
        if asks.depth >= Depth.DRAW:
            _drawn(logits, asks, workspace, out)
    return out


def _likeliest(logits: Tensor, asks: SamplingAsks, space: SamplingWorkspace, out: Tensor) -> None:
    rows, vocab = logits.shape
    stride, words = logits.stride(0), _words(asks)
    launch = _launch("peaks", logits)
    if asks.edits is not None:
        edit_rows[(rows,)](
            logits, asks.numbers, asks.starts, asks.edits, space.saved, stride,
            BLOCK=launch["edits"], num_warps=launch["num_warps"],
        )  # fmt: skip
    find_peaks[(rows, space.tiles)](
        logits, asks.masks, asks.integers, space.part_peaks, space.tile_peaks,
        space.tile_tokens, vocab, stride, words,
        PART=space.part, PARTS=space.parts, num_warps=launch["num_warps"],
    )  # fmt: skip
    settle_rows[(rows,)](
        logits, asks.masks, asks.integers, asks.starts, asks.edits, space.saved,
        space.part_peaks, space.tile_peaks, space.tile_tokens, space.peaks, out,
        stride, words, space.tiles * space.parts, TILE_COUNT=space.tiles,
        TILES=triton.next_power_of_2(space.tiles), PART=space.part,
        BLOCK=launch["edits"], num_warps=launch["num_warps"],
    )  # fmt: skip


def _drawn(logits: Tensor, asks: SamplingAsks, space: SamplingWorkspace, out: Tensor) -> None:
    rows, vocab = logits.shape
    searches = max(0, asks.depth - Depth.DRAW)
    stride, words, tiles = logits.stride(0), _words(asks), triton.next_power_of_2(space.tiles)
    warps = _launch("search", logits)["num_warps"]
    for number in range(searches * space.launches):
        search[(rows, space.tiles)](
            logits, asks.masks, asks.numbers, asks.integers, space.peaks, space.part_peaks,
            space.partials, space.states, space.firsts, vocab, stride, words, number,
            LAUNCHES=space.launches, SECOND=number >= space.launches, TILE_COUNT=space.tiles,
            TILES=tiles, PART=space.part, PARTS=space.parts, LEVELS=space.levels,
            num_warps=warps,
        )  # fmt: skip
    weigh_tiles[(rows, space.tiles)](
        logits, asks.masks, asks.numbers, asks.integers, space.peaks, space.part_peaks,
        space.partials, space.states, space.firsts, space.cuts, space.tile_weights,
        space.tile_ties, vocab, stride, words,
        LAUNCHES=space.launches, SEARCHES=searches, TILE_COUNT=space.tiles, TILES=tiles,
        PART=space.part, PARTS=space.parts, LEVELS=space.levels, num_warps=warps,
    )  # fmt: skip
    draw_tokens[(rows,)](
        logits, asks.masks, asks.numbers, asks.integers, space.peaks, space.cuts,
        space.tile_weights, space.tile_ties, out, vocab, stride, words,
        TILE_COUNT=space.tiles, TILES=tiles, TILE=space.part * space.parts,
        num_warps=_launch("draw", logits)["num_warps"],
    )  # fmt: skip


def _launch(kernel: str, logits: Tensor) -> Launch:
    return launch_for("sampling", kernel, gpu_of(logits.device))


def _words(asks: SamplingAsks) -> int:
    return 0 if asks.masks is None else asks.masks.shape[1]
