"""What can go wrong around the link in a simulated history, and what may be at its ends."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tidegate.link.effects import Publish
from tidegate.link.timing import Pacing


@dataclass(frozen=True, kw_only=True)
class Weather:
    """Chances per message, and how often things happen, in simulated seconds; 0 is never."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    outage_every_s: float = 0.0
    """The broker is gone for a while, and forgets what it kept."""
    partition_every_s: float = 0.0
    """One direction loses everything for a while, and nobody is told."""
    clock_jump_every_s: float = 0.0
    """One end's wall clock is wrong by up to two hours, either way, for a while."""
    device_crash_every_s: float = 0.0
    gateway_crash_every_s: float = 0.0
    presence_lie_every_s: float = 0.0
    """The broker says something about a device's presence, true or not; 0 is not even the truth."""
    calm_after_s: float = 60.0
    """From then on nothing goes wrong, so that everything must end."""

    def damaged(self, message: Publish, rng: random.Random) -> Publish:
        """A message as it arrives: sometimes with one bit turned."""
        if rng.random() >= self.corrupt:
            return message
        payload = bytearray(message.payload)
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        return Publish(topic=message.topic, payload=bytes(payload))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the ends are set up."""

    gateways: int = 1
    pacing: Pacing = "off"
    window: int = 512


def any_weather(rng: random.Random) -> Weather:
    """Each kind of accident in two histories of three, from rare to more often than answers."""

    def chance(most: float) -> float:
        return rng.choice((0.0, 0.5, 1.0)) * rng.uniform(0.0, most)

    def every_s(least: float) -> float:
        return rng.choice((0.0, 1.0, 1.0)) * rng.uniform(least, 10 * least)

    return Weather(
        drop=chance(0.3),
        duplicate=chance(0.3),
        reorder=chance(0.3),
        corrupt=chance(0.1),
        outage_every_s=every_s(4.0),
        partition_every_s=every_s(4.0),
        clock_jump_every_s=every_s(4.0),
        device_crash_every_s=every_s(2.0),
        gateway_crash_every_s=every_s(2.0),
        calm_after_s=rng.uniform(20.0, 60.0),
    )


def any_presence(rng: random.Random, weather: Weather) -> Weather:
    """`weather` with a broker that lies about presence in two histories of three."""
    return replace(
        weather, presence_lie_every_s=rng.choice((0.0, 1.0, 1.0)) * rng.uniform(0.3, 5.0)
    )


def any_setting(rng: random.Random) -> Setting:
    """One or two gateways, any pacing, a window that may be smaller than the work."""
    return Setting(
        gateways=rng.choice((1, 1, 2)),
        pacing=rng.choice(("off", "tick", "constant")),
        window=rng.choice((1, 2, 512)),
    )
