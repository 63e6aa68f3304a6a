"""Families of requests: what a home, a chat, an editor or a sensor asks of a device in a day.

Sizes are drawn from quantiles of public traces and arrivals from the processes that fit them
(Azure LLM inference 2023, CC-BY 4.0, Patel et al., Splitwise, ISCA 2024; household counts from
studies of voice assistants). The shape of a home's day, deadlines, and shares of private and
background work are assumptions of ours, stated here. Source: energy-and-devices 4.2 and 4.3.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tidegate.edge.energy.simulate.jobs import Arrival, Job, Slack
from tidegate.errors import ConfigError

DAY_S: Final = 86_400.0
MOST_PROMPT: Final = 2048
MOST_OUTPUT: Final = 512

Quantiles = Sequence[tuple[float, float]]
"""(share of requests, tokens), from 0 to 1."""

CONV_IN: Final[Quantiles] = (
    (0, 16), (0.1, 207), (0.25, 396), (0.5, 1020), (0.75, 1189), (0.9, 2734), (1, 4142),
)  # fmt: skip
CONV_OUT: Final[Quantiles] = (
    (0, 8), (0.1, 54), (0.25, 85), (0.5, 129), (0.75, 395), (0.9, 424), (0.95, 451), (1, 601),
)  # fmt: skip
CODE_IN: Final[Quantiles] = (
    (0, 16), (0.1, 147), (0.25, 578), (0.5, 1469), (0.75, 2744), (0.9, 5188), (1, 7436),
)  # fmt: skip
CODE_OUT: Final[Quantiles] = (
    (0, 2), (0.1, 7), (0.25, 9), (0.5, 13), (0.75, 24), (0.9, 55), (0.95, 90), (1, 251),
)  # fmt: skip
HOME_IN: Final[Quantiles] = ((0, 60), (0.5, 150), (0.9, 300), (1, 600))
HOME_OUT: Final[Quantiles] = ((0, 8), (0.5, 60), (0.9, 150), (1, 300))
SENSOR_IN: Final[Quantiles] = ((0, 200), (0.5, 400), (1, 800))
SENSOR_OUT: Final[Quantiles] = ((0, 16), (0.5, 48), (1, 128))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """How rows of a trace become jobs.

    Args:
        slack: until the deadline.
        usual_output: tokens of an answer at the ninth decile, which deadlines are set for: nobody
            who sets one knows how long the answer will be.
        private: share of requests that may not leave.
        background: share that may wait, with `background_s` until their deadlines.
    """

    slack: Slack
    usual_output: int
    private: float = 0.3
    background: float = 0.0
    background_s: float = 1800.0


MIXES: Final[Mapping[str, Mix]] = {
    "conv": Mix(slack=Slack(fixed_s=5.0, times=1.5), usual_output=424, background=0.2),
    "code": Mix(slack=Slack(fixed_s=5.0, times=1.5), usual_output=55, background=0.1),
    "home": Mix(slack=Slack(fixed_s=2.0, times=1.5), usual_output=150, private=0.5),
    "sensor": Mix(
        slack=Slack(fixed_s=60.0, times=2.0), usual_output=110, private=0.5, background=1.0
    ),
}


def draw(quantiles: Quantiles, chance: random.Random) -> int:
    """One value from a table of quantiles, straight between its rows."""
    share = chance.random()
    for (low, a), (high, b) in pairwise(quantiles):
        if share <= high:
            return max(1, round(a + (b - a) * (share - low) / (high - low)))
    raise AssertionError("a table of quantiles ends with 1")


def _sizes(prompts: Quantiles, outputs: Quantiles, chance: random.Random) -> tuple[int, int]:
    """Sizes that a device serves; larger ones are drawn again, as a trace would be filtered."""
    while True:
        prompt, output = draw(prompts, chance), draw(outputs, chance)
        if prompt <= MOST_PROMPT and output <= MOST_OUTPUT:
            return prompt, output


def conv(requests: int, seed: int) -> list[Arrival]:
    """Chat: gaps of a gamma of shape 0.84 under a rate that wanders, one request a second."""
    chance = random.Random(f"conv {seed}")
    at_s, arrivals, rate = 0.0, list[Arrival](), 1.0
    for number in range(requests):
        if number % 60 == 0:
            rate = math.exp(chance.gauss(0.0, 0.35))
        at_s += chance.gammavariate(0.84, 1 / 0.84) / rate
        prompt, output = _sizes(CONV_IN, CONV_OUT, chance)
        arrivals.append(Arrival(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
    return arrivals


def code(requests: int, seed: int) -> list[Arrival]:
    """An editor: bursts of about eight requests half a second apart, and long gaps."""
    chance = random.Random(f"code {seed}")
    at_s, arrivals = 0.0, list[Arrival]()
    for _ in range(requests):
        burst_ends = chance.random() < 1 / 8
        at_s += chance.expovariate(1 / 4.5) if burst_ends else chance.expovariate(2.0)
        prompt, output = _sizes(CODE_IN, CODE_OUT, chance)
        arrivals.append(Arrival(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
    return arrivals


def _home_rate(hour: float) -> float:
    """Relative to the mean of a day; the two peaks are an assumption, see the reference 4.2."""
    morning = math.exp(-(((hour - 8.0) / 1.2) ** 2))
    evening = math.exp(-(((hour - 19.5) / 2.2) ** 2))
    return 0.15 + 2.2 * morning + 2.6 * evening if 5.5 < hour < 23.5 else 0.05


def home(requests: int, seed: int) -> list[Arrival]:
    """A household's day, with two peaks; its rate differs from day to day as households do."""
    chance = random.Random(f"home {seed}")
    highest = max(_home_rate(tenth / 10) for tenth in range(240))
    arrivals, day = list[Arrival](), 0
    while len(arrivals) < requests:
        for _ in range(min(200, max(1, round(chance.lognormvariate(2.303, 1.297))))):
            while True:
                hour = chance.random() * 24
                if chance.random() * highest <= _home_rate(hour):
                    break
            prompt, output = _sizes(HOME_IN, HOME_OUT, chance)
            at_s = day * DAY_S + hour * 3600
            arrivals.append(Arrival(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
        day += 1
    return sorted(arrivals, key=lambda one: one.at_s)[:requests]


def sensor(requests: int, seed: int) -> list[Arrival]:
    """Twelve sensors, each with its own period from one to fifteen minutes, with jitter."""
    chance = random.Random(f"sensor {seed}")
    periods = [chance.uniform(60, 900) for _ in range(12)]
    until_s = requests / sum(1 / period for period in periods)
    arrivals: list[Arrival] = []
    for period in periods:
        at_s = chance.random() * period
        while at_s < until_s:
            prompt, output = _sizes(SENSOR_IN, SENSOR_OUT, chance)
            arrivals.append(Arrival(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
            at_s += period * chance.uniform(0.9, 1.1)
    return sorted(arrivals, key=lambda one: one.at_s)[:requests]


FAMILIES: Final[Mapping[str, Callable[[int, int], list[Arrival]]]] = {
    "conv": conv,
    "code": code,
    "home": home,
    "sensor": sensor,
}


def stretch_for(
    arrivals: Sequence[Arrival], alone_s: Callable[[int, int], float], utilisation: float
) -> float:
    """How far apart to pull `arrivals` so that one at a time they fill `utilisation` of it.

    Raises:
        ConfigError: there are fewer than two arrivals, or the utilisation is not positive.
    """
    if not 0 < utilisation < math.inf:
        raise ConfigError("trace.utilisation", utilisation, "more than 0")
    span_s = arrivals[-1].at_s - arrivals[0].at_s if len(arrivals) > 1 else 0.0
    if span_s <= 0:
        raise ConfigError("trace", f"{len(arrivals)} requests", "two at different times or more")
    busy_s = sum(alone_s(row.prompt_tokens, row.output_tokens) for row in arrivals)
    return busy_s / (utilisation * span_s)


def jobs_of(
    arrivals: Sequence[Arrival],
    kind: str,
    seed: int,
    *,
    stretch: float,
    alone_s: Callable[[int, int], float],
) -> list[Job]:
    """Jobs from rows, `stretch` times as far apart; who is private is drawn by `seed`.

    Args:
        arrivals: in order of time.
        kind: of `MIXES`.
        seed: of what is drawn.
        stretch: of time.
        alone_s: seconds that a prompt and an answer of so many tokens take on the idle device, in
            the mode it is delivered in: what deadlines are measured in.

    Raises:
        ConfigError: the kind is unknown, or the stretch is not positive.
    """
    if kind not in MIXES:
        raise ConfigError("trace.kind", kind, f"one of {', '.join(MIXES)}")
    if not 0 < stretch < math.inf:
        raise ConfigError("trace.stretch", stretch, "more than 0")
    mix, chance = MIXES[kind], random.Random(f"mix {kind} {seed}")
    first_s = arrivals[0].at_s if arrivals else 0.0
    jobs = []
    for number, row in enumerate(arrivals):
        at_s = (row.at_s - first_s) * stretch
        background = chance.random() < mix.background
        slack_s = (
            mix.background_s
            if background
            else (mix.slack.of(alone_s(row.prompt_tokens, mix.usual_output)))
        )
        jobs.append(
            Job(
                id=f"{kind}-{number}",
                kind=f"{kind}-background" if background else kind,
                arrives_s=at_s,
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                deadline_s=at_s + slack_s,
                private=chance.random() < mix.private,
                background=background,
            )
        )
    return jobs
