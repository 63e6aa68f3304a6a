"""What a decision of PACE computes for every request, taken together once per decision.

Sixty-four requests in line are priced in each of several modes within 200 us; so the coefficients
of `tidegate.edge.energy.cost` are taken together here, and a request is a few products. `of` is the
plain form of each price; `of_all` is the same for a whole line in one loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.pace_state import (
    NEVER,
    PaceState,
    Running,
    Waiting,
    Weights,
    heat_of,
)

_NO_PARTS: Final = 1 << 31
"""Tokens of a part where a prompt is one."""
_HOPED: Final = 0.5
"""Of the mean length, that an answer may have: benchmarks/energy/grid.py; with 1 and with the ninth
decile in its place more are given up that could have been in time."""


class Speed(NamedTuple):
    """How fast a mode works beside how many others, in seconds."""

    now_s: float
    start_s: float
    """Of each part of a prompt."""
    part: int
    """Tokens."""
    prompt_s: float
    half_pair_s: float
    """Half of what each pair of a prompt's tokens takes."""
    step_s: float
    share_s: float
    context_s: float

    def prefill_s(self, prompt: float) -> float:
        """Seconds to compute a prompt."""
        starts_s = self.start_s + (prompt - 1) // self.part * self.start_s
        return starts_s + prompt * (self.prompt_s + prompt * self.half_pair_s)

    def rest_s(self, run: Running) -> float:
        """Seconds to compute what is left of its prompt, of which a part has begun."""
        left = run.prefill_tokens
        if not left:
            return 0.0
        pairs = max(left, 2 * run.context_tokens - left)
        starts_s = max(0, (left - 1) // self.part) * self.start_s
        return starts_s + left * (self.prompt_s + pairs * self.half_pair_s)

    def of(self, one: Waiting) -> tuple[float, float]:
        """Device seconds that a request takes, and seconds from its start to its end."""
        tokens, prompt = one.output_p90, one.prompt_tokens
        fixed = self.prefill_s(prompt) + tokens * self.context_s * (prompt + tokens / 2)
        return fixed + tokens * self.share_s, fixed + tokens * self.step_s

    def of_all(self, many: Sequence[Waiting]) -> list[tuple[float, float]]:
        """`of` each of them."""
        _, start_s, part, prompt_s, half_pair_s, step_s, share_s, context_s = self
        found = []
        for one in many:
            tokens, prompt = one.output_p90, one.prompt_tokens
            fixed = start_s + (prompt - 1) // part * start_s
            fixed += prompt * (prompt_s + prompt * half_pair_s)
            fixed += tokens * context_s * (prompt + tokens / 2)
            found.append((fixed + tokens * share_s, fixed + tokens * step_s))
        return found

    def in_time(self, many: Sequence[Waiting], done_s: float) -> bool:
        """Whether all are, done in this order from `done_s` on as `of` says."""
        now_s, start_s, part, prompt_s, half_pair_s, step_s, share_s, context_s = self
        begun_s = now_s + start_s
        for one in many:
            tokens, prompt = one.output_p90, one.prompt_tokens
            fixed = (prompt - 1) // part * start_s
            fixed += prompt * (prompt_s + prompt * half_pair_s)
            fixed += tokens * context_s * (prompt + tokens / 2)
            done_s += start_s + fixed + tokens * share_s
            deadline_s = one.deadline_s
            if done_s > deadline_s or begun_s + fixed + tokens * step_s > deadline_s:
                return False
        return True

    def of_running(self, run: Running) -> tuple[float, float]:
        """The same of what is left of one."""
        tokens = run.output_p90
        fixed = self.rest_s(run) + tokens * self.context_s * run.context_tokens
        return fixed + tokens * self.share_s, fixed + tokens * self.step_s

    def least(self, one: Waiting) -> float:
        """Seconds from its start to its end when the answer is as short as can be hoped for."""
        tokens = _HOPED * one.output_mean
        context = self.context_s * (one.prompt_tokens + tokens / 2)
        return self.prefill_s(one.prompt_tokens) + tokens * (self.step_s + context)

    def hopeless(self, many: Sequence[Waiting]) -> list[Waiting]:
        """Those who are late even if they begin now and answer with the `least`."""
        now_s, start_s, part, prompt_s, half_pair_s, step_s, _, context_s = self
        begun_s, half = now_s + start_s, _HOPED / 2
        return [
            one
            for one in many
            if begun_s
            + (prompt := one.prompt_tokens) * (prompt_s + prompt * half_pair_s)
            + (prompt - 1) // part * start_s
            + _HOPED * (mean := one.output_mean) * (step_s + context_s * (prompt + half * mean))
            > one.deadline_s
        ]

    def longest(self, one: Waiting | Running) -> float:
        """Seconds from its start, or from now, when the answer is as long as it hardly is."""
        tokens = one.output_most
        if isinstance(one, Waiting):
            fixed = self.prefill_s(one.prompt_tokens)
            context = one.prompt_tokens + tokens / 2
        else:
            fixed, context = self.rest_s(one), one.context_tokens
        return fixed + tokens * (self.step_s + self.context_s * context)


class LocalPrices(NamedTuple):
    """What running a request here counts as."""

    fixed: float
    start: float
    """Of each part of a prompt beyond the first."""
    part: int
    prompt: float
    half_pair: float
    token: float
    context: float

    def of(self, one: Waiting) -> float:
        """Of one request."""
        tokens, prompt = one.output_mean, one.prompt_tokens
        context = self.context * (prompt + tokens / 2)
        computed = prompt * (self.prompt + prompt * self.half_pair)
        computed += (prompt - 1) // self.part * self.start
        return self.fixed + computed + tokens * (self.token + context)

    def of_all(self, many: Sequence[Waiting]) -> list[float]:
        """`of` each of them."""
        fixed, start, part, prompt_j, pair, token, context = self
        half = context / 2
        return [
            fixed
            + (prompt := one.prompt_tokens) * (prompt_j + prompt * pair)
            + (prompt - 1) // part * start
            + (mean := one.output_mean) * (token + context * prompt + half * mean)
            for one in many
        ]


class CloudPrices(NamedTuple):
    """What sending a request counts as: linear in its tokens, and in its lateness."""

    fixed: float
    prompt: float
    token: float
    late: float
    answered_s: float
    """When an answer to nothing would be here."""
    prompt_s: float
    token_s: float

    def of(self, one: Waiting) -> float:
        """Of one request."""
        prompt = one.prompt_tokens
        joules = self.fixed + prompt * self.prompt + one.output_mean * self.token
        back_s = self.answered_s + prompt * self.prompt_s + one.output_p90 * self.token_s
        late_s = back_s - one.deadline_s
        return joules + self.late * late_s if late_s > 0 else joules

    def of_all(self, many: Sequence[Waiting]) -> list[float]:
        """`of` each of them that may leave; infinite for the others."""
        fixed, prompt_j, token, late, answered_s, prompt_s, token_s = self
        found = []
        for one in many:
            if not one.may_leave:
                found.append(NEVER)
                continue
            prompt = one.prompt_tokens
            joules = fixed + prompt * prompt_j + one.output_mean * token
            late_s = answered_s + prompt * prompt_s + one.output_p90 * token_s - one.deadline_s
            found.append(joules + late * late_s if late_s > 0 else joules)
        return found

    def late_s(self, one: Waiting) -> float:
        """Seconds after its deadline that its answer would be here."""
        return max(0.0, -self.spare_s(one))

    def spare_s(self, one: Waiting) -> float:
        """Seconds that it may still wait here before it leaves and is in time."""
        took_s = one.prompt_tokens * self.prompt_s + one.output_p90 * self.token_s
        return one.deadline_s - self.answered_s - took_s


def local_prices(state: PaceState, costs: CostModel, weights: Weights, mode: int) -> LocalPrices:
    """In `mode`, beside what runs already."""
    one = costs.modes[mode]
    rows = min(costs.rows, len(state.running) + 1)
    watts = one.decode_w - costs.idle_w
    joule = joule_of(state, weights)
    start = fixed = joule * (one.prefill_w - costs.idle_w) * one.prefill_start_s
    if not state.loaded:
        fixed += joule * (costs.load_w - costs.idle_w) * costs.load_s
    heat_k = heat_of(state, one)
    if heat_k > 0:
        fixed += weights.heat_j_per_kk * heat_k * state.warming_kw * watts / rows
    return LocalPrices(
        fixed=fixed,
        start=start,
        part=one.part_tokens or _NO_PARTS,
        prompt=joule * (one.prefill_w - costs.idle_w) * one.prefill_token_s,
        half_pair=joule * (one.prefill_w - costs.idle_w) * one.prefill_context_s / 2,
        token=joule * watts * one.share_s(rows, 0),
        context=joule * watts * one.context_token_s,
    )


def cloud_prices(
    state: PaceState, weights: Weights, cloud: CloudCost, radio: RadioCost
) -> CloudPrices:
    """Of leaving now; a tail of the radio that is warm anyway is half paid."""
    joule = joule_of(state, weights)
    tail = 0.5 if state.radio_warm else 1.0
    nothing_s = cloud.answer_s(radio, 0, 0)
    nothing_j = cloud.device_j(radio, 0, 0, tail=tail)
    token_j = cloud.device_j(radio, 0, 1, tail=tail) - nothing_j
    service_j = cloud.token_j + weights.money * cloud.token_price
    return CloudPrices(
        fixed=joule * nothing_j,
        prompt=joule * (cloud.device_j(radio, 1, 0, tail=tail) - nothing_j),
        token=joule * token_j + weights.energy * service_j,
        late=weights.energy * weights.late_j_per_s,
        answered_s=state.now_s + nothing_s + weights.margin_s,
        prompt_s=cloud.answer_s(radio, 1, 0) - nothing_s,
        token_s=cloud.answer_s(radio, 0, 1) - nothing_s,
    )


def speed(state: PaceState, costs: CostModel, weights: Weights, mode: int, waiting: int) -> Speed:
    """Of `mode` when all that runs and `waiting` more share its steps."""
    one = costs.modes[mode]
    rows = min(costs.rows, len(state.running) + waiting) or 1
    now_s = state.now_s + weights.margin_s
    if mode != state.mode:
        now_s += costs.switch_s
    if not state.loaded:
        now_s += costs.load_s
    step_s = one.step_s + (rows - 1) * one.row_s
    return Speed(
        now_s=now_s,
        start_s=one.prefill_start_s,
        part=one.part_tokens or _NO_PARTS,
        prompt_s=one.prefill_token_s,
        half_pair_s=one.prefill_context_s / 2,
        step_s=step_s,
        share_s=step_s / rows,
        context_s=one.context_token_s,
    )


def joule_of(state: PaceState, weights: Weights) -> float:
    """What one joule of the device counts."""
    return weights.energy + state.energy_debt_j / weights.debt_j
