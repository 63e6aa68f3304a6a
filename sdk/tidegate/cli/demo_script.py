"""What the demo asks, and which route each request should take and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tidegate.api.backend import Route
from tidegate.client import AskOptions

TABLE = """Readings:
temperature:
kitchen 21
bedroom 18
attic 30
power:
workshop 84
garage 7"""

ROOMS = (
    "kitchen",
    "bedroom",
    "bathroom",
    "living room",
    "hallway",
    "garage",
    "office",
    "attic",
    "cellar",
    "workshop",
    "garden",
    "nursery",
)
SHELVES = ("bay", "bench", "rack", "shelf", "tank")
LETTERS = "ABCDEFGHIJKLMNOPQRST"


def long_table() -> str:
    """Over a hundred readings: too many tokens for the context that the demo gives the device."""
    shelves = [f"{place} {letter}" for place in SHELVES for letter in LETTERS]
    temperatures = [f"{room} {10 + (7 * i) % 25}" for i, room in enumerate(ROOMS)]
    humidities = [f"{place} {1 + (37 * i) % 99}" for i, place in enumerate(shelves)]
    return "\n".join(["Readings:", "temperature:", *temperatures, "humidity:", *humidities])


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """One request of the demo."""

    title: str
    prompt: str
    options: AskOptions
    expected: Route | Literal["refused"]
    by_energy: Route | None = None
    """Another route that is as right, where the device schedules by energy."""
    while_busy: bool = False
    """Send it while the device's queue is full of background work."""

    @property
    def right(self) -> frozenset[str]:
        """Routes that it may take."""
        return frozenset((self.expected, self.by_energy or self.expected))

    def scheduled(self, *, by_energy: bool) -> DemoRequest:
        """The same for a device that schedules by energy, or does not."""
        return self if by_energy else replace(self, by_energy=None)


GREEDY = AskOptions(temperature=0.0, max_tokens=64)
REPEATED = f"{TABLE}\nWhat is the temperature in the kitchen?"

REQUESTS = (
    DemoRequest(title="small talk", prompt="hello", options=GREEDY, expected="edge"),
    DemoRequest(
        title="easy command",
        prompt="turn on the lamp in the kitchen",
        options=GREEDY,
        expected="edge",
    ),
    DemoRequest(title="easy question", prompt=REPEATED, options=GREEDY, expected="edge"),
    DemoRequest(
        title="with a deadline",
        prompt=f"{TABLE}\nWhich place is warmest?",
        options=GREEDY | AskOptions(deadline_ms=20_000),
        expected="edge",
    ),
    DemoRequest(title="identical repeat", prompt=REPEATED, options=GREEDY, expected="cache"),
    DemoRequest(
        title="too long for the device",
        prompt=f"{long_table()}\nWhat is the temperature in the attic?",
        options=GREEDY,
        expected="cloud",
    ),
    DemoRequest(
        title="asked for the cloud",
        prompt=f"{TABLE}\nAdd the temperature of the kitchen and the attic.",
        options=GREEDY | AskOptions(route="cloud"),
        expected="cloud",
    ),
    DemoRequest(
        title="private",
        prompt="switch off the heater in the bedroom",
        options=GREEDY | AskOptions(privacy="local"),
        expected="edge",
    ),
    DemoRequest(
        title="private and too long",
        prompt=f"{long_table()}\nWhat is the temperature in the garden?",
        options=GREEDY | AskOptions(privacy="local"),
        expected="refused",
    ),
    DemoRequest(
        title="tight deadline, full queue",
        prompt="turn off the fan in the office",
        options=GREEDY | AskOptions(deadline_ms=150, priority="interactive"),
        expected="cloud",
        # By deadline it is the first in line there, and neither place may make it in time.
        by_energy="edge",
        while_busy=True,
    ),
    DemoRequest(
        title="private, full queue",
        prompt="turn on the fan in the garage",
        options=GREEDY | AskOptions(privacy="local", priority="interactive"),
        expected="edge",
        while_busy=True,
    ),
)

BUSY_WORK = AskOptions(
    temperature=0.0, max_tokens=256, ignore_eos=True, route="edge", priority="background"
)
BUSY_REQUESTS = 24
"""Enough that the device, four at a time, needs seconds: far beyond the tight deadline."""
