"""Round to nearest, with a search for the span of each group that errs least; looks at no data.

Without this pass, what no pass has packed is rounded over the groups' whole span.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.converters.passes.base import Block, BlockData, BlockPass
from tidegate.converters.rounding.packing import pack
from tidegate.model.packed import DenseLinear, LowRankLinear
from tidegate.model.recipe import matches
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = False
PACKS = True
PACKS = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to round."""

    clip: bool = True
    """Search each group's span for the least squared error; several times as slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rtn:
    """Packs the dense weights of the roles that match."""

    options: Options
    match: tuple[str, ...]

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `tidegate.converters.passes.base.BlockPass`."""
        for role, linear in block.linears.items():
            if isinstance(linear, DenseLinear | LowRankLinear) and matches(role, self.match):
                pending = pack(role, linear, block.formats[role], clip=self.options.clip)
                block.linears[role] = pending.make()


def make(options: Options, match: tuple[str, ...]) -> BlockPass:
    """The pass for the roles that match."""
    return Rtn(options=options, match=match)
