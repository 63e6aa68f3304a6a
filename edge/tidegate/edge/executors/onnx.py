"""`OnnxExecutor`: steps on ONNX Runtime, KV in slots that the attention operator updates in place.

The graph and its inputs are described in `tidegate.converters.onnx.ops`. Its attention takes either
one request with many tokens, or many requests with one token each, so a step is one run for all of
those and one for each of the others. Past and present KV are bound to the same memory; what lies
beyond a request's tokens is never read, and rewinding a request costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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
from tidegate.engine.spill import KvUnit
from tidegate.errors import BundleError, ConfigError, ExecutionError
from tidegate.model.architecture import Architecture

if TYPE_CHECKING:
    import onnxruntime

GRAPH, EXACT_GRAPH = "model.onnx", "model.exact.onnx"
"""The graph with int8 activations and the one with float32 activations, over the same weights."""

MAX_BINDINGS = 64
"""Kept for reuse: binding the KV of 22 layers anew costs 0.3 ms a run."""

FLOAT_BYTES = 4
"""KV is float32."""

UNIT_TOKENS = 32
"""Of a unit of KV that can be copied out, as large as OpenVINO's blocks."""

FATAL_ONLY = 4
"""Log severity: errors arrive as exceptions, so stderr need not have them too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxSettings:
    """How an `OnnxExecutor` runs. Memory is fixed by the first three."""

    slots: int
    """Requests that have KV at the same time."""
    context_tokens: int
    """Tokens of one slot; at most the model's context."""
    step_tokens: int
    """Tokens of all rows of one step."""
    threads: int | None = None
    """None leaves the number to ONNX Runtime, which takes the physical cores."""
    exact: bool = False
    """Multiply float32 activations instead of int8 ones: slower, and equal to the reference."""
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """Execution providers by preference; KV stays in host memory whichever runs the rest."""
    spinning: bool = False
    """Let idle threads spin: a little faster per token, and a busy core between tokens."""


