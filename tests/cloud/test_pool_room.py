"""Who makes room for a model: nobody in use, nobody in vain, the longest unused first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.cloud.gpu_memory import MemoryPart, MemorySum
from tidegate.cloud.pool_room import MIB, Resident, plan_room, sum_of

residents = st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=6).map(
    lambda found: [
        Resident(name=f"m{place}", nbytes=nbytes, idle=idle, used=(7 * place) % 11)
        for place, (nbytes, idle) in enumerate(found)
    ]
)


def idle(name: str, nbytes: int, used: int) -> Resident:
    return Resident(name=name, nbytes=nbytes, idle=True, used=used)


@given(nbytes=st.integers(0, 120), budget=st.integers(0, 120), others=residents)
def test_what_it_says_fits_does_and_nobody_goes_in_vain(
    nbytes: int, budget: int, others: list[Resident]
) -> None:
    room = plan_room(nbytes, budget, others)
    gone = [one for one in others if one.name in room.unload]
    left = sum(one.nbytes for one in others) - sum(one.nbytes for one in gone)
    assert all(one.idle for one in gone)
    match room.verdict:
        case "fits":
            assert left + nbytes <= budget or not gone
            assert all(left + one.nbytes + nbytes > budget for one in gone)
        case "wait":
            busy = sum(one.nbytes for one in others if not one.idle)
            assert busy + nbytes > budget >= nbytes
        case "never":
            assert nbytes > budget


def test_the_longest_unused_goes_first() -> None:
    others = [idle("new", 30, used=9), idle("old", 30, used=1), idle("middle", 30, used=5)]
    assert plan_room(40, 100, others).unload == ("old",)
    assert plan_room(70, 100, others).unload == ("old", "middle")


def test_a_small_one_stays_when_a_large_one_has_to_go_anyway() -> None:
    others = [idle("small", 5, used=1), idle("large", 60, used=2)]
    assert plan_room(60, 100, others).unload == ("large",)


def test_without_a_budget_everything_fits() -> None:
    assert plan_room(10**12, None, [idle("other", 10**12, used=1)]).verdict == "fits"


def test_the_sum_names_every_part_and_who_is_in_use() -> None:
    memory = MemorySum(parts=(MemoryPart(name="weights", nbytes=3 * MIB),))
    busy = Resident(name="other", nbytes=2 * MIB, idle=False, used=1)
    told = sum_of("new", memory, 4 * MIB, [busy])
    assert told.startswith("model 'new' needs 3 MiB and the models may take 4 MiB together:")
    lines = [line.split() for line in told.splitlines()[1:]]
    assert ["new:", "weights", "3", "MiB"] in lines
    assert ["other", "(in", "use)", "2", "MiB"] in lines
    assert ["sum", "5", "MiB"] in lines
