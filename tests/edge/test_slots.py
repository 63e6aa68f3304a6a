"""Moving slots between buffer rows: any set comes side by side and nothing is lost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.executors.slots import SlotBuffers

SLOTS, TOKENS = 6, 8


def filled() -> SlotBuffers:
    """Every slot holds its own number, as many tokens as it says."""
    buffers = SlotBuffers(kv_heads=2, head_sizes=[32], slots=SLOTS, slot_tokens=TOKENS)
    for slot in range(SLOTS):
        buffers.will_hold(slot, slot + 2)
        buffers.keys[0][slot, :, : slot + 2] = slot
        buffers.values[0][slot, :, : slot + 2] = -slot
    return buffers


def assert_intact(buffers: SlotBuffers) -> None:
    for slot in range(SLOTS):
        row = buffers.row(slot)
        np.testing.assert_array_equal(buffers.keys[0][row, :, : slot + 2], slot)
        np.testing.assert_array_equal(buffers.values[0][row, :, : slot + 2], -slot)


@given(st.lists(st.sets(st.integers(0, SLOTS - 1), min_size=1), min_size=1, max_size=8))
def test_any_slots_come_side_by_side_and_every_slot_keeps_its_tokens(sets: list[set[int]]) -> None:
    buffers = filled()
    for slots in sets:
        first = buffers.side_by_side(sorted(slots))
        rows = sorted(buffers.row(slot) for slot in slots)
        assert rows == list(range(first, first + len(slots)))
        assert_intact(buffers)


def test_slots_that_are_neighbours_already_do_not_move() -> None:
    buffers = filled()
    assert buffers.side_by_side([3, 1, 2]) == 1
    assert [buffers.row(slot) for slot in range(SLOTS)] == list(range(SLOTS))


def test_one_swap_closes_one_gap() -> None:
    buffers = filled()
    buffers.side_by_side([0, 1, 3])
    moved = [slot for slot in range(SLOTS) if buffers.row(slot) != slot]
    assert len(moved) == 2


def test_a_slot_that_moved_is_copied_from_where_it_is() -> None:
    buffers = filled()
    buffers.side_by_side([0, 5])
    buffers.copy(5, 2, 4)
    np.testing.assert_array_equal(buffers.keys[0][buffers.row(2), :, :4], 5)
    buffers.side_by_side([2, 4])
    np.testing.assert_array_equal(buffers.values[0][buffers.row(2), :, :4], -5)
