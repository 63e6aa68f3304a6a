"""Both KV caches: the books agree with a memory of tokens whatever is admitted and released."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engine.executor import PagedGeometry, SlotGeometry, Tokens
from tidegate.engine.kv import KvCache
from tidegate.engine.paged_kv import PagedKv
from tidegate.engine.slot_kv import LEAST_COPIED_TOKENS, SlotKv
from tidegate.engine.spill import KvUnit
from tidegate.errors import CapacityError

SLOT_TOKENS = 48
GARBAGE = -2


def paged(blocks: int = 8, block_tokens: int = 4) -> PagedKv:
    return PagedKv(PagedGeometry(blocks=blocks, block_tokens=block_tokens, bytes_per_token=1))


def slotted(slots: int = 3) -> SlotKv:
    return SlotKv(SlotGeometry(slots=slots, slot_tokens=SLOT_TOKENS, bytes_per_token=1))


def ids(*tokens: int) -> Tokens:
    return np.array(tokens, dtype=np.int64)


def run_to_end(kv: KvCache, key: int, tokens: Tokens) -> int:
    """Admit, compute everything, release; the tokens that were reused."""
    reused = kv.admit(key, tokens)
    kv.grow(key, len(tokens))
    kv.commit(key, tokens)
    kv.take_copies()
    kv.release(key)
    kv.check_integrity()
    return reused


def test_blocks_are_shared_up_to_the_last_full_block_they_have_in_common() -> None:
    kv = paged()
    assert run_to_end(kv, 0, ids(*range(10))) == 0
    assert kv.match(1, ids(*range(10))).tokens == 8
    assert kv.match(2, ids(*range(7), 99, 8, 9)).tokens == 4
    assert kv.match(3, ids(99, *range(1, 10))).tokens == 0


def test_the_last_token_of_a_prompt_is_always_computed_again() -> None:
    kv: KvCache
    for kv in (paged(), slotted()):
        run_to_end(kv, 0, ids(*range(8)))
        assert kv.match(1, ids(*range(8))).tokens == (4 if isinstance(kv, PagedKv) else 7)


def test_equal_blocks_after_different_beginnings_are_different_blocks() -> None:
    kv = paged()
    run_to_end(kv, 0, ids(1, 1, 1, 1, 7, 7, 7, 7, 0))
    run_to_end(kv, 1, ids(2, 2, 2, 2, 5, 5, 5, 5, 0))
    assert kv.match(2, ids(2, 2, 2, 2, 7, 7, 7, 7, 0)).tokens == 4


def test_a_block_in_use_is_never_handed_out_and_all_used_is_a_capacity_error() -> None:
    kv = paged(blocks=3)
    kv.admit(0, ids(*range(12)))
    kv.grow(0, 12)
    kv.admit(1, ids(5))
    with pytest.raises(CapacityError, match="all 3 KV blocks"):
        kv.grow(1, 1)


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    kv = paged(blocks=5)
    run_to_end(kv, 0, ids(*range(8)))
    run_to_end(kv, 1, ids(*range(100, 108)))
    kv.admit(2, ids(50, 51, 52, 53, 54, 55))
    kv.grow(2, 6)  # one block was empty; the other is the end of the older prefix
    assert kv.match(3, ids(*range(9))).tokens == 4
    assert kv.match(4, ids(*range(100, 109))).tokens == 8


def test_a_match_says_which_of_its_blocks_are_free_now() -> None:
    kv = paged()
    run_to_end(kv, 0, ids(*range(9)))
    free = kv.match(1, ids(*range(9)))
    assert (free.units, free.drawn) == (2, 2)
    kv.admit(1, ids(*range(9)))
    shared = kv.match(2, ids(*range(9)))
    assert (shared.units, shared.drawn) == (2, 0)
    assert kv.exclusive(1) == 2
    kv.admit(2, ids(*range(9)))
    assert kv.exclusive(1) == 0


def test_kv_that_is_undefined_is_never_reused() -> None:
    kv: KvCache
    for kv in (paged(), slotted()):
        kv.admit(0, ids(*range(9)))
        kv.grow(0, 9)
        kv.commit(0, ids(*range(9)))
        kv.release(0, forget=True)
        assert kv.match(1, ids(*range(9))).tokens == 0
        kv.check_integrity()


def test_room_that_guesses_did_not_need_is_given_back_and_taken_before_any_prefix() -> None:
    kv = paged(blocks=6)
    run_to_end(kv, 0, ids(*range(8)))
    kv.admit(1, ids(50, 51, 52))
    kv.grow(1, 12)
    assert (kv.held(1), kv.free) == (3, 3)
    kv.trim(1, 3)
    assert (kv.held(1), kv.free) == (1, 5)
    place = kv.place(1).blocks
    assert place is not None
    assert len(place) == 1
    kv.check_integrity()
    kv.admit(2, ids(60))
    kv.grow(2, 12)
    assert kv.match(3, ids(*range(9))).tokens == 8, "the prefix is still there"


def test_reuse_can_be_switched_off() -> None:
    kv: KvCache
    for kv in (
        PagedKv(PagedGeometry(blocks=8, block_tokens=4, bytes_per_token=1), reuse=False),
        SlotKv(SlotGeometry(slots=2, slot_tokens=64, bytes_per_token=1), reuse=False),
    ):
        assert [run_to_end(kv, key, ids(*range(40 // 2))) for key in range(3)] == [0, 0, 0]


def test_slots_are_taken_from_the_lowest() -> None:
    kv = slotted()
    for key in range(3):
        kv.admit(key, ids(key))
        assert kv.place(key).slot == key
    with pytest.raises(CapacityError, match="all 3 KV slots"):
        kv.admit(3, ids(3))


def test_a_conversation_goes_on_in_its_own_slot_without_a_copy() -> None:
    kv = slotted()
    run_to_end(kv, 0, ids(*range(20)))
    assert kv.admit(1, ids(*range(30))) == 20
    assert kv.place(1).slot == 0
    assert kv.take_copies() == ()


def test_a_rewound_slot_forgets_what_came_after() -> None:
    kv = slotted(slots=1)
    run_to_end(kv, 0, ids(*range(20)))
    assert run_to_end(kv, 1, ids(*range(15), 99, 98, 97, 96, 95)) == 15
    assert kv.match(2, ids(*range(20))).tokens == 15
    assert kv.match(3, ids(*range(15), 99, 98, 97)).tokens == 17


def test_a_prefix_in_a_busy_slot_is_copied() -> None:
    kv = slotted()
    kv.admit(0, ids(*range(20)))
    kv.commit(0, ids(*range(20)))
    assert kv.admit(1, ids(*range(18), 99)) == 18
    assert kv.take_copies() == ((0, 1, 18),)
    assert kv.take_copies() == ()


def test_a_short_common_beginning_does_not_cost_a_long_conversation_its_slot() -> None:
    kv = slotted()
    run_to_end(kv, 0, ids(*range(40)))
    assert kv.admit(1, ids(*range(18), 99)) == 18
    assert kv.take_copies() == ((0, 1, 18),)
    assert kv.match(2, ids(*range(40), 7)).tokens == 40


def test_a_prefix_too_short_to_copy_is_computed_again() -> None:
    kv = slotted()
    run_to_end(kv, 0, ids(*range(40)))
    assert kv.admit(1, ids(*range(LEAST_COPIED_TOKENS - 1), 99)) == 0
    assert kv.take_copies() == ()


def test_when_every_slot_has_content_the_longest_unused_one_goes() -> None:
    kv = slotted()
    for key, start in enumerate((0, 100, 200)):
        kv.admit(key, ids(*range(start, start + 20)))
        kv.commit(key, ids(*range(start, start + 20)))
    for key in (1, 0, 2):
        kv.release(key)
    kv.admit(3, ids(300, 301))
    assert kv.place(3).slot == 1


def test_units_are_found_where_they_lie_until_something_else_is_written_there() -> None:
    blocks = paged(blocks=4)
    run_to_end(blocks, 0, ids(*range(11)))
    assert [unit.home for unit in blocks.locate(ids(*range(11)), 4)] == [0, 1]
    assert blocks.locate(ids(1, *range(1, 11)), 4) == ()
    blocks.admit(1, ids(9, 9, 9, 9, 9, 9, 9, 9, 9))
    blocks.grow(1, 12)  # two were empty, the third is the end of the prefix
    assert [unit.home for unit in blocks.locate(ids(*range(11)), 4)] == [0]

    slots = slotted()
    run_to_end(slots, 0, ids(*range(20)))
    found = slots.locate(ids(*range(19)), 8)
    assert found == (KvUnit(home=0, first=0), KvUnit(home=0, first=8))
    run_to_end(slots, 1, ids(*range(13), 99, 98))
    assert slots.locate(ids(*range(19)), 8) == (KvUnit(home=0, first=0),)


def test_a_request_without_reuse_gets_nothing_though_it_is_there() -> None:
    kv: KvCache
    for kv in (paged(), slotted()):
        run_to_end(kv, 0, ids(*range(20)))
        assert kv.admit(1, ids(*range(20)), reuse=False) == 0
        assert kv.take_copies() == ()
        kv.release(1)
        kv.check_integrity()
        assert kv.match(2, ids(*range(20))).tokens >= 16


@dataclass
class Life:
    tokens: Tokens
    computed: int


class Memory:
    """What the executor's KV holds, as the tokens it was computed from; -1 is garbage."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._cells = np.full((kv.units, kv.unit_tokens), -1, dtype=np.int64)

    def copy(self) -> None:
        for source, target, tokens in self._kv.take_copies():
            self._cells[target, :tokens] = self._cells[source, :tokens]

    def of(self, key: int, tokens: int) -> Tokens:
        return self._cells.reshape(-1)[self._places(key, tokens)]

    def write(self, key: int, past: int, tokens: Tokens) -> None:
        places = self._places(key, past + len(tokens))[past:]
        self._cells.reshape(-1)[places] = tokens

    def _places(self, key: int, tokens: int) -> npt.NDArray[np.int64]:
        place, width = self._kv.place(key), self._kv.unit_tokens
        positions = np.arange(tokens)
        if place.blocks is None:
            assert place.slot is not None
            return place.slot * width + positions
        return place.blocks[positions // width].astype(np.int64) * width + positions % width


@pytest.mark.parametrize("shape", ["paged", "slots"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_reused_kv_is_always_that_of_the_same_tokens(shape: str, data: st.DataObject) -> None:
    kv: KvCache = paged(blocks=14, block_tokens=4) if shape == "paged" else slotted()
    memory, lives, key = Memory(kv), dict[int, Life](), 0
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["admit", "admit", "advance", "advance", "release"]))
        if action == "admit":
            stem = data.draw(st.sampled_from([0, 0, 1]))
            rest = data.draw(st.lists(st.integers(0, 1), min_size=0, max_size=18))
            tokens = ids(stem, *[7] * data.draw(st.sampled_from([3, 12, 17])), *rest)
            key += 1  # a key never comes back with other tokens
            match = kv.match(key, tokens)
            need = -(-len(tokens) // kv.unit_tokens) - match.units + match.drawn
            if need > kv.free:
                continue
            computed = kv.admit(key, tokens)
            memory.copy()
            assert computed < len(tokens)
            assert (memory.of(key, computed) == tokens[:computed]).all()
            lives[key] = Life(tokens, computed)
        elif lives:
            chosen = data.draw(st.sampled_from(sorted(lives)))
            life = lives[chosen]
            if action == "advance":
                draft = data.draw(st.sampled_from([0, 0, 2, 9]))
                _advance(kv, memory, chosen, life, data.draw(st.sampled_from([1, 5, 40])), draft)
            else:
                kv.release(chosen, forget=data.draw(st.booleans()))
                del lives[chosen]
        kv.check_integrity()
    for chosen in lives:
        kv.release(chosen)
    assert kv.free == kv.units


def _advance(kv: KvCache, memory: Memory, key: int, life: Life, step: int, draft: int) -> None:
    """Compute up to `step` tokens and `draft` guesses, none of which hold."""
    if life.computed == len(life.tokens):
        life.tokens = np.append(life.tokens, [3])
    end = min(life.computed + step, len(life.tokens))
    missing = -(-(end + draft) // kv.unit_tokens) - kv.held(key)
    if missing > kv.free or end + draft > SLOT_TOKENS:
        return
    kv.grow(key, end + draft)
    memory.write(key, life.computed, life.tokens[life.computed : end])
    memory.write(key, end, np.full(draft, GARBAGE))
    kv.commit(key, life.tokens[:end])
    kv.trim(key, end)
    life.computed = end
    assert kv.held(key) == -(-end // kv.unit_tokens)
    assert (memory.of(key, end) == life.tokens[:end]).all()
