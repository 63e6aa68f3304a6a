"""Which replica is asked first: the same one for the same beginning, and never a crowded one."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tidegate.cloud.ray.affinity import anchor_of, order, ranked
from tidegate.engine.executor import PagedGeometry
from tidegate.engine.paged_kv import PagedKv

NAMES = st.lists(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=1, unique=True)
KEYS = st.binary(min_size=1, max_size=64)
LOADS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=6), st.integers(0, 60), min_size=1, max_size=8
)


@given(KEYS, NAMES)
def test_a_replica_that_leaves_moves_only_its_own_keys(key: bytes, replicas: list[str]) -> None:
    line = ranked(key, replicas)
    for gone in replicas:
        assert ranked(key, [one for one in replicas if one != gone]) == [
            one for one in line if one != gone
        ]


def test_keys_are_spread_evenly() -> None:
    replicas = [f"replica{number}" for number in range(4)]
    first = Counter(ranked(number.to_bytes(4), replicas)[0] for number in range(4000))
    # Binomial: 1000 with a deviation of 27; five of them.
    assert all(860 < count < 1140 for count in first.values())


@given(st.none() | KEYS, LOADS, KEYS, st.integers(0, 10))
def test_every_replica_is_asked_once(
    anchor: bytes | None, loads: dict[str, int], salt: bytes, slack: int
) -> None:
    assert sorted(order(anchor, loads, salt=salt, slack=slack)) == sorted(loads)


@given(KEYS, LOADS, KEYS, st.integers(0, 10))
def test_the_favourite_is_first_unless_it_is_busier_than_it_may(
    anchor: bytes, loads: dict[str, int], salt: bytes, slack: int
) -> None:
    favourite = ranked(anchor, list(loads))[0]
    first = order(anchor, loads, salt=salt, slack=slack)[0]
    if loads[favourite] <= min(loads.values()) + slack:
        assert first == favourite
    else:
        assert loads[first] < loads[favourite]


@given(KEYS, LOADS, KEYS, st.integers(0, 10))
def test_a_busy_favourite_gives_way_to_the_lighter_of_the_next_two(
    anchor: bytes, loads: dict[str, int], salt: bytes, slack: int
) -> None:
    favourite, *others = ranked(anchor, list(loads))
    first = order(anchor, loads, salt=salt, slack=slack)[0]
    lighter = min((loads[one] for one in others[:2]), default=loads[favourite])
    if first != favourite and lighter < loads[favourite]:
        assert first in others[:2]
        assert loads[first] == lighter


@given(LOADS, KEYS)
def test_without_a_beginning_the_lighter_of_two_is_asked(
    loads: dict[str, int], salt: bytes
) -> None:
    two = ranked(salt, list(loads))[:2]
    first = order(None, loads, salt=salt)[0]
    assert first in two
    assert loads[first] == min(loads[one] for one in two)


def test_without_replicas_nobody_is_asked() -> None:
    assert order(b"key", {}, salt=b"salt") == []
    assert order(None, {}, salt=b"salt") == []


@given(st.lists(st.integers(0, 50_000), max_size=40), st.lists(st.integers(0, 9), max_size=8))
def test_an_anchor_is_that_of_the_first_blocks_alone(start: list[int], rest: list[int]) -> None:
    anchor = anchor_of(start, block_tokens=4, anchor_blocks=2)
    assert (anchor is None) == (len(start) < 4)
    if len(start) >= 8:
        assert anchor_of(start + rest, block_tokens=4, anchor_blocks=2) == anchor


def test_an_anchor_is_the_key_of_the_engines_prefix_cache() -> None:
    prompt = list(range(40, 60))
    kv = PagedKv(PagedGeometry(block_tokens=4, blocks=8, bytes_per_token=1))
    tokens = np.asarray(prompt, dtype=np.int64)
    kv.admit(1, tokens)
    kv.grow(1, len(tokens))
    kv.commit(1, tokens)
    anchor = anchor_of(prompt, block_tokens=4, anchor_blocks=3)
    assert anchor in kv._by_chain_key
    assert list(kv._by_chain_key).index(anchor) == 2
