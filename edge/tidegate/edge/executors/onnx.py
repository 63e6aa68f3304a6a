"""`OnnxExecutor`: steps on ONNX Runtime, KV in slots that the attention operator updates in place.

The graph and its inputs are described in `tidegate.converters.onnx.ops`. Its attention takes either
one request with many tokens, or many requests with one token each, so a step is one run for all of
those and one for each of the others. Past and present KV are bound to the same memory; what lies
beyond a request's tokens is never read, and rewinding a request costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.onnx_providers import Providers
from tidegate.edge.executors.onnx_run import OnnxRun
from tidegate.edge.executors.onnx_session import (
    EXACT_GRAPH,
    GRAPHS,
    KvPrecision,
    check_signature,
    head_sizes,
    open_session,
)
from tidegate.edge.executors.settings import STEP_LOGITS, check_counts
from tidegate.edge.executors.slots import SlotBuffers, batches, checked_slots
from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    Logits,
    Row,
    SlotGeometry,
    StepResult,
)
from tidegate.engine.facts import ExecutorFacts
from tidegate.engine.spill import KvUnit
from tidegate.errors import ConfigError, ExecutionError
from tidegate.model.architecture import Architecture

if TYPE_CHECKING:
    import onnxruntime

MAX_RUNS = 64
"""Kept for reuse, one for each place that requests were at."""

UNIT_TOKENS = 32
"""Of a unit of KV that can be copied out, as large as OpenVINO's blocks."""

