"""Which models to unload so that another one fits: pure, least recently used first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tidegate.cloud.gpu_memory import MemoryPart, MemorySum

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """A model in memory, or on its way there."""

    name: str
    nbytes: int
    idle: bool
    """Nobody uses it, waits for it or is being served by it."""
    used: int
    """A number that grows with every use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What has to happen before a model can be loaded."""

    verdict: Literal["fits", "wait", "never"]
    """`fits` once `unload` is gone; `wait`: those in use would have to go, too; `never`: it is
    larger than all there is."""
    unload: tuple[str, ...] = ()


def plan_room(nbytes: int, budget_bytes: int | None, residents: Sequence[Resident]) -> Room:
    """Decide who makes room for `nbytes`.

    Args:
        nbytes: of the model that is to be loaded.
        budget_bytes: that all models may take; None for no bound.
        residents: who takes some of it now.
    """
    if budget_bytes is None:
        return Room(verdict="fits")
    if nbytes > budget_bytes:
        return Room(verdict="never")
    missing = nbytes + sum(one.nbytes for one in residents) - budget_bytes
    chosen: list[Resident] = []
    for one in sorted(residents, key=lambda resident: resident.used):
        if missing <= 0:
            break
        if one.idle and one.nbytes:
            chosen.append(one)
            missing -= one.nbytes
    if missing > 0:
        return Room(verdict="wait")
    for one in reversed(chosen[:-1]):  # a large one may have made a small one's going needless
        if one.nbytes <= -missing:
            chosen.remove(one)
            missing += one.nbytes
    return Room(verdict="fits", unload=tuple(one.name for one in chosen))


def sum_of(name: str, memory: MemorySum, budget_bytes: int, residents: Sequence[Resident]) -> str:
    """Why a model does not fit, with everything added up, for people."""
    own = [MemoryPart(name=f"{name}: {part.name}", nbytes=part.nbytes) for part in memory.parts]
    others = [
        MemoryPart(name=f"{one.name}{'' if one.idle else ' (in use)'}", nbytes=one.nbytes)
        for one in sorted(residents, key=lambda resident: resident.used)
    ]
    whole = MemorySum(parts=(*own, *others))
    return (
        f"model {name!r} needs {mib(memory.nbytes)} MiB and the models may take"
        f" {mib(budget_bytes)} MiB together:\n{whole.lines()}"
    )


def mib(nbytes: int) -> int:
    """Whole MiB, rounded up."""
    return -(-nbytes // MIB)
