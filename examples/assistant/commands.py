"""Commands and schedules: an instruction in words becomes one JSON action, or an array of them.

An action's keys always come in the same order: action, device, room, then state or value,
then minutes or at. There is one right answer, so exact match is the measure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, TypeAlias

from .domain import (
    ROOMS,
    SENSORS,
    Device,
    draw_adjustment,
    draw_switching,
    is_held_out,
    reading_is_held_out,
)
from .turns import Turn, compact_json

Action: TypeAlias = dict[str, str | int]

PLAIN_WORDS: Final = {
    "on": ("turn on", "switch on"),
    "off": ("turn off", "switch off"),
    "open": ("open",),
    "closed": ("close",),
    "locked": ("lock",),
    "unlocked": ("unlock",),
}
OTHER_WORDS: Final = {
    "on": ("start", "power up", "get me", "fire up"),
    "off": ("stop", "shut down", "kill", "power down"),
    "open": ("open up", "unblock"),
    "closed": ("shut", "close up"),
    "locked": ("bolt", "secure"),
    "unlocked": ("unbolt", "release"),
}
POLITE_STARTS: Final = ("", "please ", "can you ", "could you ", "I want you to ", "hey, ")
HINTS: Final = (
    ("it is too dark in the {room}", "lamp", "on"),
    ("it is too bright in the {room}", "lamp", "off"),
    ("it is freezing in the {room}", "heater", "on"),
    ("the {room} is stuffy", "fan", "on"),
    ("the air in the {room} is too dry", "humidifier", "on"),
    ("it is too loud in the {room}", "radio", "off"),
    ("some music in the {room} would be nice", "radio", "on"),
    ("the {room} is full of sawdust", "dust extractor", "on"),
    ("the {room} is flooded", "pump", "on"),
    ("let some fresh air into the {room}", "window", "open"),
)


def switching(device: str, room: str, state: str) -> Action:
    """Return the action that puts a device into a state."""
    return {"action": "set", "device": device, "room": room, "state": state}


def adjusting(device: Device, room: str, value: int) -> Action:
    """Return the action that gives a device a value."""
    return {"action": "set", "device": device.name, "room": room, "value": value}


def say_switching(rng: random.Random, device: str, room: str, state: str, *, plain: bool) -> str:
    """Put a switching action into words."""
    words = rng.choice(PLAIN_WORDS[state] if plain else OTHER_WORDS[state] + PLAIN_WORDS[state])
    return rng.choice((f"{words} the {device} in the {room}", f"{words} the {room} {device}"))


def say_adjusting(rng: random.Random, device: Device, room: str, value: int) -> str:
    """Put a value action into words."""
    amount = f"{value} {device.value_unit}".strip()
    return rng.choice(
        (
            f"set the {room} {device.name} to {amount}",
            f"set the {device.name} in the {room} to {amount}",
            f"put the {device.value_name} of the {room} {device.name} at {amount}",
            f"{device.name} {device.value_name} {amount} in the {room}",
        )
    )


def draw_clock(rng: random.Random) -> str:
    """Draw a time of day on a five-minute mark."""
    return f"{rng.randrange(24):02d}:{rng.randrange(0, 60, 5):02d}"


def dressed(rng: random.Random, sentence: str) -> str:
    """Vary how a sentence starts and ends without changing what it asks for."""
    start = rng.choice(POLITE_STARTS)
    text = start + sentence
    if not start and rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", ".", " please") if not start else ("", "."))


def plain_command(rng: random.Random, *, held_out: bool) -> Turn:
    """Tier 1: one device, one state, said plainly."""
    device, room, state = draw_switching(rng, held_out=held_out)
    said = say_switching(rng, device.name, room, state, plain=True)
    question = said[0].upper() + said[1:] if rng.random() < 0.5 else said
    answer = compact_json(switching(device.name, room, state))
    return Turn(tier=1, kind="command", question=question, answer=answer, held_out=held_out)


def value_command(rng: random.Random, *, held_out: bool) -> Turn:
    """Tier 2: a device and the value it should take."""
    device, room, value = draw_adjustment(rng, held_out=held_out)
    question = dressed(rng, say_adjusting(rng, device, room, value))
    answer = compact_json(adjusting(device, room, value))
    return Turn(tier=2, kind="value", question=question, answer=answer, held_out=held_out)


def timed_action(rng: random.Random, *, held_out: bool) -> tuple[str, Action]:
    """Return a switching action with a duration or a time of day, in words and as JSON."""
    device, room, state = draw_switching(rng, held_out=held_out)
    said = say_switching(rng, device.name, room, state, plain=False)
    action = switching(device.name, room, state)
    if rng.random() < 0.5:
        minutes = rng.randint(1, 90)
        return f"{said} for {minutes} minutes", action | {"minutes": minutes}
    clock = draw_clock(rng)
    return f"{said} at {clock}", action | {"at": clock}


def timed_command(rng: random.Random, *, held_out: bool) -> Turn:
    """Tier 2: a state with a duration or a time of day."""
    said, action = timed_action(rng, held_out=held_out)
    question = dressed(rng, said)
    answer = compact_json(action)
    return Turn(tier=2, kind="timed", question=question, answer=answer, held_out=held_out)


def paraphrased_command(rng: random.Random, *, held_out: bool) -> Turn:
    """Tier 2: the same as tier 1 in other words, or only hinted at."""
    if rng.random() < 0.5:
        device, room, state = draw_switching(rng, held_out=held_out)
        name = device.name
        said = say_switching(rng, name, room, state, plain=False)
    else:
        while True:
            hint, name, state = rng.choice(HINTS)
            room = rng.choice(ROOMS)
            if is_held_out(name, room, state) == held_out:
                break
        said = hint.format(room=room)
    question, answer = dressed(rng, said), compact_json(switching(name, room, state))
    return Turn(tier=2, kind="paraphrase", question=question, answer=answer, held_out=held_out)


def read_command(rng: random.Random, *, held_out: bool) -> Turn:
    """Tier 1: a question about a sensor when no readings were given asks for the reading."""
    while True:
        sensor, room = rng.choice(SENSORS), rng.choice(ROOMS)
        if reading_is_held_out(room, sensor) == held_out:
            break
    question = f"{rng.choice(('read', 'check', 'measure'))} the {sensor.name} in the {room}"
    answer = compact_json({"action": "read", "sensor": sensor.name, "room": room})
    return Turn(tier=1, kind="read", question=question, answer=answer, held_out=held_out)


def any_action(rng: random.Random, *, held_out: bool) -> tuple[str, Action]:
    """Return one step of a schedule, in words and as JSON."""
    if rng.random() < 0.5:
        return timed_action(rng, held_out=held_out)
    if rng.random() < 0.5:
        device, room, value = draw_adjustment(rng, held_out=held_out)
        return say_adjusting(rng, device, room, value), adjusting(device, room, value)
    device, room, state = draw_switching(rng, held_out=held_out)
    said = say_switching(rng, device.name, room, state, plain=True)
    return said, switching(device.name, room, state)


def schedule(rng: random.Random, *, held_out: bool) -> Turn:
    """Tier 3: two or three steps in one sentence, answered by an array."""
    steps = [any_action(rng, held_out=held_out and n == 0) for n in range(rng.choice((2, 2, 3)))]
    joint = rng.choice((" and ", ", then ", " and then "))
    question = dressed(rng, joint.join(said for said, _ in steps))
    answer = compact_json([action for _, action in steps])
    return Turn(tier=3, kind="schedule", question=question, answer=answer, held_out=held_out)


def arithmetic(rng: random.Random, *, held_out: bool) -> Turn | None:
    """Tier 4: a bare sum or difference of two numbers below a hundred."""
    if held_out:
        return None
    left, right = rng.randint(1, 99), rng.randint(1, 99)
    if rng.random() < 0.6:
        question = rng.choice((f"add {left} and {right}", f"what is {left} plus {right}?"))
        answer = f"{left}+{right}={left + right}"
    else:
        left, right = max(left, right), min(left, right)
        question = f"what is {left} minus {right}?"
        answer = f"{left}-{right}={left - right}"
    return Turn(tier=4, kind="arithmetic", question=question, answer=answer)


CommandTask: TypeAlias = Callable[..., Turn | None]

COMMAND_TASKS: Final[dict[int, tuple[CommandTask, ...]]] = {
    1: (plain_command, plain_command, plain_command, read_command),
    2: (value_command, timed_command, paraphrased_command),
    3: (schedule,),
    4: (arithmetic,),
}
