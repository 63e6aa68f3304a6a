"""The culprit of a failed step is found by halves, in few steps, and nobody else pays."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.quarantine import Quarantine


def find(keys: list[int], guilty: set[int]) -> tuple[list[int], int]:
    """Run the groups until all are done: who was given up, and how many steps it took."""
    quarantine, given_up, steps = Quarantine(), list[int](), 1
    quarantine.failed(keys, alone=len(keys) == 1)
    while group := quarantine.group:
        steps += 1
        if guilty & set(group):
            given_up += quarantine.failed(group, alone=len(group) == 1)
        else:
            quarantine.passed(group)
    return given_up, steps


@given(st.integers(2, 300), st.data())
def test_one_culprit_is_found_in_a_logarithmic_number_of_steps(n: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(0, n - 1))
    given_up, steps = find(list(range(n)), {culprit})
    assert given_up == [culprit]
    assert steps <= 2 * math.ceil(math.log2(n)) + 1


def test_nobody_is_given_up_when_smaller_groups_pass() -> None:
    assert find(list(range(8)), set()) == ([], 3)


def test_four_alone_in_a_row_mean_the_executor_and_everybody_gives_up() -> None:
    given_up, steps = find(list(range(8)), set(range(8)))
    assert sorted(given_up) == list(range(8))
    assert steps == 8


def test_one_that_ran_beside_somebody_who_left_is_tried_alone_first() -> None:
    quarantine = Quarantine()
    assert quarantine.failed([4], alone=False) == ()
    assert quarantine.group == (4,)


def test_a_step_whose_only_request_left_says_nothing_about_the_others() -> None:
    quarantine = Quarantine()
    quarantine.failed([1, 2, 3, 4], alone=False)
    for _ in range(3):
        assert quarantine.failed([], alone=True) == ()
    assert quarantine.group == (1, 2)


def test_those_who_leave_are_no_longer_waited_for() -> None:
    quarantine = Quarantine()
    quarantine.failed([1, 2, 3, 4], alone=False)
    quarantine.leave([1, 2])
    assert quarantine.group == (3, 4)
    quarantine.leave([3, 4])
    assert not quarantine.group