class OnnxExecutor:
    """`tidegate.engine.executor.Executor` over the `onnx/` folder of a bundle."""

    def __init__(self, folder: Path, arch: Architecture, settings: OnnxSettings) -> None:
        """Load the model, allocate all KV, and run the largest steps once.

        Raises:
            ConfigError: a setting is out of range, or a provider is not available.
            BundleError: the graph cannot be loaded or is not of this architecture.
            ExecutionError: the graph cannot be run.
        """
        _check_settings(settings, arch)
        self._arch, self._settings = arch, settings
        self._session: onnxruntime.InferenceSession | None = _load(folder, arch, settings)
        self._head_sizes = _head_sizes(self._session, arch)
        self._kv = self._slots(settings.slots)
        self._logits = np.empty((self.limits.step_logits, arch.vocab), np.float32)
        self._bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}
        self._warm_up()

    def _slots(self, slots: int) -> SlotBuffers:
        return SlotBuffers(
            kv_heads=self._arch.kv_heads,
            head_sizes=self._head_sizes,
            slots=slots,
            slot_tokens=self._settings.context_tokens,
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
        return SlotGeometry(
            slots=self._settings.slots,
            slot_tokens=self._settings.context_tokens,
            bytes_per_token=2 * self._arch.kv_heads * sum(self._head_sizes) * FLOAT_BYTES,
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
            self._kv.copy(source, target, tokens)
        starts = np.cumsum([0, *(row.logits for row in step.rows)])
        result = np.empty((starts[-1], self._arch.vocab), np.float32)
        for batch in batches(step.rows):
            for i in batch:
                self._kv.will_hold(slots[i], step.rows[i].past + len(step.rows[i].tokens))
            first = self._kv.side_by_side([slots[i] for i in batch])
            ordered = sorted(batch, key=lambda i: self._kv.row(slots[i]))
            logits = self._run([step.rows[i] for i in ordered], first)
            places = [place for i in ordered for place in range(starts[i], starts[i + 1])]
            result[places] = logits
        return StepResult(logits=result)

    def close(self) -> None:
        """See `Executor.close`."""
        self._bindings.clear()
        self._session = None
        self._kv = self._slots(0)

    @property
    def kv_layout(self) -> str:
        """See `SpillingKv.kv_layout`."""
        import onnxruntime

        exact = self._settings.exact
        return f"onnxruntime {onnxruntime.__version__} exact={exact}: {self._kv.layout}"

    @property
    def unit_tokens(self) -> int:
        """See `SpillingKv.unit_tokens`."""
        return UNIT_TOKENS

    @property
    def unit_bytes(self) -> int:
        """See `SpillingKv.unit_bytes`."""
        return self._kv.nbytes(UNIT_TOKENS)

    def read_kv(self, unit: KvUnit) -> bytes:
        """See `SpillingKv.read_kv`."""
        self._check_unit(unit)
        return self._kv.read(unit.home, unit.first, UNIT_TOKENS)

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        """See `SpillingKv.write_kv`."""
        self._check_unit(unit)
        if len(data) != self.unit_bytes:
            raise ExecutionError(f"a KV unit of {len(data)} bytes: must be {self.unit_bytes}")
        self._kv.write(unit.home, unit.first, UNIT_TOKENS, data)

    def _check_unit(self, unit: KvUnit) -> None:
        if self._session is None:
            raise ExecutionError("the executor is closed")
        slots, tokens = self._settings.slots, self._settings.context_tokens
        if not 0 <= unit.home < slots or not 0 <= unit.first <= tokens - UNIT_TOKENS:
            raise ExecutionError(f"{unit}: must be within {slots} slots of {tokens} tokens")

    def _run(self, rows: Sequence[Row], first: int) -> Logits:
        """Run rows of equal token count whose KV begins at buffer row `first`.

        Returns:
            The logits that the rows want, a view that the next run overwrites.
        """
        try:
            return self._run_bound(rows, first)
        except Exception as error:
            slots = [row.slot for row in rows]
            tokens = len(rows[0].tokens)
            raise ExecutionError(f"slots {slots}, {tokens} tokens each: {error}") from error

    def _run_bound(self, rows: Sequence[Row], first: int) -> Logits:
        session = self._session
        assert session is not None
        tokens = np.stack([row.tokens for row in rows]).astype(np.int64, copy=False)
        lasts = np.array([row.past + len(row.tokens) - 1 for row in rows], np.int32)
        ends = [
            (i + 1) * tokens.shape[1] - left
            for i, row in enumerate(rows)
            for left in range(row.logits, 0, -1)
        ]
        inputs: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": tokens,
            "seqlens_k": lasts,
            "total_sequence_length": np.array(lasts.max() + 1, np.int32),
            "sampled": np.array(ends, np.int64),
        }
        logits = self._logits[: len(ends)]
        binding = self._binding(session, first, len(rows))
        for name, array in inputs.items():
            _bind(binding.bind_input, name, array)
        _bind(binding.bind_output, "logits", logits)
        session.run_with_iobinding(binding)
        return logits

    def _binding(
        self, session: onnxruntime.InferenceSession, first: int, count: int
    ) -> onnxruntime.IOBinding:
        """A binding whose KV is `count` buffer rows from `first` on, past and present alike."""
        if (first, count) in self._bindings:
            return self._bindings[first, count]
        if len(self._bindings) >= MAX_BINDINGS:
            self._bindings.clear()
        binding = self._bindings[first, count] = session.io_binding()
        for layer in range(self._arch.layers):
            for kind, buffers in (("key", self._kv.keys), ("value", self._kv.values)):
                view = buffers[layer][first : first + count]
                _bind(binding.bind_input, f"past_{kind}.{layer}", view)
                _bind(binding.bind_output, f"present_{kind}.{layer}", view)
        return binding

    def _warm_up(self) -> None:
        """Run the largest prefill and the largest decode, so that memory has reached its peak."""
        context = self._settings.context_tokens
        chunk = min(self._settings.step_tokens, context)
        prefill = Row(tokens=np.zeros(chunk, np.int64), past=context - chunk, slot=0)
        decode = Row(tokens=np.zeros(1, np.int64), past=context - 1)
        self._run([prefill], 0)
        self._run([decode] * min(self._settings.slots, self._settings.step_tokens), 0)


def _bind(bind: Callable[..., None], name: str, array: npt.NDArray[np.generic]) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _check_settings(settings: OnnxSettings, arch: Architecture) -> None:
    check_counts(settings, always=("slots", "step_tokens"), optional=("threads",))
    if not 1 <= settings.context_tokens <= arch.context:
        allowed = f"from 1 to the model's context of {arch.context}"
        raise ConfigError("context_tokens", settings.context_tokens, allowed)


def _load(folder: Path, arch: Architecture, settings: OnnxSettings) -> onnxruntime.InferenceSession:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for provider in settings.providers:
        if provider not in available:
            raise ConfigError("providers", provider, "one of " + ", ".join(available))
    path = folder / (EXACT_GRAPH if settings.exact else GRAPH)
    session = open_session(
        path,
        threads=settings.threads,
        spinning=settings.spinning,
        providers=settings.providers,
    )
    _check_signature(path, session, arch)
    return session


def open_session(
    path: Path,
    *,
    threads: int | None,
    spinning: bool = False,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Load a graph; arguments as in `OnnxSettings`. `BundleError` if it cannot be loaded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = threads or 0
    # It remembers a memory plan for every shape it meets, and chunks come in any length.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}") from error


def _check_signature(path: Path, session: onnxruntime.InferenceSession, arch: Architecture) -> None:
    """Binding memory of the wrong shape would write past its end, so compare shapes first."""
    shapes = {item.name: item.shape for item in [*session.get_inputs(), *session.get_outputs()]}
    past = {name: shape for name, shape in shapes.items() if name.startswith("past_")}
    expected = {f"past_{kind}.{layer}" for layer in range(arch.layers) for kind in ("key", "value")}
    fits = all(
        _holds_heads(shape, arch)
        and shape == past.get(name.replace("past_value", "past_key"))
        and shape == shapes.get(name.replace("past_", "present_"))
        for name, shape in past.items()
    )
    if not fits or past.keys() != expected or shapes.get("logits", [])[1:] != [arch.vocab]:
        raise BundleError(f"{path}: its inputs are not those of the manifest's architecture")


def _holds_heads(shape: Sequence[object], arch: Architecture) -> bool:
    """Whether a cache of `shape` has the model's heads, filled up by less than a multiple of 16."""
    match shape:
        case [_, heads, _, int(size)]:
            return heads == arch.kv_heads and arch.head_size <= size < arch.head_size + 16
        case _:
            return False


def _head_sizes(session: onnxruntime.InferenceSession, arch: Architecture) -> list[int]:
    """Values that each layer keeps of a head."""
    shapes = {item.name: item.shape for item in session.get_inputs()}
    return [int(shapes[f"past_key.{layer}"][3]) for layer in range(arch.layers)]
