"""Whole histories of the link from a number alone, and whether they kept the promise.

The promise: every request that was accepted is answered once and whole, or reported as failed,
whatever is lost, repeated, reordered, cut off, set wrong or killed between any two writes.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from linkweather import Setting, Weather, any_presence, any_setting, any_weather
from linkworld import World

LENGTHS = (0, 1, 12, 60)
"""Payloads of the four answers of a history."""
UNTIL_S = 900.0
"""The weather is calm from a minute on: what has not ended by then is lost."""


@dataclass(frozen=True, kw_only=True)
class CrashPoint:
    """Where an end dies: before or after its `write`-th write, alone or with its machine."""

    end: str
    write: int
    after: bool
    power_cut: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one history's requests."""

    submitted: int
    answered: int
    failed: int
    lost: int
    wrong: int
    crashes: int
    writes_lost: int
    """By power cuts, all before they were synced."""
    messages: int
    runs: int
    ended_s: float
    counters: Counter[str]
    problem: str = ""
    """What was found delivered twice or otherwise impossible; empty when nothing was."""

    @property
    def kept(self) -> bool:
        """Nothing lost, wrong or twice."""
        return not (self.lost or self.wrong or self.problem)


def history(seed: int, fleet: Path, scratch: Path) -> Verdict:
    """Play the history of `seed`: weather, ends and everything that happens come from it.

    Args:
        seed: any number.
        fleet: of `linkends.make_fleet`.
        scratch: where its files go; they are removed.
    """
    rng = random.Random(f"history {seed}")
    weather, setting = any_weather(rng), any_setting(rng)
    return play(seed, any_presence(rng, weather), setting, fleet, scratch)


def crash_points(seed: int, fleet: Path, scratch: Path) -> list[CrashPoint]:
    """Every write that either end makes in calm weather, before and after, in each of both ways."""
    writes: dict[str, int] = {}
    play(seed, Weather(), Setting(), fleet, scratch, writes=writes)
    return [
        CrashPoint(end=end, write=write, after=after, power_cut=power_cut)
        for end, count in writes.items()
        for write in range(count)
        for after in (False, True)
        for power_cut in (False, True)
    ]


def with_crash(seed: int, crash: CrashPoint, fleet: Path, scratch: Path) -> Verdict:
    """The calm history of `seed`, but one end dies once."""
    return play(seed, Weather(), Setting(), fleet, scratch, crash=crash)


def play(
    seed: int,
    weather: Weather,
    setting: Setting,
    fleet: Path,
    scratch: Path,
    *,
    crash: CrashPoint | None = None,
    writes: dict[str, int] | None = None,
) -> Verdict:
    """One history of four requests in given weather; `writes` gets how many each end made."""
    world = World(seed=seed, weather=weather, fleet=fleet, scratch=scratch, setting=setting)
    disks = {"device": world.device_disk, "gateway": world.gateways[0].disk}
    every_disk = [world.device_disk, *(end.disk for end in world.gateways)]
    made = {end: disk.writes for end, disk in disks.items()}
    problem = ""
    if crash is not None:
        disk = disks[crash.end]
        disk.fuse, disk.after_commit = crash.write, crash.after
        disk.power_cut = crash.power_cut
    try:
        for payloads in LENGTHS:
            world.after(world.rng.uniform(0.0, 20.0), partial(world.ask, payloads))
        world.run(len(LENGTHS), until_s=UNTIL_S)
    except AssertionError as error:
        problem = str(error) or "an assertion failed"
    finally:
        world.close()
        for path in scratch.glob(f"*{seed}*"):
            path.unlink()
    if writes is not None:
        writes.update({end: disk.writes - made[end] for end, disk in disks.items()})
    wrong = [name for name, said in world.results.items() if said != world.expected[name]]
    counters: Counter[str] = Counter()
    for core in (world.device, *(end.core for end in world.gateways)):
        if core is not None:
            counters.update(asdict(core.tally.snapshot()))
    return Verdict(
        submitted=len(world.expected),
        answered=len(world.results),
        failed=len(world.failures),
        lost=len(world.expected) - len(world.results) - len(world.failures),
        wrong=len(wrong),
        crashes=world.crashes,
        writes_lost=sum(disk.lost_writes for disk in every_disk),
        messages=len(world.sent),
        runs=sum(world.runs.values()),
        ended_s=world.now_s,
        counters=counters,
        problem=problem,
    )
