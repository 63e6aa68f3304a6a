"""A small table of sensor readings and the questions about it, from lookup to conditional action.

Readings are whole numbers from 1 to 99. A table has a heading per sensor, ``humidity:``, and under
it one line per reading, ``kitchen 45``.
An answer quotes the readings it rests on before it concludes, and sums show their working, so
each step depends on words already written: ``kitchen 21, attic 34: 21+34=55 W``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Final, TypeAlias

from .commands import say_switching, switching
from .domain import SENSORS, Sensor, draw_place, draw_switching, reading_is_held_out
from .turns import Turn, compact_json

HEADING: Final = "Readings:"
NO_READING: Final = "no reading"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One line of a table."""

    place: str
    sensor: Sensor
    value: int

    def __str__(self) -> str:
        return f"{self.place} {self.value}"

    @property
    def text(self) -> str:
        """The reading with its unit, as a lookup answers it."""
        return f"{self} {self.sensor.unit}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Readings in the order they are shown, by sensor; a (place, sensor) pair occurs once."""

    readings: tuple[Reading, ...]

    def __str__(self) -> str:
        lines = [HEADING]
        for sensor, readings in groupby(self.readings, key=lambda reading: reading.sensor):
            lines += [f"{sensor.name}:", *map(str, readings)]
        return "\n".join(lines)

    def of(self, sensor: Sensor) -> list[Reading]:
        """Return the readings of one sensor, in table order."""
        return [reading for reading in self.readings if reading.sensor == sensor]

    def askable(self, *, held_out: bool) -> list[Reading]:
        """Return the readings a question may name."""
        return [r for r in self.readings if reading_is_held_out(r.place, r.sensor) == held_out]


def draw_table(
    rng: random.Random,
    *,
    rows: int,
    lettered_share: float = 0.15,
    sensor_counts: tuple[int, ...] = (1, 2, 2, 3),
) -> Table:
    """Draw a table of few sensors, so that comparisons have company."""
    is_fixed = len(sensor_counts) == 1
    sensors = rng.sample(SENSORS, k=sensor_counts[0] if is_fixed else rng.choice(sensor_counts))
    chosen: dict[tuple[str, str], Reading] = {}
    while len(chosen) < rows:
        place, sensor = draw_place(rng, lettered_share=lettered_share), rng.choice(sensors)
        value = rng.randint(1, 99)
        reading = Reading(place=place, sensor=sensor, value=value)
        chosen.setdefault((place, sensor.name), reading)
    in_order = sorted(chosen.values(), key=lambda reading: sensors.index(reading.sensor))
    return Table(readings=tuple(in_order))


def lookup_words(rng: random.Random, reading: Reading, *, plain: bool) -> str:
    """Ask for one reading."""
    forms = [
        f"What is the {reading.sensor.name} in the {reading.place}?",
        f"{reading.place} {reading.sensor.name}?",
    ]
    if not plain:
        forms += [
            f"How much {reading.sensor.name} is there in the {reading.place}?",
            f"tell me the {reading.place} {reading.sensor.name}",
            f"{reading.sensor.name} in the {reading.place} please",
        ]
    return rng.choice(forms)


