"""The words of the house: places, devices, sensors, and which combinations training never sees.

A combination is a triple such as (lamp, kitchen, on) or (reading, kitchen, humidity).
About one in twelve is held out: it appears in the test split only.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Final

ROOMS: Final = (
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
LETTERED_PLACES: Final = ("bay", "bench", "rack", "shelf", "tank")
LETTERS: Final = "ABCDEFGHIJKLMNOPQRST"

HELD_OUT_ONE_IN: Final = 12


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A measured quantity: its unit and the words that compare it."""

    name: str
    unit: str
    more: str
    most: str
    least: str


SENSORS: Final = (
    Sensor(name="temperature", unit="C", more="warmer", most="warmest", least="coldest"),
    Sensor(name="humidity", unit="%", more="more humid", most="most humid", least="driest"),
    Sensor(name="light", unit="lx", more="brighter", most="brightest", least="darkest"),
    Sensor(name="noise", unit="dB", more="louder", most="loudest", least="quietest"),
    Sensor(
        name="power",
        unit="W",
        more="using more power",
        most="using the most power",
        least="using the least power",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Something that can be switched: its states, and the value it takes if it takes one."""

    name: str
    states: tuple[str, ...]
    value_name: str | None = None
    value_unit: str = ""
    lowest: int = 0
    highest: int = 0


SWITCH: Final = ("on", "off")
BARRIER: Final = ("open", "closed")

DEVICES: Final = (
    Device(
        name="lamp",
        states=SWITCH,
        value_name="brightness",
        value_unit="percent",
        lowest=5,
        highest=99,
    ),
    Device(name="fan", states=SWITCH, value_name="speed", lowest=1, highest=9),
    Device(
        name="heater",
        states=SWITCH,
        value_name="temperature",
        value_unit="degrees",
        lowest=10,
        highest=30,
    ),
    Device(name="radio", states=SWITCH, value_name="volume", lowest=1, highest=60),
    Device(name="pump", states=SWITCH),
    Device(name="humidifier", states=SWITCH),
    Device(name="compressor", states=SWITCH),
    Device(name="drill press", states=SWITCH),
    Device(name="dust extractor", states=SWITCH),
    Device(
        name="kiln",
        states=SWITCH,
        value_name="temperature",
        value_unit="degrees",
        lowest=100,
        highest=990,
    ),
    Device(name="window", states=BARRIER),
    Device(name="door", states=(*BARRIER, "locked", "unlocked")),
    Device(name="gate", states=(*BARRIER, "locked", "unlocked")),
    Device(
        name="blind",
        states=BARRIER,
        value_name="position",
        value_unit="percent",
        lowest=5,
        highest=95,
    ),
    Device(name="valve", states=BARRIER),
)
ADJUSTABLE: Final = tuple(device for device in DEVICES if device.value_name is not None)


def is_held_out(subject: str, place: str, verb: str) -> bool:
    """Whether the combination is kept for the test split."""
    return zlib.crc32(f"{subject}|{place}|{verb}".encode()) % HELD_OUT_ONE_IN == 0


def reading_is_held_out(place: str, sensor: Sensor) -> bool:
    """Whether asking for this sensor in this place is kept for the test split."""
    return is_held_out("reading", place, sensor.name)


def draw_switching(rng: random.Random, *, held_out: bool) -> tuple[Device, str, str]:
    """Draw (device, room, state), from the held-out combinations or from the others."""
    while True:
        device, room = rng.choice(DEVICES), rng.choice(ROOMS)
        state = rng.choice(device.states)
        if is_held_out(device.name, room, state) == held_out:
            return device, room, state


def draw_adjustment(rng: random.Random, *, held_out: bool) -> tuple[Device, str, int]:
    """Draw (device, room, value) for a device that takes a value."""
    while True:
        device, room = rng.choice(ADJUSTABLE), rng.choice(ROOMS)
        if is_held_out(device.name, room, "value") == held_out:
            step = 10 if device.highest > 99 else 1
            return device, room, rng.randrange(device.lowest, device.highest + 1, step)


def draw_place(rng: random.Random, *, lettered_share: float = 0.15) -> str:
    """Draw a room, or now and then a lettered place of the workshop such as ``bay C``."""
    if rng.random() < lettered_share:
        return f"{rng.choice(LETTERED_PLACES)} {rng.choice(LETTERS)}"
    return rng.choice(ROOMS)
