"""How much is guessed: what pays by what was measured, found soon and at little cost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.speculation_policy import (
    KEPT_OF_ALL,
    KEPT_OF_ONE,
    Acceptance,
    Probing,
    Prospect,
    StepCosts,
    share_out,
)


def measured(*cells: tuple[int, int, float]) -> StepCosts:
    costs = StepCosts()
    for rows, guessed, seconds in cells:
        for _ in range(4):
            costs.observe(rows, min(rows, guessed), guessed, seconds)
    return costs


def table(costs: StepCosts, rows: int, most: int, *, guessing: int = 1) -> Sequence[float] | None:
    tables = costs.tables(rows, most)
    return None if tables is None else tables[guessing]


def test_nothing_is_estimated_before_a_plain_step_was_measured_twice() -> None:
    costs = StepCosts()
    assert table(costs, 1, 4) is None
    costs.observe(1, 0, 0, 9.0)
    assert table(costs, 1, 4) is None
    costs.observe(1, 0, 0, 1.0)
    assert table(costs, 1, 4) == [1.0] * 5, "the first step was slow, as first ones are"
    assert table(costs, 2, 4) is None


def test_what_was_not_measured_lies_between_its_neighbours_and_hopes_beyond_them() -> None:
    assert table(measured((1, 0, 1.0), (1, 4, 3.0)), 1, 6) == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]


def test_where_guessing_takes_time_one_token_is_tried_first_and_more_costs_more() -> None:
    plain, dear = measured((2, 0, 1.0)), StepCosts()
    assert dear.dear_tables(2, 8, StepCosts()) is None
    assert dear.dear_tables(2, 8, plain) == [[1.0] * 3] * 2
    for _ in range(4):
        dear.observe(2, 1, 2, 1.5)
    tables = dear.dear_tables(2, 5, plain)
    assert tables is not None
    assert tables[1] == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0, 2.25])


def test_a_step_with_more_guesses_is_never_taken_to_cost_less() -> None:
    found = table(measured((1, 0, 1.0), (1, 1, 3.0), (1, 2, 2.0), (1, 3, 4.0)), 1, 3)
    assert found == pytest.approx([1.0, 2.5, 2.5, 4.0])
    lucky = table(measured((1, 0, 1.0), (1, 3, 0.5)), 1, 3)
    assert lucky == pytest.approx([0.75] * 4)


def test_rows_that_guess_cost_apart_and_more_of_them_what_fewer_do_until_measured() -> None:
    costs = measured((4, 0, 1.0))
    for _ in range(4):
        costs.observe(4, 2, 6, 3.0)
    tables = costs.tables(4, 8)
    assert tables is not None
    assert [one[6] for one in tables] == [1.0, 1.0, 3.0, 3.0, 3.0]


def test_a_disturbed_step_moves_an_estimate_little_and_lasting_change_moves_it_all_the_way() -> (
    None
):
    costs = measured((1, 0, 1.0))
    costs.observe(1, 0, 0, 100.0)
    found = table(costs, 1, 1, guessing=0)
    assert found is not None
    assert found[0] < 1.5
    for _ in range(60):
        costs.observe(1, 0, 0, 5.0)
    found = table(costs, 1, 1, guessing=0)
    assert found is not None
    assert found[0] == pytest.approx(5, rel=0.02)


def test_acceptance_follows_what_holds_and_stops_counting_at_the_first_miss() -> None:
    acceptance = Acceptance()
    first = acceptance.rate()
    for _ in range(20):
        acceptance.observe(8, 0)
    assert acceptance.rate() < 0.2 < first
    for _ in range(20):
        acceptance.observe(8, 8)
    assert acceptance.rate() > 0.9
    even = Acceptance()
    for _ in range(50):
        even.observe(8, 1)
    assert even.rate() == pytest.approx(0.5, abs=0.05)


def brute_force(prospects: list[Prospect], costs: list[float], rows: int) -> float:
    """The best gain of all ways to share out, tried one by one."""
    best = 0.0
    for taken in itertools.product(*(range(one.tokens + 1) for one in prospects)):
        if 0 < sum(taken) < len(costs):
            expected = rows + sum(
                one.acceptance ** (place + 1)
                for one, count in zip(prospects, taken, strict=True)
                for place in range(count)
            )
            best = max(best, expected / rows * costs[0] / costs[sum(taken)])
    return best


prospects = st.builds(Prospect, tokens=st.integers(0, 4), acceptance=st.floats(0.01, 0.98))


@given(
    st.lists(prospects, min_size=1, max_size=3),
    st.lists(st.floats(0.5, 5), min_size=1, max_size=9),
    st.integers(0, 2),
)
def test_no_other_way_to_share_out_promises_more(
    drafts: list[Prospect], costs: list[float], others: int
) -> None:
    rows = len(drafts) + others
    taken, gain = share_out(drafts, [costs], rows)
    assert gain == pytest.approx(brute_force(drafts, costs, rows))
    assert all(0 <= count <= one.tokens for count, one in zip(taken, drafts, strict=True))
    assert sum(taken) < len(costs)


def test_likely_tokens_go_first_and_dear_ones_are_left() -> None:
    likely, unlikely = Prospect(tokens=8, acceptance=0.95), Prospect(tokens=8, acceptance=0.3)
    flat_to_six = [1.0] * 7 + [2.0] * 9
    taken, gain = share_out([unlikely, likely], [flat_to_six], 2)
    assert taken == (0, 6)
    assert gain > 2


def test_where_each_row_that_guesses_costs_a_run_the_best_one_guesses_alone() -> None:
    drafts = [Prospect(tokens=12, acceptance=0.95)] * 4
    runs = [[1.0] + [1.0 + count] * 12 for count in range(4)]
    taken, gain = share_out(drafts, runs, 4)
    assert sorted(taken) == [0, 0, 0, 12]
    assert gain == pytest.approx((4 + 0.95 * (1 - 0.95**12) / 0.05) / 4 / 2)


def drive(
    step_s: Callable[[int, int, int], float], acceptance: float, *, rows: int, steps: int
) -> tuple[float, list[int]]:
    """Decode with the policy on a machine whose steps take `step_s(rows, guessing, guessed)`.

    Returns:
        Tokens a second over those without guesses, and what each step guessed.
    """
    costs, probing = StepCosts(), Probing()
    of_all, of_one = Acceptance(kept=KEPT_OF_ALL), Acceptance(kept=KEPT_OF_ONE)
    chance = random.Random(1)
    seconds, tokens, guesses = 0.0, 0, []
    for _ in range(steps):
        tables = costs.tables(rows, 16 - rows)
        taken: tuple[int, ...] = (0,) * rows
        if tables is not None:
            rate = of_one.rate(of_all.rate())
            drafts = [Prospect(tokens=15, acceptance=rate)] * rows
            taken, gain = share_out(drafts, tables, rows)
            if gain >= 1.05:
                probing.won()
            elif not probing.refuse():
                taken = (0,) * rows
        for count in taken:
            held = next((i for i in range(count) if chance.random() > acceptance), count)
            tokens += 1 + held
            if count:
                of_all.observe(count, held)
                of_one.observe(count, held)
        guessing = sum(count > 0 for count in taken)
        took_s = step_s(rows, guessing, sum(taken)) * chance.uniform(0.93, 1.07)
        costs.observe(rows, guessing, sum(taken), took_s)
        seconds += took_s
        guesses.append(sum(taken))
    return tokens / seconds * step_s(rows, 0, 0) / rows, guesses


def flat(rows: int, guessing: int, guessed: int) -> float:
    """Up to eight tokens at the price of one, then one more price for each eight."""
    return 1.0 + 0.02 * guessed + max(0, rows + guessed - 8) * 0.15


def own_run(rows: int, guessing: int, guessed: int) -> float:
    """Every row that guesses takes a run of its own, beside that of the others."""
    return (guessing + (rows > guessing)) * 0.95 + 0.05 + 0.02 * guessed


@pytest.mark.parametrize("rows", [1, 4])
def test_where_guesses_hold_and_cost_little_they_grow_and_win(rows: int) -> None:
    faster, guesses = drive(flat, 0.9, rows=rows, steps=400)
    assert faster > (3.0 if rows == 1 else 1.5)
    assert sorted(guesses[50:])[len(guesses) // 2] >= 4


def test_where_each_guess_costs_a_run_several_rows_soon_stop() -> None:
    faster, guesses = drive(own_run, 0.6, rows=4, steps=1000)
    assert sum(count > 0 for count in guesses[:40]) < 16
    assert sum(count > 0 for count in guesses[40:]) < 20
    assert faster > 0.97


def test_guesses_that_never_hold_are_left_alone_at_little_cost() -> None:
    faster, guesses = drive(flat, 0.02, rows=1, steps=1000)
    assert sum(count > 0 for count in guesses[60:]) < 60
    assert faster > 0.97


def test_what_was_given_up_is_found_again_when_it_starts_to_pay() -> None:
    probing = Probing()
    waits = []
    for _ in range(3):
        steps = 1
        while not probing.refuse():
            steps += 1
        waits.append(steps)
    assert waits == [32, 64, 128]
    probing.won()
    assert sum(probing.refuse() for _ in range(32)) == 1
