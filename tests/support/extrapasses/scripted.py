"""A pass that does what a test wrote down as a function; found as every pass is.

Put this folder on the path of `tidegate.converters.passes`, and `scripted(function)` in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from tidegate.converters.passes.base import Block, BlockData, BlockPass
from tidegate.model.recipe import PassSpec
from tidegate.model.registry import AnyArchitecture

NEEDS_DATA = False

Work = Callable[[Block, BlockData | None], None]

_WORKS: list[Work] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Which function, and whether it looks at data."""

    number: int = 0
    data: bool = False

    @property
    def needs_data(self) -> bool:
        """See `tidegate.converters.passes.base.needs_data`."""
        return self.data


@dataclass(frozen=True, kw_only=True, slots=True)
class Scripted:
    """Hands each block to the function."""

    options: Options

    def apply(self, block: Block, arch: AnyArchitecture, data: BlockData | None) -> None:
        """See `BlockPass`."""
        assert (data is not None) == self.options.data
        _WORKS[self.options.number](block, data)


def make(options: Options, match: tuple[str, ...]) -> BlockPass:
    """The pass."""
    return Scripted(options=options)


def scripted(work: Work, *, match: tuple[str, ...] = ("*",), data: bool = False) -> PassSpec:
    """A step of a recipe that does `work` on every block."""
    _WORKS.append(work)
    options = Options(number=len(_WORKS) - 1, data=data)
    return PassSpec(kind="scripted", match=match, options=asdict(options))
