"""The parts of a simulated world of the link that outlive their processes."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from linklab import CrashingDatabase

from tidegate.link import gateway_store
from tidegate.link.effects import Publish, RunId
from tidegate.link.fleet import add_gateway, pair
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_output import Produced
from tidegate.link.identity import DeviceIdentity, GatewayIdentity, load_gateway
from tidegate.link.prekeys import PrekeyStore
from tidegate.link.topics import GONE, HERE, Topics
from tidegate.link.transport import Message

DEADLINE_S = 3 * 3600.0
"""More than a clock is wrong. A device that was asked while two hours slow and started again while
two hours fast gives up all the same: `deadline_exceeded`, which is told and not lost."""


def make_fleet(root: Path) -> None:
    """One device and two gateways that know it, for any number of worlds."""
    pair(root / "device", root / "gateway")
    add_gateway(root / "gateway" / "fleet", root / "gateway1", "gw1")


@dataclass
class App:
    """What one request's application has seen in this life of the device."""

    next_number: int = 0
    ends: int = 0


@dataclass(eq=False)
class GatewayEnd:
    """A gateway that may be dead, and its disk, which outlives it."""

    name: str
    disk: CrashingDatabase
    identity: GatewayIdentity
    prekeys: PrekeyStore
    life: int = 0
    core: GatewayCore | None = None
    advert: Publish | None = None
    """What the broker keeps of it."""
    handlers: dict[RunId, list[bytes]] = field(default_factory=dict)
    inbox: list[Message] = field(default_factory=list)
    outputs: list[Produced] = field(default_factory=list)
    """What its next turn will take."""


WALL_S = 1_800_000_000.0
"""Unix seconds when a world begins."""


def new_gateway(fleet: Path, scratch: Path, seed: int, number: int) -> GatewayEnd:
    """Gateway `number` of `make_fleet`'s, with a disk of its own for this history."""
    stem = f"{seed}-{number}"
    return GatewayEnd(
        name=f"gw{number}",
        disk=CrashingDatabase(scratch / f"g{stem}.sqlite", gateway_store.SCHEMA),
        identity=load_gateway(fleet / ("gateway" if number == 0 else f"gateway{number}")),
        prekeys=PrekeyStore(scratch / f"prekeys{stem}.json"),
    )


class Agenda:
    """A virtual clock, what happens when, and how wrong the ends' own clocks are."""

    now_s: float
    rng: random.Random

    def begin(self, rng: random.Random) -> None:
        self.now_s, self.rng = 0.0, rng
        self.skew_s: dict[str, float] = {}
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], object]]] = []

    def wall_s(self, name: str) -> float:
        """The wall clock of an end, which may be wrong."""
        return WALL_S + self.now_s + self.skew_s.get(name, 0.0)

    def jump(self, names: Sequence[str]) -> None:
        """The clock of one of them is set wrong, and mended after a while."""
        name = self.rng.choice(names)
        most_s = self.rng.choice((500.0, 7200.0))
        self.skew_s[name] = self.rng.uniform(-most_s, most_s)
        self.after(self.rng.uniform(0.5, 20.0), lambda: self.skew_s.pop(name, None))

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._order), action))

    def repeat(self, every_s: float, action: Callable[[], None], *, until_s: float) -> None:
        """At random times, `every_s` apart on average."""

        def again() -> None:
            if self.now_s < until_s:
                action()
                self.after(self.rng.expovariate(1 / every_s), again)

        self.after(self.rng.expovariate(1 / every_s), again)

    def next_s(self, until_s: float) -> float:
        return self._due[0][0] if self._due else until_s

    def act(self) -> None:
        """Do what is due now."""
        while self._due and self._due[0][0] <= self.now_s:
            heapq.heappop(self._due)[2]()


def presence(
    rng: random.Random, device: DeviceIdentity, word: bytes, handle: str | None = None
) -> Publish:
    """What a broker says of a device: `word`, then the random name of a connection."""
    topic = Topics(device.group).presence(handle or device.handle)
    return Publish(topic=topic, payload=word + rng.randbytes(16))


def false_presence(rng: random.Random, device: DeviceIdentity) -> Publish:
    """What need not be true, need not be new, need not be clear, and need not be about anybody."""
    word = rng.choice((GONE, GONE, HERE, b"", rng.randbytes(1)))
    return presence(rng, device, word, rng.choice((None, None, "f" * 32)))
