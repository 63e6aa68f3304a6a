"""A board whose steps take exactly what a cost model says, in virtual time, for calibrations.

One object is the executor, the switch of power modes and the panel of sensors: what runs takes time
and joules of the mode that the board is in. Disturbances stretch single steps, drawn by a seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from toyexecutor import VirtualClock

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.sensors.sample import Kind, Sample
from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    PagedGeometry,
    Row,
    StepResult,
)

VOCAB = 300
LONGEST_PAUSE_S = 60.0
"""Longer than any window of a calibration, shorter than its rounds."""


@dataclass(kw_only=True)
class TimedBoard:
    """See the module."""

    costs: CostModel
    context_tokens: int = 512
    step_tokens: int = 128
    disturbed: float = 0.0
    """Share of steps that take several times as long."""
    kind: Kind = "measured"
    clock: VirtualClock = field(default_factory=VirtualClock)
    mode: int = 0
    joules: float = 0.0
    switched: list[str] = field(default_factory=list)
    closed: bool = False
    tool: str = "own"

    def __post_init__(self) -> None:
        blocks = self.costs.rows * self.context_tokens // 16 + 8
        self.kv = PagedGeometry(block_tokens=16, blocks=blocks, bytes_per_token=1)
        self.limits = ExecutorLimits(
            context_tokens=self.context_tokens,
            step_tokens=self.step_tokens,
            step_rows=self.costs.rows,
            step_logits=2 * self.costs.rows,
            vocab=VOCAB,
        )
        self.modes = tuple(mode.name for mode in self.costs.modes)
        self._random = random.Random(1)
        self._sampled_s, self._count = self.clock(), 0

    def execute(self, step: ExecutorStep) -> StepResult:
        """Take the time of the step."""
        prompts = [row for row in step.rows if not _decodes(row)]
        decoding = [row for row in step.rows if _decodes(row)]
        mode = self.costs.modes[self.mode]
        context = sum(row.past + 1 for row in decoding)
        prompt_s = sum(
            mode.chunk_s(len(row.tokens), row.past) + mode.prefill_start_s / len(prompts)
            for row in prompts
        )
        if prompts:
            decode_s = context * mode.context_token_s
            if decoding:
                decode_s += mode.beside_s + (len(decoding) - 1) * mode.row_s
        else:
            decode_s = mode.batch_step_s(len(decoding), context)
        stretched = 1.0
        if self._random.random() < self.disturbed:
            stretched = self._random.uniform(2.0, 9.0)
        self._pass(prompt_s * stretched, mode.prefill_w)
        self._pass(decode_s * stretched, mode.decode_w)
        logits = np.zeros((sum(row.logits for row in step.rows), VOCAB), np.float32)
        logits[:, 100] = 1.0
        return StepResult(logits=logits)

    async def idle(self, seconds: float) -> None:
        """Do nothing."""
        self._pass(seconds, self.costs.modes[self.mode].idle_w)

    def current(self) -> str | None:
        return self.modes[self.mode]

    def switch(self, mode: str) -> None:
        self.mode = self.modes.index(mode)
        self.switched.append(mode)
        self._pass(self.costs.switch_s, self.costs.idle_w)

    def close(self) -> None:
        self.closed = True

    def sample(self) -> Sample:
        """As a panel does: after a pause its sensors count from their second reading on."""
        paused = self.clock() - self._sampled_s > LONGEST_PAUSE_S
        self._count += paused
        self._sampled_s = self.clock()
        return Sample(
            at_s=self.clock(),
            joules=self.joules,
            watts=0.0,
            scope="module",
            kind="estimated" if paused else self.kind,
            faults=() if self.kind == "measured" else ("no rail can be read",),
            count=self._count,
        )

    def worked(self, *, seconds: float, joules: float) -> None:
        """It measures, and needs nobody to tell it."""

    def _pass(self, seconds: float, watts: float) -> None:
        self.clock.advance(seconds)
        self.joules += seconds * watts


def _decodes(row: Row) -> bool:
    return len(row.tokens) == 1 and row.past > 0
