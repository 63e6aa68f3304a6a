"""Allocation: the budget holds, and little is left on the table."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.converters.rounding.allocation import Choice, allocate

Items = list[list[Choice]]


def by_trying_all(items: Items, budget_bits: int) -> float:
    """The definition: the least loss of all combinations that fit."""
    return min(
        sum(choice.loss for choice in combination)
        for combination in product(*items)
        if sum(choice.bits for choice in combination) <= budget_bits
    )


choices = st.builds(Choice, bits=st.integers(0, 50), loss=st.floats(0, 10))
problems = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=150)
@given(items=problems, spare=st.integers(0, 120))
def test_the_budget_holds_and_no_change_of_two_would_help(items: Items, spare: int) -> None:
    budget = sum(min(choice.bits for choice in options) for options in items) + spare
    chosen = allocate(items, budget)
    taken = [options[number] for options, number in zip(items, chosen, strict=True)]
    assert sum(choice.bits for choice in taken) <= budget
    loss = sum(choice.loss for choice in taken)
    assert loss >= by_trying_all(items, budget) - 1e-9
    for item, options in enumerate(items):
        room = budget - sum(choice.bits for choice in taken) + taken[item].bits
        fitting = [choice.loss for choice in options if choice.bits <= room]
        assert taken[item].loss <= min(fitting) + 1e-9 + 1e-9 * loss


def test_bits_go_where_they_save_most() -> None:
    plain = [Choice(bits=4, loss=1.0), Choice(bits=8, loss=0.0)]
    dear = [Choice(bits=4, loss=50.0), Choice(bits=8, loss=0.2)]
    assert allocate([plain, dear, plain], 16) == [0, 1, 0]
    assert allocate([plain, dear, plain], 24) == [1, 1, 1]


def test_a_trade_is_found_where_the_steepest_step_is_not_the_best() -> None:
    steep = [Choice(bits=0, loss=10.0), Choice(bits=1, loss=8.0)]
    wide = [Choice(bits=0, loss=10.0), Choice(bits=10, loss=0.0)]
    # One bit for 2 is steeper than ten for 10, but then the ten do not fit any more.
    assert allocate([steep, wide], 10) == [0, 1]


def test_a_large_item_is_not_crowded_out_by_many_small_ones() -> None:
    small = [Choice(bits=0, loss=1.0), Choice(bits=10, loss=0.9)]
    table = [Choice(bits=0, loss=100.0), Choice(bits=100_000, loss=0.0)]
    items = [*[small] * 50, table]
    assert allocate(items, 100_100)[-1] == 1
    assert sum(allocate(items, 100_100)) == 11, "and the rest of the budget is used"


def lower_bound(items: Items, budget_bits: int) -> float:
    """No combination that fits loses less: the Lagrangian dual, at the best of many prices."""
    bounds = []
    for power in range(-400, 100):
        price = 1.1**power
        least = (min(one.loss + price * one.bits for one in options) for options in items)
        bounds.append(sum(least) - price * budget_bits)
    return max(bounds)


@pytest.mark.parametrize("seed", range(5))
def test_with_as_many_items_as_a_model_has_it_comes_near_the_best(seed: int) -> None:
    rng = random.Random(seed)
    items = []
    for _ in range(60):
        cost, size = rng.lognormvariate(0, 2), rng.choice([100, 150, 500])
        bits = (4.16, 4.3, 4.6, 8.2, 8.4, 8.8)
        items.append([Choice(bits=int(size * b), loss=cost * 4.0**-b) for b in bits])
    budget = int(sum(options[0].bits for options in items) * 1.2)
    chosen = allocate(items, budget)
    loss = sum(options[n].loss for options, n in zip(items, chosen, strict=True))
    assert loss <= 1.02 * lower_bound(items, budget)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="the least that is possible is 8"):
        allocate([[Choice(bits=4, loss=0)], [Choice(bits=4, loss=0)]], 7)
