"""What work costs on one board: seconds and joules, by power mode, on the device or in the cloud.

    prefill(n)            parts(n) * prefill_start_s + n * prefill_token_s
                          + n * n / 2 * prefill_context_s
    a step of b rows      step_s + (b - 1) * row_s + context_token_s * (all rows' context)
    marginal joules       (watts while it runs - watts of the idlest mode) * seconds

The watts of a step do not depend on its rows, so rows that share steps share joules. Everything is
linear in what is chosen (steps, requests, bytes): `tidegate.edge.energy.simulate.bound` rests on
that. Square and parts are of a prompt's length, which nobody chooses: its tokens look back at each
other, which for a small model is most of the work of a long prompt, and a long one is computed in
parts, each of which starts anew.
Formulas: energy-and-devices 3.2, with the mean context of a batch as the sum over its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

from tidegate.errors import ConfigError

Source = Literal["measured", "calibrated", "estimated"]
"""Read off a sensor; fitted on this device; or of a profile's seeds and assumptions."""

_OR_ZERO: Final = (
    *("prefill_start_s", "prefill_context_s", "context_token_s", "row_s", "beside_s", "idle_w"),
)
_TYPICAL_CONTEXT: Final = 512
"""Tokens, for what a mode's joules per token are when no request is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeCost:
    """One power mode. Seconds, and watts of the scope that the model's `scope` names."""

    name: str
    prefill_token_s: float
    step_s: float
    prefill_w: float
    decode_w: float
    idle_w: float
    """While nothing runs and the mode is this one."""
    prefill_start_s: float = 0.0
    """Of each part of a prompt."""
    part_tokens: int | None = None
    """That a part has at most; None: a prompt is one."""
    prefill_context_s: float = 0.0
    """For each token of a prompt and each token before it."""
    context_token_s: float = 0.0
    """Of a step, for each token of each row's context."""
    row_s: float = 0.0
    """Of a step, for each row beyond the first."""
    beside_s: float = 0.0
    """Of a step with a part of a prompt, for that rows decode in it at all. Schedules have prompts
    computed alone; what is learnt from real steps needs it."""

    def prefill_s(self, tokens: float) -> float:
        """Seconds to compute a prompt of `tokens`."""
        further = self.prefill_start_s * self.further_parts(tokens)
        return self.prefill_start_s + further + self.chunk_s(tokens, 0)

    def further_parts(self, tokens: float) -> float:
        """Parts of `tokens` of a prompt beyond the first."""
        return 0.0 if self.part_tokens is None else max(0.0, (tokens - 1) // self.part_tokens)

    def chunk_s(self, tokens: float, past_tokens: float) -> float:
        """Seconds that `tokens` more of a prompt take of which `past_tokens` are there, started."""
        pairs = tokens * (past_tokens + tokens / 2)
        return tokens * self.prefill_token_s + pairs * self.prefill_context_s

    def batch_step_s(self, rows: int, context_tokens: float) -> float:
        """Seconds of one step; `context_tokens` are those of all rows together."""
        return self.step_s + (rows - 1) * self.row_s + context_tokens * self.context_token_s

    def share_s(self, rows: float, context_tokens: float) -> float:
        """Device seconds that one token of one row takes when `rows` share their steps."""
        shared = (self.step_s + (rows - 1) * self.row_s) / rows
        return shared + context_tokens * self.context_token_s


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """A board with one model on it.

    Args:
        modes: from the slowest to the fastest, at least one.
        rows: requests that share steps at most.
        scope: what the watts cover: a rail, the module, the board or the wall.
        source: how the coefficients were obtained.
        load_s: to load the model when it was unloaded, at `load_w`.
        switch_s: that a change of mode takes, during which nothing runs.
        switch_j: that it costs on top of idling.

    Raises:
        ConfigError: there is no mode, two have one name, or a coefficient is out of range.
    """

    modes: tuple[ModeCost, ...]
    rows: int
    scope: str
    source: Source
    load_s: float = 0.0
    load_w: float = 0.0
    switch_s: float = 0.0
    switch_j: float = 0.0
    knee: int = field(init=False, default=0)
    """Index of the mode that takes least joules per token, of several alike the fastest: where no
    watts are known, only time decides."""
    idle_w: float = field(init=False, default=0.0)
    """Watts of the idlest mode: what is there whatever is done."""
    idlest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not self.modes:
            raise ConfigError("cost.modes", 0, "at least one power mode")
        names = [mode.name for mode in self.modes]
        if len(set(names)) < len(names):
            raise ConfigError("cost.modes", names, "modes of different names")
        if self.rows < 1:
            raise ConfigError("cost.rows", self.rows, "at least 1")
        if self.load_s and self.load_w < min(mode.idle_w for mode in self.modes):
            raise ConfigError("cost.load_w", self.load_w, "at least the watts of idling")
        for mode in self.modes:
            _check(mode)
        idle_w = [mode.idle_w for mode in self.modes]
        object.__setattr__(self, "idle_w", min(idle_w))
        object.__setattr__(self, "idlest", idle_w.index(min(idle_w)))
        joules = [self.token_j(number) for number in range(len(self.modes))]
        least = max(mode for mode, one in enumerate(joules) if one == min(joules))
        object.__setattr__(self, "knee", least)

    @property
    def fastest(self) -> int:
        """Index of the fastest mode."""
        return len(self.modes) - 1

    def token_j(self, mode: int, rows: int = 1, context_tokens: float = _TYPICAL_CONTEXT) -> float:
        """Marginal joules of one generated token when `rows` share their steps."""
        one = self.modes[mode]
        return (one.decode_w - self.idle_w) * one.share_s(rows, context_tokens)

    def request_j(
        self, mode: int, prompt_tokens: float, output_tokens: float, rows: int = 1
    ) -> float:
        """Marginal joules of a whole request."""
        one = self.modes[mode]
        context = prompt_tokens + output_tokens / 2
        prefill = (one.prefill_w - self.idle_w) * one.prefill_s(prompt_tokens)
        return prefill + output_tokens * self.token_j(mode, rows, context)

    def request_s(
        self, mode: int, prompt_tokens: float, output_tokens: float, rows: int = 1
    ) -> float:
        """Seconds from its start to its last token, beside `rows - 1` others like it."""
        one = self.modes[mode]
        context = prompt_tokens + output_tokens / 2
        return one.prefill_s(prompt_tokens) + output_tokens * one.batch_step_s(rows, rows * context)

    def scaled(self, watts: float) -> CostModel:
        """The same board if all its active power above idle were `watts` times as much."""
        return replace(self, modes=tuple(self._scaled(mode, watts) for mode in self.modes))

    def _scaled(self, mode: ModeCost, by: float) -> ModeCost:
        return replace(
            mode,
            prefill_w=self.idle_w + (mode.prefill_w - self.idle_w) * by,
            decode_w=self.idle_w + (mode.decode_w - self.idle_w) * by,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RadioCost:
    """What sending takes out of the device, and how fast it is."""

    up_byte_j: float = 0.0
    down_byte_j: float = 0.0
    connected_w: float = 0.0
    """On top of the bytes, for as long as an answer is waited for."""
    tail_w: float = 0.0
    tail_s: float = 0.0
    """After the last byte; two transfers that close share one."""
    up_byte_s: float = 0.0
    down_byte_s: float = 0.0

    @property
    def tail_j(self) -> float:
        """Of one tail that nothing shares."""
        return self.tail_w * self.tail_s


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudCost:
    """The service that takes the overflow, as the device expects it to be."""

    rtt_s: float
    wait_s: float
    """In its queue."""
    prefill_token_s: float
    token_s: float
    token_j: float
    """Of the service, its host and its building, for one generated token."""
    token_price: float = 0.0
    """What its owner counts one generated token as, in joules (see `Weights.money`)."""
    prompt_token_bytes: float = 4.0
    token_bytes: float = 4.0
    message_bytes: float = 600.0
    """Of an envelope and its headers, each way."""

    def answer_s(self, radio: RadioCost, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds from leaving the device to the last token."""
        up = self.message_bytes + prompt_tokens * self.prompt_token_bytes
        down = self.message_bytes + output_tokens * self.token_bytes
        computed = prompt_tokens * self.prefill_token_s + output_tokens * self.token_s
        sent = up * radio.up_byte_s + down * radio.down_byte_s
        return self.rtt_s + self.wait_s + computed + sent

    def device_j(
        self,
        radio: RadioCost,
        prompt_tokens: float,
        output_tokens: float,
        *,
        tail: float = 1.0,
    ) -> float:
        """Joules of the device's radio; `tail` is the share of a tail that is this request's."""
        up = self.message_bytes + prompt_tokens * self.prompt_token_bytes
        down = self.message_bytes + output_tokens * self.token_bytes
        joules = up * radio.up_byte_j + down * radio.down_byte_j + tail * radio.tail_j
        if radio.connected_w:
            joules += radio.connected_w * self.answer_s(radio, prompt_tokens, output_tokens)
        return joules


def _check(mode: ModeCost) -> None:
    if mode.part_tokens is not None and mode.part_tokens < 1:
        raise ConfigError(f"cost.{mode.name}.part_tokens", mode.part_tokens, "at least 1")
    for name in ("prefill_token_s", "step_s"):
        if not getattr(mode, name) > 0:
            raise ConfigError(f"cost.{mode.name}.{name}", getattr(mode, name), "more than 0 s")
    for name in _OR_ZERO:
        if not getattr(mode, name) >= 0:
            raise ConfigError(f"cost.{mode.name}.{name}", getattr(mode, name), "0 or more")
    if mode.row_s > mode.step_s:
        allowed = f"at most the {mode.step_s:g} s of a step of one"
        raise ConfigError(f"cost.{mode.name}.row_s", mode.row_s, allowed)
    for name in ("prefill_w", "decode_w"):
        if not getattr(mode, name) >= mode.idle_w:
            allowed = f"at least the {mode.idle_w:g} W of the idle mode"
            raise ConfigError(f"cost.{mode.name}.{name}", getattr(mode, name), allowed)
