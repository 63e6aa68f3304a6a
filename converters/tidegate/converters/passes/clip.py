"""Round to nearest on a clipped span, which errs least where the calibration's inputs are large.

The search itself is `rounding.clip`; here it gets the mean square of each input. With
`weighted = false` all inputs count alike and no calibration is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.converters.passes.base import Block, BlockData
from tidegate.converters.rounding.block_packing import pack_block, searched
from tidegate.model.packed import DenseLinear, PackedLinear
from tidegate.model.recipe import Format
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = True
PACKS = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to search."""

    weighted: bool = True
    """Weight errors by the mean square of the inputs."""

    @property
    def needs_data(self) -> bool:
        """See `tidegate.converters.passes.base.needs_data`."""
        return self.weighted


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clip:
    options: Options
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass`."""

        def pack(role: str, linear: DenseLinear, wanted: Format) -> PackedLinear:
            return searched(block, role, linear, wanted, data if self.options.weighted else None)

        pack_block(block, self.match, pack)


def make(options: Options, match: tuple[str, ...]) -> _Clip:
    """The pass for the roles that match."""
    return _Clip(options=options, match=match)
