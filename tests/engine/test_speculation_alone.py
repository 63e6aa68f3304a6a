"""A step of one row: guesses of a few sizes, by what each costs, and none where they never hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from tidegate.engine.drafts import NOTHING, Draft, Ended, Wish
from tidegate.engine.speculation import Guessing, Speculator
from tidegate.engine.speculation_alone import SIZES, AloneCosts


def measured(*seconds: tuple[int, float]) -> AloneCosts:
    """Every kind of step often enough to be known, steady and after a change."""
    costs = AloneCosts()
    for guessed, spent_s in seconds:
        for _ in range(20):
            costs.interrupted()
            for _ in range(3):
                costs.observe(guessed, spent_s)
    return costs


def test_nothing_is_chosen_before_it_is_known_what_a_plain_step_takes() -> None:
    costs = AloneCosts()
    assert costs.best(7, 0.9, 15) == (0, 0.0)
    costs.observe(0, 9.0)
    costs.observe(0, 1.0)
    costs.observe(0, 1.0)
    size, gain = costs.best(7, 0.9, 15)
    assert size == 7
    assert gain == pytest.approx(sum(0.9**n for n in range(8)))


def test_a_draft_between_two_sizes_is_filled_up_only_where_that_costs_little() -> None:
    cheap = measured((0, 1.0), (1, 1.0), (3, 1.0), (7, 1.1))
    dear = measured((0, 1.0), (1, 1.0), (3, 1.0), (7, 3.0))
    assert cheap.best(5, 0.9, 15)[0] == 7
    assert dear.best(5, 0.9, 15)[0] == 3
    assert cheap.best(5, 0.9, 6)[0] == 3, "there is no room for seven"
    assert cheap.best(2, 0.9, 2)[0] == 1
    assert cheap.best(3, 0.9, 0) == (0, 0.0)


def test_a_step_of_another_shape_is_known_to_cost_more() -> None:
    costs = measured((1, 2.0), (3, 2.0))
    for _ in range(6):
        for guessed, spent_s in ((0, 1.5), (0, 1.0), (0, 1.0), (7, 2.5), (7, 2.0), (7, 2.0)):
            costs.observe(guessed, spent_s)
    promised = sum(0.8**n for n in range(8))
    size, gain = costs.best(7, 0.8, 7)
    assert size == 7
    assert gain == pytest.approx(promised / 2.0)
    costs.interrupted()
    assert costs.best(7, 0.8, 7)[1] == pytest.approx(promised / 2.5, rel=0.1)
    costs.observe(0, 1.5)
    back_s = 0.5
    assert costs.best(7, 0.8, 7)[1] == pytest.approx(promised / (2.5 + back_s), rel=0.1)


def test_a_plain_step_is_due_when_none_followed_another_for_long() -> None:
    costs = measured((0, 1.0))
    assert costs.since_plain == 0
    for _ in range(5):
        costs.observe(7, 1.0)
        costs.observe(0, 1.0)
    assert costs.since_plain == 5
    costs.observe(0, 1.0)
    assert costs.since_plain == 0


def test_a_draft_is_cut_or_filled_to_a_size_and_says_what_is_padding() -> None:
    draft = Draft(kind="k", tokens=(1, 2, 3), likely=0.4)
    assert draft.sized(2) == Draft(kind="k", tokens=(1, 2), likely=0.4)
    assert draft.sized(5) == Draft(kind="k", tokens=(1, 2, 3, 3, 3), likely=0.4, padding=2)


def test_a_machine_that_gets_slower_or_faster_changes_no_choice() -> None:
    costs, promised = measured((0, 1.0), (1, 1.1), (3, 1.2), (7, 1.3)), []
    for slower in (1.0, 4.0, 0.5):
        for _ in range(80):
            costs.observe(0, slower)
        promised.append(costs.best(7, 0.8, 7))
        for _ in range(80):
            costs.observe(7, slower * 1.3)
        promised.append(costs.best(7, 0.8, 7))
    assert {size for size, _ in promised} == {7}
    assert [gain for _, gain in promised] == pytest.approx([promised[0][1]] * 6, rel=0.15)


class Same:
    """Always guesses the same five tokens."""

    def __init__(self, kind: str = "same") -> None:
        self.kind, self.asked = kind, 0

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        self.asked += 1
        return [Draft(kind=self.kind, tokens=(5, 6, 7, 8, 9))] * len(wishes)

    def observe(self, key: int, accepted: int) -> None:
        pass

    def remember(self, ended: Ended) -> None:
        pass


class Longer(Same):
    """Agrees and knows two tokens more."""

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        return [Draft(kind="longer", tokens=(5, 6, 7, 8, 9, 10, 11))] * len(wishes)


def guessing() -> Guessing:
    wish = Wish(key=1, tokens=np.arange(9), most=15, remaining=99)
    return Guessing(wishes=(wish,), most=15, decoding=True)


def decode(
    speculator: Speculator, *, right: float, step_s: float, steps: int
) -> tuple[float, list[int]]:
    """Run a step at a time on a machine where eight tokens take a third longer than one.

    Returns:
        Tokens a second over those without guesses, and what every step guessed.
    """
    chance, seconds, tokens, guesses = random.Random(3), 0.0, 0, []
    for _ in range(steps):
        draft = NOTHING
        if not speculator.rests():
            (draft,) = speculator.draft(guessing())
        meant = len(draft.tokens) - draft.padding
        held = next((n for n in range(meant) if chance.random() > right), meant)
        if draft.tokens:
            speculator.observe(guessing(), [draft], [held])
        spent_s = step_s * (1 + len(draft.tokens) / 21) * chance.uniform(0.95, 1.05)
        speculator.timed(spent_s)
        seconds += spent_s
        tokens += 1 + held
        guesses.append(len(draft.tokens))
    return tokens / seconds * step_s, guesses


def speculator_of(*drafters: Same) -> Speculator:
    return Speculator(drafters, most_requests=2, eos_ids=frozenset({0}))


def test_every_step_guesses_one_of_the_sizes_and_is_as_much_faster_as_guesses_hold() -> None:
    faster, guesses = decode(speculator_of(Same()), right=0.9, step_s=0.001, steps=1000)
    assert {*guesses} <= {0, *SIZES}
    assert faster > 2.7


def test_a_longer_idea_that_begins_alike_is_taken_instead() -> None:
    speculator = speculator_of(Same(), Longer())
    decode(speculator, right=1.0, step_s=0.001, steps=8)
    (draft,) = speculator.draft(guessing())
    assert (draft.kind, draft.tokens) == ("longer", (5, 6, 7, 8, 9, 10, 11))


def test_guesses_that_never_hold_cost_less_than_a_hundredth_and_are_rarely_looked_for() -> None:
    drafter = Same()
    faster, _ = decode(speculator_of(drafter), right=0.0, step_s=0.001, steps=20_000)
    assert faster > 0.99
    assert drafter.asked < 2000


def test_where_steps_are_long_looking_costs_nothing_so_it_goes_on() -> None:
    drafter = Same()
    faster, _ = decode(speculator_of(drafter), right=0.0, step_s=0.05, steps=5000)
    assert faster > 0.99
    assert drafter.asked == 5000


def test_after_a_rest_guesses_that_hold_are_found_again() -> None:
    speculator = speculator_of(Same())
    decode(speculator, right=0.0, step_s=0.001, steps=5000)
    faster, _ = decode(speculator, right=0.95, step_s=0.001, steps=20_000)
    assert faster > 2.5