_KV_TYPES: dict[KvPrecision, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxSettings:
    """How an `OnnxExecutor` runs. Memory is fixed by the first four."""

    slots: int
    """Requests that have KV at the same time."""
    context_tokens: int
    """Tokens of one slot; at most the model's context."""
    step_tokens: int
    """Tokens of all rows of one step."""
    kv_precision: KvPrecision | None = None
    """None for float16 where a provider other than the CPU's is named, and float32 elsewhere. The
    bundle must hold the graph for it."""
    threads: int | None = None
    """None leaves the number to ONNX Runtime, which takes the physical cores."""
    exact: bool = False
    """Multiply float32 activations instead of int8 ones: slower, and equal to the reference."""
    providers: Providers = field(default_factory=Providers)
    """Execution providers by preference; KV stays in host memory whichever runs the rest."""
    spinning: bool = False
    """Let idle threads spin: a little faster per token, and a busy core between tokens."""

    @property
    def kv(self) -> KvPrecision:
        """The precision that None stands for."""
        return self.kv_precision or ("float16" if self.providers.accelerated else "float32")


class OnnxExecutor:
    """`tidegate.engine.executor.Executor` over the `onnx/` folder of a bundle."""

    def __init__(self, folder: Path, arch: Architecture, settings: OnnxSettings) -> None:
        """Load the model, allocate all KV, and run the largest steps once.

        Raises:
            ConfigError: a setting is out of range, or a provider is not available.
            BundleError: the graph cannot be loaded or is not of this architecture.
            ExecutionError: the graph cannot be run.
        """
        began_s = time.perf_counter()
        _check_settings(settings, arch)
        self._arch, self._settings = arch, settings
        path = folder / (EXACT_GRAPH if settings.exact else GRAPHS[settings.kv])
        session = open_session(
            path,
            threads=settings.threads,
            spinning=settings.spinning,
            providers=settings.providers,
        )
        check_signature(path, session, arch, settings.kv)
        self._head_sizes = head_sizes(session, arch)
        self._session: onnxruntime.InferenceSession | None = session
        self._buffers = self._slots(settings.slots)
        self._runs: dict[tuple[int, int], OnnxRun] = {}
        self._warm_up()
        self._load_s = time.perf_counter() - began_s

    @property
    def facts(self) -> ExecutorFacts:
        """See `Described.facts`."""
        import onnxruntime

        return ExecutorFacts(
            runtime=f"onnxruntime {onnxruntime.__version__}",
            linear=f"onnxruntime, {'float' if self._settings.exact else 'int8'} activations",
            threads=self._settings.threads,
            kv_precision=self._settings.kv,
            kv_bytes=self.kv.bytes_per_token * self._settings.slots * self.kv.slot_tokens,
            cache="nothing to keep",
            load_s=self._load_s,
        )

    def _slots(self, slots: int) -> SlotBuffers:
        return SlotBuffers(
            kv_heads=self._arch.kv_heads,
            head_sizes=self._head_sizes,
            slots=slots,
            slot_tokens=self._settings.context_tokens,
            kind=_KV_TYPES[self._settings.kv],
        )

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor.limits`."""
        return ExecutorLimits(
            context_tokens=self._settings.context_tokens,
            step_tokens=self._settings.step_tokens,
            step_rows=self._settings.slots,
            step_logits=max(self._settings.slots, STEP_LOGITS),
            vocab=self._arch.vocab,
        )

    @property
    def kv(self) -> SlotGeometry:
        """See `Executor.kv`."""
        values = 2 * self._arch.kv_heads * sum(self._head_sizes)
        return SlotGeometry(
            slots=self._settings.slots,
            slot_tokens=self._settings.context_tokens,
            bytes_per_token=values * np.dtype(_KV_TYPES[self._settings.kv]).itemsize,
        )

    def execute(self, step: ExecutorStep) -> StepResult:
        """See `Executor.execute`.

        Raises:
            ExecutionError: a row or a copy is outside the limits, in which case nothing has run,
                or ONNX Runtime failed.
        """
        if self._session is None:
            raise ExecutionError("the executor is closed")
        slots = checked_slots(step, self.limits, self.kv)
        for source, target, tokens in step.copies:
            self._buffers.copy(source, target, tokens)
        starts = [0, *accumulate(row.logits for row in step.rows)]
        result = np.empty((starts[-1], self._arch.vocab), np.float32)
        for batch in batches(step.rows):
            places = [place for i in batch for place in range(starts[i], starts[i + 1])]
            rows, members = [step.rows[i] for i in batch], [slots[i] for i in batch]
            start, end = starts[batch[0]], starts[batch[-1] + 1]
            if end - start == len(places):
                self._run(rows, members, result[start:end])
            else:  # rows of other runs lie between
                logits = np.empty((len(places), self._arch.vocab), np.float32)
                self._run(rows, members, logits)
                result[places] = logits
        return StepResult(logits=result)

    def close(self) -> None:
        """See `Executor.close`."""
        self._runs.clear()
        self._session = None
        self._buffers = self._slots(0)

    @property
    def kv_layout(self) -> str:
        """See `SpillingKv.kv_layout`."""
        import onnxruntime

        exact = self._settings.exact
        return f"onnxruntime {onnxruntime.__version__} exact={exact}: {self._buffers.layout}"

    @property
    def unit_tokens(self) -> int:
        """See `SpillingKv.unit_tokens`."""
        return UNIT_TOKENS

    @property
    def unit_bytes(self) -> int:
        """See `SpillingKv.unit_bytes`."""
        return self._buffers.nbytes(UNIT_TOKENS)

    def read_kv(self, unit: KvUnit) -> bytes:
        """See `SpillingKv.read_kv`."""
        self._check_unit(unit)
        return self._buffers.read(unit.home, unit.first, UNIT_TOKENS)

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        """See `SpillingKv.write_kv`."""
        self._check_unit(unit)
        if len(data) != self.unit_bytes:
            raise ExecutionError(f"a KV unit of {len(data)} bytes: must be {self.unit_bytes}")
        self._buffers.write(unit.home, unit.first, UNIT_TOKENS, data)

    def _check_unit(self, unit: KvUnit) -> None:
        if self._session is None:
            raise ExecutionError("the executor is closed")
        slots, tokens = self._settings.slots, self._settings.context_tokens
        if not 0 <= unit.home < slots or not 0 <= unit.first <= tokens - UNIT_TOKENS:
            raise ExecutionError(f"{unit}: must be within {slots} slots of {tokens} tokens")

    def _run(self, rows: Sequence[Row], slots: Sequence[int], logits: Logits) -> None:
        """Run checked rows of equal token count, which have KV in `slots`.

        Args:
            rows: in any order.
            slots: of each row.
            logits: [sum of `Row.logits`, V], written in the order of the rows.
        """
        tokens = len(rows[0].tokens)
        for row, slot in zip(rows, slots, strict=True):
            self._buffers.will_hold(slot, row.past + tokens)
        first = self._buffers.side_by_side(slots)
        places = [self._buffers.row(slot) - first for slot in slots]
        sampled = [
            (place + 1) * tokens - left
            for row, place in zip(rows, places, strict=True)
            for left in range(row.logits, 0, -1)
        ]
        ordered = [row for _, row in sorted(zip(places, rows, strict=True), key=lambda one: one[0])]
        try:
            self._run_at(first, len(rows)).run(ordered, sampled, logits)
        except Exception as error:
            where = f"slots {list(slots)}, {tokens} tokens each"
            raise ExecutionError(f"{where}: {error}") from error

    def _run_at(self, first: int, count: int) -> OnnxRun:
        """The run over `count` buffer rows from `first` on."""
        assert self._session is not None, "closed"
        if (first, count) not in self._runs:
            if len(self._runs) >= MAX_RUNS:
                self._runs.clear()
            self._runs[first, count] = OnnxRun(self._session, self._buffers, first, count)
        return self._runs[first, count]

    def _warm_up(self) -> None:
        """Run the largest prefill and the largest decode, so that memory has reached its peak."""
        limits = self.limits
        chunk = min(limits.step_tokens, limits.context_tokens)
        sampled = min(chunk, limits.step_logits)
        many = np.empty((max(sampled, limits.step_rows), limits.vocab), np.float32)
        past = limits.context_tokens - chunk
        prefill = Row(tokens=np.zeros(chunk, np.int64), past=past, logits=sampled)
        self._run([prefill], [0], many[:sampled])
        decode = Row(tokens=np.zeros(1, np.int64), past=limits.context_tokens - 1)
        count = min(limits.step_rows, limits.step_tokens)
        self._run([decode] * count, range(count), many[:count])


def _check_settings(settings: OnnxSettings, arch: Architecture) -> None:
    check_counts(settings, always=("slots", "step_tokens"), optional=("threads",))
    if not 1 <= settings.context_tokens <= arch.context:
        allowed = f"from 1 to the model's context of {arch.context}"
        raise ConfigError("context_tokens", settings.context_tokens, allowed)
    if settings.providers.accelerated and settings.kv != "float16":
        allowed = "float16 with other providers than the CPU's"
        raise ConfigError("kv_precision", settings.kv, allowed)
    if settings.exact and settings.kv != "float32":
        raise ConfigError("kv_precision", settings.kv, "float32 with exact = True")
