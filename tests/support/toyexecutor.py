"""`ToyExecutor`: a tiny real model in numpy, in both KV geometries, for tests of the engine.

Its KV is one 64-bit word per token, computed from the token, its position and every word stored
before it, as a deep network's would be; its logits are computed from all words of the request. So
a wrong block, slot, past or copy changes the tokens, and equal tokens mean correct bookkeeping.
It is strict about the contract of `Executor` and can fail, lie or take its time on demand.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    Logits,
    PagedGeometry,
    Row,
    SlotGeometry,
    StepResult,
)
from tidegate.engine.facts import ExecutorFacts
from tidegate.engine.spill import KvUnit
from tidegate.errors import ExecutionError

_Words = npt.NDArray[np.uint64]
_Places = npt.NDArray[np.int64]

_A = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xBF58476D1CE4E5B9)
_GARBAGE = np.uint64(0xDEADBEEFDEADBEEF)


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass(kw_only=True)
class Behaviour:
    """What the toy does besides computing; change it while the engine runs."""

    fails: Callable[[ExecutorStep], bool] = lambda step: False
    """Raise `ExecutionError` for this step and leave garbage in its rows' KV."""
    distorts: Callable[[ExecutorStep, Logits], Logits] = lambda step, logits: logits
    clock: VirtualClock | None = None
    step_s: float = 0.0
    """Virtual seconds of a step with `clock`, real ones without."""
    token_s: float = 0.0
    """On top, per token."""
    gate: threading.Event | None = None
    """Every step waits for it, to be caught in flight."""


@dataclass(kw_only=True)
class Record:
    """What the toy has run, for tests that look at the shape of steps."""

    steps: int = 0
    tokens: int = 0
    copies: int = 0
    most_rows: int = 0
    rows: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    """Per step: (past, tokens) of every row."""


