"""Allocation: one option for every item, so that a budget of bits costs the least loss.

A multiple-choice knapsack, solved by dynamic programming over a budget cut into steps: taking the
greatest fall of loss per bit instead can miss an item that is large beside the budget, such as a
table, for small ones that fill it. What the steps leave over is used up by single changes and pairs
of changes that lower the loss, until none fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


_STEPS, _STEPS_PER_ITEM = 8192, 8
"""Of the budget beyond the cheapest options; rounding up costs half a step an item on average."""


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
    cheapest = [_cheapest(options) for options in items]
    least = sum(options[n].bits for options, n in zip(items, cheapest, strict=True))
    if least > budget_bits:
        raise ValueError(f"{budget_bits} bits: the least that is possible is {least}")
    chosen = _by_steps(items, cheapest, budget_bits - least)
    room = budget_bits - sum(options[n].bits for options, n in zip(items, chosen, strict=True))
    while (changes := _best_changes(items, chosen, room)) is not None:
        for item, option in changes:
            room -= items[item][option].bits - items[item][chosen[item]].bits
            chosen[item] = option
    return chosen


def _cheapest(options: Sequence[Choice]) -> int:
    """The option of fewest bits, and of those the one of least loss."""
    return min(range(len(options)), key=lambda n: (options[n].bits, options[n].loss))


def _by_steps(items: Sequence[Sequence[Choice]], cheapest: Sequence[int], room: int) -> list[int]:
    """The best choice when what options take beyond the cheapest is rounded up to whole steps."""
    steps = max(_STEPS, _STEPS_PER_ITEM * len(items))
    step_bits = max(room / steps, 1.0)
    most = int(room / step_bits)
    losses = np.zeros(most + 1)  # the least of the items so far within each number of steps
    taken = []
    for options, least in zip(items, cheapest, strict=True):
        best, choice = losses + options[least].loss, np.full(most + 1, least, np.int16)
        for number, option in enumerate(options):
            more = math.ceil((option.bits - options[least].bits) / step_bits)
            if more > most or number == least:
                continue
            tried = losses[: most + 1 - more] + option.loss
            better = tried < best[more:]
            best[more:][better], choice[more:][better] = tried[better], number
        losses = best
        taken.append(choice)
    chosen, left = [], most
    for options, least, choice in zip(items[::-1], cheapest[::-1], taken[::-1], strict=True):
        number = int(choice[left])
        left -= math.ceil((options[number].bits - options[least].bits) / step_bits)
        chosen.append(number)
    return chosen[::-1]


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
