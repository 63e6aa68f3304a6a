"""The recipe of plain rounding, and the weights as it makes them, in memory.

`RecipeWeights` is the obvious twin of what `tidegate.converters.driver.pipeline` does on disk.
"""

from __future__ import annotations

from typing import cast

from tidegate.converters.recipe_file import with_tables
from tidegate.converters.rounding.rtn import GROUP_SIZES, quantise
from tidegate.errors import ConfigError
from tidegate.model.packed import Array, DenseLinear, Linear, PackedLinear
from tidegate.model.recipe import Format, FormatRule, GroupSize, Precision, Recipe, format_of
from tidegate.model.walk import Weights


def make_recipe(*, bits: int, group_size: int, symmetric: bool) -> Recipe:
    """Check a user's choice.

    Raises:
        ConfigError: bits other than 4 and 8, or a group size that no backend runs.
    """
    if bits not in (4, 8):
        raise ConfigError("bits", bits, "4 or 8")
    if group_size not in GROUP_SIZES:
        raise ConfigError("group-size", group_size, f"one of {GROUP_SIZES}")
    wanted = Format(
        bits=cast(Precision, bits), group_size=cast(GroupSize, group_size), symmetric=symmetric
    )
    rules = with_tables([FormatRule(match=("*",), format=wanted)])
    return Recipe(name="rtn", formats=rules, passes=())


class RecipeWeights:
    """`Weights` quantised by a recipe as they are asked for; nothing but the table is kept.

    The table is asked for twice when the head is tied, and a lowering shares it by identity.
    """

    def __init__(self, source: Weights, recipe: Recipe) -> None:
        """Quantise what `source` gives."""
        self._source, self._recipe = source, recipe
        self._bits: dict[str, int] = {}
        self._nbytes: dict[str, int] = {}
        self._table: PackedLinear | None = None

    @property
    def tensor_bits(self) -> dict[str, int]:
        """Bits by role, of everything asked for so far."""
        return dict(self._bits)

    @property
    def nbytes(self) -> int:
        """Bytes of everything asked for so far, each role once."""
        return sum(self._nbytes.values())

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        if role == "embed" and self._table is not None:
            return self._table
        dense = self._source.linear(role)
        packed = self._pack(dense, format_of(self._recipe, role))
        if not isinstance(packed, PackedLinear):
            return packed
        self._bits[role], self._nbytes[role] = packed.bits, packed.nbytes
        if role == "embed":
            self._table = packed
        return packed

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        values = self._source.vector(role)
        self._nbytes[role] = values.nbytes
        return values

    def _pack(self, linear: Linear, wanted: Format) -> Linear:
        if not isinstance(linear, DenseLinear) or wanted.bits == 32:
            return linear
        return quantise(
            linear,
            bits=wanted.bits,
            group_size=wanted.group_size,
            symmetric=wanted.symmetric,
        )
