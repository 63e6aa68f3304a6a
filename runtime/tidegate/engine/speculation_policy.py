"""How many guessed tokens a step verifies: as many as make it give the most tokens a second.

Everything here is arithmetic over what was measured: how long steps take by their rows and guesses,
and how often guesses of a kind hold. On one executor eight tokens take the time of one, on another
every row that guesses takes a run of its own; neither is assumed. What loses is left alone, and
tried again ever more rarely.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_WEIGHT: Final = 0.125
"""Of the newest measurement, once there are eight."""
_CLIP: Final = 2.0
"""A step that took longer than so many times its mean was disturbed; the mean moves slowly then."""
_PROBE_AFTER, _PROBE_AFTER_MOST = 32, 1024
"""Steps that could have guessed and did not, before one does; doubled when it was in vain."""

_FIRST_ACCEPTANCE: Final = 0.7
"""Before anything was measured: high enough to try, and a few steps correct it."""
_MOST_ACCEPTANCE: Final = 0.98
_PRIOR_TRIALS: Final = 3.0
"""What all requests have shown weighs like so many guesses of this one."""
KEPT_OF_ONE, KEPT_OF_ALL = 0.9, 0.95
"""Share of the earlier guesses' weight that is left after one more draft: for the guesses of one
request, which turns from prose to copying in a few tokens, and for those of all."""


@dataclass(slots=True)
class Cell:
    """Seconds of steps of one shape. The first may have built kernels: the better of two counts."""

    mean_s: float
    count: int = 1
    weight: float = _WEIGHT
    """Of the newest, once there are as many as make it that."""

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count == 2:
            self.mean_s = min(self.mean_s, seconds)
            return
        weight = max(self.weight, 1 / (self.count - 1))
        self.mean_s += weight * (min(seconds, _CLIP * self.mean_s) - self.mean_s)

    @property
    def known(self) -> bool:
        return self.count > 1


class StepCosts:
    """Seconds of a step that decodes: by its rows, those that guess, and the guessed tokens."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int, int], Cell] = {}
        self._tables: dict[tuple[int, int, int], list[float]] = {}

    def observe(self, rows: int, guessing: int, guessed: int, seconds: float) -> None:
        """Book a step of `rows` rows, `guessing` of which verified `guessed` tokens in all."""
        cell = self._cells.get((rows, guessing, guessed))
        if cell is None:
            self._cells[rows, guessing, guessed] = Cell(mean_s=seconds)
        else:
            cell.add(seconds)
        # Estimates for more rows that guess may stand on those for fewer.
        for key in [key for key in self._tables if key[0] == rows and key[1] >= guessing]:
            del self._tables[key]

    def tables(self, rows: int, most: int) -> list[Sequence[float]] | None:
        """Estimated seconds, by the rows that guess and by the guessed tokens, 0 to `most`.

        None until a plain step is known. What was not measured lies on a line between its
        measured neighbours, and beyond the last of them costs the same as it: hopeful, so that
        more is tried once and then known. With more rows than were ever measured it is what it
        is with fewer.
        """
        plain = self._known(rows, 0, 0)
        if not plain:
            return None
        tables: list[Sequence[float]] = [[plain[0][1]] * (most + 1)]
        for guessing in range(1, min(rows, most) + 1):
            table = self._tables.get((rows, guessing, most))
            if table is None:
                known = _rising(plain + self._known(rows, guessing, most))
                hoped = [*known, (most + 1, known[-1][1])]
                table = _lines(hoped) if len(known) > 1 else list(tables[-1])
                self._tables[rows, guessing, most] = table
            tables.append(table)
        return tables

    def dear_tables(self, rows: int, most: int, plain: StepCosts) -> list[Sequence[float]] | None:
        """The same where guessing itself takes time: every token more costs as much as before.

        Until something was measured, one token a row is all that is worth trying.

        Args:
            rows: of the step.
            most: guessed tokens of all rows.
            plain: knows the steps without guesses; these costs those with them, booked as of one
                row that guesses.
        """
        known = plain._known(rows, 0, 0)
        if not known:
            return None
        plain_s = known[0][1]
        known += self._known(rows, 1, most)
        if len(known) == 1:
            hoped = [plain_s] * min(rows + 1, most + 1)
            return [hoped, hoped]
        (left, low_s), (right, high_s) = known[-2:]
        slope_s = max(0.0, (high_s - low_s) / (right - left))
        table = _lines([*known, (most + 1, high_s + slope_s * (most + 1 - right))])
        return [[plain_s] * len(table), table]

    def _known(self, rows: int, guessing: int, most: int) -> list[tuple[int, float]]:
        places = range(guessing, most + 1) if guessing else (0,)
        cells = ((guessed, self._cells.get((rows, guessing, guessed))) for guessed in places)
        return [(guessed, cell.mean_s) for guessed, cell in cells if cell and cell.known]


