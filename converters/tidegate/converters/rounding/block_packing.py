"""What every pass that packs weights has in common: which ones, in which order, in what format.

Layers that share an input are packed one after another, before anything behind them: what later
layers see is then what the packed ones give, and they make up for some of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.rounding.rtn import quantise
from tidegate.model.packed import Array, DenseLinear, Linear, LowRankLinear, PackedLinear
from tidegate.model.recipe import Format, matches

Pack = Callable[[str, DenseLinear, Format], PackedLinear]
"""Packs the linear layer of a role in a format."""


_STAGES = ({"q", "k", "v"}, {"o"}, {"router", "gate", "up"}, {"down"})
"""Last parts of the roles of a layer, in the order of the walk."""


def pack_block(block: Block, match: tuple[str, ...], pack: Pack) -> None:
    """Replace every linear layer that matches, is not packed yet and has a format of 4 or 8 bits.

    A low-rank layer is left alone, with a note: no data is gathered between its factors.
    """
    roles = [
        role for role in block.linears if block.formats[role].bits != 32 and matches(role, match)
    ]
    for stage in sorted({_stage(role) for role in roles}):
        # Replaced together: the block would run again for each.
        block.linears.update(
            {role: _packed(block, role, pack) for role in roles if _stage(role) == stage}
        )


def _stage(role: str) -> int:
    part = role.rsplit(".", 1)[-1]
    return next((n for n, parts in enumerate(_STAGES) if part in parts), len(_STAGES))


def _packed(block: Block, role: str, pack: Pack) -> Linear:
    linear = block.linears[role]
    if isinstance(linear, LowRankLinear):
        block.notes[role] = "left as it is: no data is gathered between its two factors"
    return pack(role, linear, block.formats[role]) if isinstance(linear, DenseLinear) else linear


def searched(
    block: Block, role: str, linear: DenseLinear, wanted: Format, data: BlockData | None
) -> PackedLinear:
    """Round to nearest on the spans that err least, by the calibration's inputs if there are any.

    A note says so when calibration never reached the layer.
    """
    importance = None
    if data is not None:
        try:
            importance = data.mean_square(role).numpy()
        except LookupError:
            if block.name != "embed":  # whose tables are looked up and have no input
                block.notes[role] = "no calibration token reaches it: all its inputs count alike"
    return nearest(linear, wanted, importance)


def nearest(linear: DenseLinear, wanted: Format, importance: Array | None = None) -> PackedLinear:
    """Round to nearest with the clip search, errors weighted by `importance` [in]."""
    assert wanted.bits != 32
    return quantise(
        linear,
        bits=wanted.bits,
        group_size=wanted.group_size,
        symmetric=wanted.symmetric,
        clip=True,
        importance=None if importance is None else np.maximum(importance, 0),
    )
