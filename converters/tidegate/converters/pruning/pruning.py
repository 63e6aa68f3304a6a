"""Zeroes weights of a block by their scores: what `magnitude` and `wanda` have in common.

What cannot be pruned (a table that is looked up, a layer that is quantised already) is left as it
is and noted, never silently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tidegate.converters.passes.base import Block, PassError
from tidegate.converters.pruning.sparsity import Sparsity, lowest_of_four
from tidegate.model.packed import Array, DenseLinear
from tidegate.model.recipe import matches

Scores = Callable[[str, Array], Array]
"""(role, weight [out, in]) -> how much each weight counts."""

Choose = Callable[[Array, float], npt.NDArray[np.bool_]]
"""(scores, share) -> which to zero, for the pattern `none`."""


def dense_roles(block: Block, match: tuple[str, ...]) -> list[str]:
    """The matching roles of a block that hold dense weights; notes why the others do not count."""
    found = []
    for role, linear in block.linears.items():
        if not matches(role, match):
            continue
        if block.name == "embed":
            block.notes[role] = "left as it is: a table that is looked up"
        elif not isinstance(linear, DenseLinear):
            block.notes[role] = f"left as it is: already a {type(linear).__name__}"
        else:
            found.append(role)
    return found


def prune_block(
    block: Block,
    options: Sparsity,
    match: tuple[str, ...],
    scores: Scores,
    choose: Choose,
    look: Callable[[str], None] | None = None,
) -> None:
    """Zero weights of the matching layers of a block.

    Args:
        block: its `linears` are replaced.
        options: how many and in what pattern.
        match: which roles.
        scores: how much each weight counts.
        choose: which weights of one layer go, when there is no pattern.
        look: called for every role before any weight changes; `LookupError` leaves the role as
            it is, with a note.

    Raises:
        PassError: an input is no multiple of 4 and the pattern is 2:4.
    """
    roles = dense_roles(block, match)
    for role in list(roles):
        try:
            if look is not None:
                look(role)
        except LookupError as error:
            block.notes[role] = f"left as it is: {error}"
            roles.remove(role)
    for role in roles:
        linear = block.linears[role]
        if options.pattern == "2:4" and linear.inputs % 4:
            raise PassError(f"{role}: pattern 2:4: its {linear.inputs} inputs are no fours")
        assert isinstance(linear, DenseLinear)
        found = scores(role, linear.weight)
        mask = (
            lowest_of_four(found) if options.pattern == "2:4" else choose(found, options.sparsity)
        )
        weight: Array = np.where(mask, np.float32(0), linear.weight)
        block.linears[role] = DenseLinear(weight=weight, bias=linear.bias)