def lookup(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 1 in a table of up to four rows, tier 2 in a larger one."""
    askable = table.askable(held_out=held_out)
    if not askable:
        return None
    reading = rng.choice(askable)
    tier = 1 if len(table.readings) <= 4 else 2
    question = lookup_words(rng, reading, plain=tier == 1)
    kind = "long lookup" if len(table.readings) > 12 else "lookup"
    return Turn(tier=tier, kind=kind, question=question, answer=reading.text, held_out=held_out)


def missing(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 2: the table does not hold what is asked for."""
    asked = Reading(place=draw_place(rng), sensor=rng.choice(SENSORS), value=0)
    shown = {(r.place, r.sensor.name) for r in table.readings}
    if (asked.place, asked.sensor.name) in shown:
        return None
    if reading_is_held_out(asked.place, asked.sensor) != held_out:
        return None
    question = lookup_words(rng, asked, plain=False)
    return Turn(tier=2, kind="missing", question=question, answer=NO_READING, held_out=held_out)


def comparable(rng: random.Random, table: Table, *, fewest: int) -> list[Reading] | None:
    """Pick a sensor with enough distinct readings and return them, or None."""
    for sensor in rng.sample(SENSORS, k=len(SENSORS)):
        found = table.of(sensor)
        if len(found) >= fewest and len({r.value for r in found}) == len(found):
            return found
    return None


def named(
    rng: random.Random, table: Table, *, count: int, held_out: bool
) -> tuple[Reading, ...] | None:
    """Pick readings of one sensor for a question that names their places, or None.

    Without `held_out` no named combination is held out; with it, the first one is.
    """
    found = comparable(rng, table, fewest=count)
    if found is None:
        return None
    reserved = [r for r in found if reading_is_held_out(r.place, r.sensor)]
    usual = [r for r in found if r not in reserved]
    if not held_out:
        return tuple(rng.sample(usual, k=count)) if len(usual) >= count else None
    if not reserved or len(usual) < count - 1:
        return None
    return (rng.choice(reserved), *rng.sample(usual, k=count - 1))


def extreme(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 3: the place with the highest or the lowest reading."""
    found = comparable(rng, table, fewest=3)
    if found is None or held_out:
        return None
    sensor = found[0].sensor
    if rng.random() < 0.5:
        word, best = sensor.most, max(found, key=lambda r: r.value)
    else:
        word, best = sensor.least, min(found, key=lambda r: r.value)
    question = rng.choice((f"Which place is {word}?", f"Where is it {word}?"))
    if word.startswith("using"):
        question = f"Which place is {word}?"
    return Turn(tier=3, kind="extreme", question=question, answer=best.text)


def compare(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 3: whether one place has more of something than another."""
    pair = named(rng, table, count=2, held_out=held_out)
    if pair is None:
        return None
    left, right = pair
    question = f"Is the {left.place} {left.sensor.more} than the {right.place}?"
    verdict = "yes" if left.value > right.value else "no"
    answer = f"{quoted(pair)}: {verdict}"
    return Turn(tier=3, kind="compare", question=question, answer=answer, held_out=held_out)


def quoted(readings: Iterable[Reading]) -> str:
    """Quote readings as the table shows them."""
    return ", ".join(map(str, readings))


def beyond(rng: random.Random, found: list[Reading]) -> tuple[str, int, list[Reading]]:
    """Draw a limit that no reading equals, and return the readings on one side of it."""
    values = {r.value for r in found}
    limit = rng.choice([n for n in range(5, 96) if n not in values])
    if rng.random() < 0.5:
        return "above", limit, [r for r in found if r.value > limit]
    return "below", limit, [r for r in found if r.value < limit]


def which(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 3: the places above or below a limit, in table order."""
    found = comparable(rng, table, fewest=2)
    if found is None or held_out:
        return None
    side, limit, chosen = beyond(rng, found)
    question = f"Where is the {found[0].sensor.name} {side} {limit}?"
    answer = ", ".join(r.place for r in chosen) or "nowhere"
    return Turn(tier=3, kind="which", question=question, answer=answer)


def count(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 4: how many places are above or below a limit; the answer lists them first."""
    found = comparable(rng, table, fewest=3)
    if found is None or held_out:
        return None
    side, limit, chosen = beyond(rng, found)
    question = f"How many places have {found[0].sensor.name} {side} {limit}?"
    places = ", ".join(r.place for r in chosen) or "nowhere"
    answer = f"{places}: {len(chosen)}"
    return Turn(tier=4, kind="count", question=question, answer=answer)


def worked_sum(values: list[int], unit: str) -> str:
    """Write a sum two addends at a time: ``21+34=55, 55+12=67 W``."""
    steps, running = [], values[0]
    for value in values[1:]:
        steps.append(f"{running}+{value}={running + value}")
        running += value
    return f"{', '.join(steps)} {unit}"


def total(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 4: the sum of two or three named readings."""
    addends = named(rng, table, count=rng.choice((2, 2, 3)), held_out=held_out)
    if addends is None:
        return None
    *first, last = (f"the {r.place}" for r in addends)
    places = f"{', '.join(first)} and {last}"
    sensor = addends[0].sensor
    question = rng.choice(
        (f"What is the total {sensor.name} of {places}?", f"Add the {sensor.name} of {places}.")
    )
    answer = f"{quoted(addends)}: {worked_sum([r.value for r in addends], sensor.unit)}"
    return Turn(tier=4, kind="sum", question=question, answer=answer, held_out=held_out)


def difference(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 4: by how much two named readings differ, the larger one first."""
    pair = named(rng, table, count=2, held_out=held_out)
    if pair is None:
        return None
    left, right = pair
    high, low = max(left.value, right.value), min(left.value, right.value)
    question = (
        f"What is the {left.sensor.name} difference between the {left.place} and the {right.place}?"
    )
    answer = f"{quoted(pair)}: {high}-{low}={high - low} {left.sensor.unit}"
    return Turn(tier=4, kind="difference", question=question, answer=answer, held_out=held_out)


def conditional(rng: random.Random, table: Table, *, held_out: bool) -> Turn | None:
    """Tier 4: an action that depends on a reading, with another action otherwise."""
    subject = named(rng, table, count=1, held_out=held_out)
    if subject is None:
        return None
    reading = subject[0]
    side, limit, chosen = beyond(rng, [reading])
    said, actions = [], []
    for _ in range(2):
        device, room, state = draw_switching(rng, held_out=False)
        said.append(say_switching(rng, device.name, room, state, plain=True))
        actions.append(switching(device.name, room, state))
    question = (
        f"If the {reading.place} {reading.sensor.name} is {side} {limit}, "
        f"{said[0]}, otherwise {said[1]}."
    )
    answer = compact_json(actions[0] if chosen else actions[1])
    return Turn(tier=4, kind="conditional", question=question, answer=answer, held_out=held_out)


ReadingTask: TypeAlias = Callable[..., Turn | None]

READING_TASKS: Final[dict[int, tuple[ReadingTask, ...]]] = {
    1: (lookup,),
    2: (lookup, lookup, missing),
    3: (extreme, compare, which),
    4: (total, total, difference, count, conditional),
}
