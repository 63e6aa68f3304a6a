"""Allocation: one option for every item, so that a budget of bits costs the least loss.

A multiple-choice knapsack. From the cheapest options on, the upgrade with the greatest fall of loss
per bit is taken while one fits; then single changes and pairs of changes that fit together and
lower the loss are made until there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What an option of an item costs."""

    bits: int
    loss: float


def allocate(items: Sequence[Sequence[Choice]], budget_bits: int) -> list[int]:
    """The index of the option of every item.

    Raises:
        ValueError: the cheapest options together are over the budget.
    """
    chosen = [_cheapest(options) for options in items]
    room = budget_bits - sum(options[n].bits for options, n in zip(items, chosen, strict=True))
    if room < 0:
        raise ValueError(f"{budget_bits} bits: the least that is possible is {budget_bits - room}")
    while (upgrade := _best_upgrade(items, chosen, room)) is not None:
        item, option = upgrade
        room -= items[item][option].bits - items[item][chosen[item]].bits
        chosen[item] = option
    while (changes := _best_changes(items, chosen, room)) is not None:
        for item, option in changes:
            room -= items[item][option].bits - items[item][chosen[item]].bits
            chosen[item] = option
    return chosen


def _cheapest(options: Sequence[Choice]) -> int:
    """The option of fewest bits, and of those the one of least loss."""
    return min(range(len(options)), key=lambda n: (options[n].bits, options[n].loss))


def _best_upgrade(
    items: Sequence[Sequence[Choice]], chosen: Sequence[int], room: int
) -> tuple[int, int] | None:
    """The (item, option) of the greatest fall of loss per bit that fits."""
    best, steepest = None, 0.0
    for item, (options, now) in enumerate(zip(items, chosen, strict=True)):
        for number, option in enumerate(options):
            more, less = option.bits - options[now].bits, options[now].loss - option.loss
            if 0 <= more <= room and less > 0 and less / max(more, 1) > steepest:
                best, steepest = (item, number), less / max(more, 1)
    return best


def _best_changes(
    items: Sequence[Sequence[Choice]], chosen: Sequence[int], room: int
) -> list[tuple[int, int]] | None:
    """One or two changes of options that lower the loss most of those that fit."""
    places, bits, losses = _changes(items, chosen)
    # Changes by bits, and up to each of them the one that lowers the loss most.
    order = np.argsort(bits, kind="stable")
    best_so_far = _running_argmin(losses[order])
    found, lowest = None, -1e-12 * sum(o[n].loss for o, n in zip(items, chosen, strict=True))
    for one in range(len(places)):
        if bits[one] <= room and losses[one] < lowest:
            found, lowest = [places[one]], losses[one]
        fitting = int(np.searchsorted(bits[order], room - bits[one], side="right"))
        if fitting == 0:
            continue
        other = int(order[best_so_far[fitting - 1]])
        together = losses[one] + losses[other]
        if places[one][0] != places[other][0] and together < lowest:
            found, lowest = [places[one], places[other]], together
    return found


def _changes(
    items: Sequence[Sequence[Choice]], chosen: Sequence[int]
) -> tuple[list[tuple[int, int]], Numbers, Numbers]:
    """Every (item, other option), and what it would add to bits and loss."""
    places = [
        (item, number)
        for item, (options, now) in enumerate(zip(items, chosen, strict=True))
        for number in range(len(options))
        if number != now
    ]
    bits = [items[item][n].bits - items[item][chosen[item]].bits for item, n in places]
    losses = [items[item][n].loss - items[item][chosen[item]].loss for item, n in places]
    return places, np.array(bits, np.float64), np.array(losses, np.float64)


def _running_argmin(values: Numbers) -> npt.NDArray[np.int64]:
    """Where the least value up to each place is."""
    least = np.minimum.accumulate(values)
    fresh = np.concatenate([[True], values[1:] < least[:-1]]) if len(values) else values > 0
    return np.maximum.accumulate(np.where(fresh, np.arange(len(values)), 0))