class ToyExecutor:
    """See the module. Eight blocks of four tokens would be `PagedGeometry(blocks=8, ...)`."""

    def __init__(
        self,
        geometry: PagedGeometry | SlotGeometry,
        *,
        context_tokens: int = 128,
        step_tokens: int = 64,
        step_rows: int = 8,
        vocab: int = 300,
        behaviour: Behaviour | None = None,
        unit_tokens: int = 8,
        unit_padding_bytes: int = 0,
    ) -> None:
        self.kv: PagedGeometry | SlotGeometry = geometry
        self.limits = ExecutorLimits(
            context_tokens=context_tokens,
            step_tokens=step_tokens,
            step_rows=step_rows,
            step_logits=2 * step_rows,
            vocab=vocab,
        )
        self.behaviour = behaviour or Behaviour()
        self.record = Record()
        self.busy = self.closed = False
        self.unit_tokens = unit_tokens
        if isinstance(geometry, PagedGeometry):
            shape = (geometry.blocks, geometry.block_tokens)
            self.unit_tokens = geometry.block_tokens
        else:
            shape = (geometry.slots, geometry.slot_tokens)
        self.unit_bytes = 8 * self.unit_tokens + unit_padding_bytes
        self.facts = ExecutorFacts(
            runtime="toy",
            linear="numpy",
            threads=1,
            kv_precision="u64",
            kv_bytes=0,
            cache="none",
            load_s=0.0,
        )
        self.kv_layout = f"toy of {vocab} tokens"
        self._memory: _Words = np.full(shape, _GARBAGE)
        self._ids = np.arange(vocab, dtype=np.uint64)

    def execute(self, step: ExecutorStep) -> StepResult:
        assert not self.closed
        assert not self.busy, "one thread at a time"
        self.busy = True
        try:
            return self._execute(step)
        finally:
            self.busy = False

    def close(self) -> None:
        assert not self.busy, "a step still uses the memory"
        self.closed = True

    def read_kv(self, unit: KvUnit) -> bytes:
        words = self._unit(unit).tobytes()
        return words + bytes(self.unit_bytes - len(words))

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        assert len(data) == self.unit_bytes
        self._unit(unit)[:] = np.frombuffer(data, np.uint64, self.unit_tokens)

    def _unit(self, unit: KvUnit) -> _Words:
        assert not self.closed
        assert not self.busy, "one thread at a time"
        assert unit.first == 0 or self.kv.kind == "slots"
        return self._memory[unit.home, unit.first : unit.first + self.unit_tokens]

    def _execute(self, step: ExecutorStep) -> StepResult:
        self._check(step)
        self._pass_time(step)
        for source, target, tokens in step.copies:
            self._memory[target, :tokens] = self._memory[source, :tokens]
        if self.behaviour.fails(step):
            for row in step.rows:
                self._store(row, np.full(len(row.tokens), _GARBAGE))
            raise ExecutionError("the toy was told to fail")
        wanted = [spread for row in step.rows for spread in self._run(row)]
        logits = np.array(wanted, dtype=np.float32).reshape(len(wanted), self.limits.vocab)
        return StepResult(logits=self.behaviour.distorts(step, logits))

    def _run(self, row: Row) -> list[npt.NDArray[np.float64]]:
        """Store the row's words one by one, then look at all of them."""
        words = self._memory.reshape(-1)
        places = self._places(row)
        history = words[places[: row.past]]
        with np.errstate(over="ignore"):
            weights = _mixed(np.arange(len(places), dtype=np.uint64) * _A) | np.uint64(1)
            total = (history * weights[: row.past]).sum(dtype=np.uint64)
            totals: list[np.uint64] = []
            for offset, token in enumerate(row.tokens.tolist()):
                position = row.past + offset
                word = _mixed(total + np.uint64(token + 1) * _A + np.uint64(position) * _B)
                words[places[position]] = word
                total = total + word * weights[position]
                totals.append(total)
            return [self._spread(total) for total in totals[len(totals) - row.logits :]]

    def _spread(self, total: np.uint64) -> npt.NDArray[np.float64]:
        bits = _mixed(total + self._ids * _A)
        # 0 to 6: a spread at which sampling at temperature 1 has several likely tokens.
        spread: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 * 6
        return spread

    def _store(self, row: Row, words: _Words) -> None:
        places = self._places(row)[row.past :]
        self._memory.reshape(-1)[places] = words

    def _places(self, row: Row) -> _Places:
        """Flat addresses of the row's tokens 0 to past + new."""
        positions = np.arange(row.past + len(row.tokens))
        width = self._memory.shape[1]
        if row.blocks is not None:
            starts = row.blocks[positions // width].astype(np.int64) * width
        else:
            assert row.slot is not None
            starts = np.full(len(positions), row.slot * width) + positions // width * width
        places: _Places = starts + positions % width
        return places

    def _check(self, step: ExecutorStep) -> None:
        limits = self.limits
        assert step.rows or step.copies, "a step has work"
        assert len(step.rows) <= limits.step_rows
        assert sum(len(row.tokens) for row in step.rows) <= limits.step_tokens
        assert sum(row.logits for row in step.rows) <= limits.step_logits
        assert all(row.logits <= len(row.tokens) for row in step.rows)
        written: list[int] = []
        for row in step.rows:
            assert len(row.tokens) > 0, "a row has tokens"
            assert row.past + len(row.tokens) <= limits.context_tokens
            assert ((row.tokens >= 0) & (row.tokens < limits.vocab)).all()
            assert (row.blocks is not None) == (self.kv.kind == "paged")
            assert (row.slot is not None) == (self.kv.kind == "slots")
            written += self._places(row)[row.past :].tolist()
        assert len(set(written)) == len(written), "no two rows write to one place"
        self.record.steps += 1
        self.record.tokens += len(written)
        self.record.copies += len(step.copies)
        self.record.most_rows = max(self.record.most_rows, len(step.rows))
        self.record.rows.append(tuple((row.past, len(row.tokens)) for row in step.rows))

    def _pass_time(self, step: ExecutorStep) -> None:
        behaviour = self.behaviour
        if behaviour.gate is not None:
            assert behaviour.gate.wait(timeout=30), "a test forgot to open the gate"
        seconds = behaviour.step_s + behaviour.token_s * sum(len(row.tokens) for row in step.rows)
        if behaviour.clock is not None:
            behaviour.clock.advance(seconds)
        elif seconds:
            time.sleep(seconds)


def _mixed(x: npt.NDArray[np.uint64] | np.uint64) -> _Words:
    """Finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _B
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