def _rising(known: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The nearest values that never fall: more tokens take no less time, so that is noise.

    Without it the best of many noisy estimates is mostly one that was lucky. Neighbours in the
    wrong order are averaged until none are (pool adjacent violators, Ayer et al. 1955).
    """
    pools: list[tuple[float, list[int]]] = []
    for place, value in known:
        mean, places = value, [place]
        while pools and pools[-1][0] > mean:
            earlier, before = pools.pop()
            mean = (mean * len(places) + earlier * len(before)) / (len(places) + len(before))
            places = before + places
        pools.append((mean, places))
    return [(place, mean) for mean, places in pools for place in places]


def _lines(known: Sequence[tuple[int, float]]) -> list[float]:
    """Values at every place from the first known one to before the last."""
    table: list[float] = []
    for (left, low_s), (right, high_s) in itertools.pairwise(known):
        step_s = (high_s - low_s) / (right - left)
        table += [low_s + step_s * place for place in range(right - left)]
    return table


@dataclass(slots=True)
class Acceptance:
    """How often guesses of one kind hold, newest first; `trials` stop at the first that fails."""

    kept: float = KEPT_OF_ONE
    hits: float = 0.0
    trials: float = 0.0

    def observe(self, guessed: int, accepted: int) -> None:
        """Book a draft of `guessed` tokens of which the first `accepted` held."""
        self.hits = self.kept * self.hits + accepted
        self.trials = self.kept * self.trials + min(guessed, accepted + 1)

    def rate(self, prior: float = _FIRST_ACCEPTANCE) -> float:
        """The chance of the next guess to hold if all before it did."""
        share = (self.hits + _PRIOR_TRIALS * prior) / (self.trials + _PRIOR_TRIALS)
        return min(share, _MOST_ACCEPTANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """A row's draft: its tokens, and the chance of each to hold once those before it did."""

    tokens: int
    acceptance: float

    @property
    def promise(self) -> float:
        """Tokens that are expected to hold."""
        a = self.acceptance
        return a * (1 - a**self.tokens) / (1 - a) if a < 1 else float(self.tokens)


def share_out(
    prospects: Sequence[Prospect], costs: Sequence[Sequence[float]], rows: int
) -> tuple[tuple[int, ...], float]:
    """How many tokens of each draft to verify, so that the step gives the most tokens a second.

    Tried are the most promising draft alone, the two most promising, and all: tokens are added
    where they are most likely to hold, one by one, for as long as `costs` go.

    Args:
        prospects: the drafts of a step.
        costs: seconds by the rows that guess, the last for any more, and by guessed tokens.
        rows: of the step, those without a draft too; each gives a token for sure.

    Returns:
        The tokens to take of each draft, at least one of them all, and how many times as fast as
        without any that is: 0 when there is nothing to take.
    """
    able = [place for place, prospect in enumerate(prospects) if prospect.tokens]
    able.sort(key=lambda place: -prospects[place].promise)
    best: tuple[dict[int, int], float] = {}, 0.0
    for count in sorted({1, 2, len(able)}):
        if count <= len(able):
            found = _share_among(able[:count], prospects, costs, rows)
            best = max(best, found, key=lambda one: one[1])
    taken, gain = best
    return tuple(taken.get(place, 0) for place in range(len(prospects))), gain


def _share_among(
    able: Sequence[int], prospects: Sequence[Prospect], costs: Sequence[Sequence[float]], rows: int
) -> tuple[dict[int, int], float]:
    """The best of adding tokens one by one to the drafts in these places."""
    chances = {place: prospects[place].acceptance for place in able}
    taken: dict[int, int] = {}
    best: tuple[dict[int, int], float] = {}, 0.0
    expected = float(rows)
    for guessed in range(1, len(costs[0])):
        if not chances:
            break
        row = max(chances, key=chances.__getitem__)
        expected += chances[row]
        taken[row] = taken.get(row, 0) + 1
        chances[row] *= prospects[row].acceptance
        if taken[row] == prospects[row].tokens:
            del chances[row]
        table = costs[min(len(taken), len(costs) - 1)]
        gain = expected / rows * table[0] / table[guessed]
        if gain > best[1]:
            best = dict(taken), gain
    return best


@dataclass(slots=True)
class Probing:
    """When to guess although it seems to lose: after a while, and after ever longer ones."""

    after: int = _PROBE_AFTER
    refused: int = 0

    def refuse(self) -> bool:
        """A step could guess and had better not; True when it should all the same."""
        self.refused += 1
        if self.refused < self.after:
            return False
        self.refused = 0
        self.after = min(2 * self.after, _PROBE_AFTER_MOST)
        return True

    def won(self) -> None:
        """Guessing pays: the next doubt starts small again."""
        self.after, self.refused = _PROBE_AFTER, 0
