"""`TorchExecutor`: the engine's executor on `TorchOps`, for a cloud without a GPU and for tests.

It runs the walk itself, in float32, over slots of a KV buffer allocated at construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    Row,
    SlotGeometry,
    StepResult,
)
from tidegate.errors import ConfigError, ExecutionError
from tidegate.kernels.torch_lora import AdaptedTorchOps, AdapterTensors
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.lora import LowRank
from tidegate.model.resident import ResidentWeights
from tidegate.model.walk import Weights, decoder

_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchSettings:
    """Sizes fixed at start."""

    slots: int = 8
    context_tokens: int = 2048
    step_tokens: int = 512
    threads: int | None = None
    """Threads of torch's pool, for the whole process; its own default when None."""

    def __post_init__(self) -> None:
        for name in ("slots", "context_tokens", "step_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError("threads", self.threads, "at least 1, or absent")


class TorchExecutor:
    """See `tidegate.engine.executor.Executor`. Not thread safe, like every executor."""

    def __init__(self, arch: Architecture, weights: Weights, settings: TorchSettings) -> None:
        """Read all weights of `arch` and allocate the KV.

        Raises:
            ConfigError: the context is longer than the model's.
        """
        if settings.context_tokens > arch.context:
            raise ConfigError("context_tokens", settings.context_tokens, f"at most {arch.context}")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._arch, self._settings = arch, settings
        self._weights, self._tensors = ResidentWeights(weights), WeightTensors()
        self._kv = _allocate(arch, settings)
        self._adapters: dict[int, AdapterTensors] = {}
        self._retired: dict[int, AdapterTensors] = {}
        self._run([TorchRow(tokens=(0,), past=0, slot=0)])

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor.limits`."""
        return ExecutorLimits(
            context_tokens=self._settings.context_tokens,
            step_tokens=self._settings.step_tokens,
            step_rows=self._settings.slots,
            step_logits=self._settings.step_tokens,
            vocab=self._arch.vocab,
        )

    @property
    def kv(self) -> SlotGeometry:
        """See `Executor.kv`."""
        return SlotGeometry(
            slots=self._settings.slots,
            slot_tokens=self._settings.context_tokens,
            bytes_per_token=self._arch.kv_values_per_token * _FLOAT_BYTES,
        )

    def execute(self, step: ExecutorStep) -> StepResult:
        """See `Executor.execute`."""
        current = dict(self._adapters)  # before those that retired: in one of the two it is
        retired = self._retired
        adapters = {**retired, **current}
        self._check_adapters(step, adapters)
        try:
            for source, target, tokens in step.copies:
                for buffer in (*self._kv.keys, *self._kv.values):
                    buffer[target, :tokens] = buffer[source, :tokens]
            rows = [_torch_row(row) for row in step.rows]
            own = [None if row.adapter is None else adapters[row.adapter] for row in step.rows]
            logits = self._run(rows, own)
        except (RuntimeError, IndexError, ValueError) as error:
            tokens = sum(len(row.tokens) for row in step.rows)
            raise ExecutionError(
                f"a step of {len(step.rows)} rows and {tokens} tokens failed: {error}"
            ) from error
        for number in tuple(retired):  # whoever was planned with one has been in this step
            del retired[number]
        return StepResult(logits=logits.numpy())

    def load_adapter(self, number: int, layers: Mapping[str, LowRank]) -> None:
        """See `Adapting.load_adapter`."""
        linears = {role: self._weights.linear(role) for role in layers}
        self._adapters[number] = AdapterTensors.of(layers, linears)

    def unload_adapter(self, number: int) -> None:
        """See `Adapting.unload_adapter`; it is kept until the next step has ended."""
        found = self._adapters[number]
        self._retired = {**self._retired, number: found}
        del self._adapters[number]

    @staticmethod
    def _check_adapters(step: ExecutorStep, known: Mapping[int, AdapterTensors]) -> None:
        for row in step.rows:
            if row.adapter is not None and row.adapter not in known:
                raise ExecutionError(f"adapter {row.adapter} is not loaded")

    def close(self) -> None:
        """See `Executor.close`."""
        self._kv.keys.clear()
        self._kv.values.clear()
        self._tensors = WeightTensors()
        self._weights.clear()
        self._adapters.clear()
        self._retired.clear()

    def _run(
        self, rows: list[TorchRow], adapters: Sequence[AdapterTensors | None] = ()
    ) -> torch.Tensor:
        ops = TorchOps(rows, self._kv, self._tensors)
        if any(adapter is not None for adapter in adapters):
            ops = AdaptedTorchOps(rows, self._kv, self._tensors, adapters)
        with torch.inference_mode():
            return decoder(ops, self._arch, self._weights)


def _allocate(arch: Architecture, settings: TorchSettings) -> TorchKv:
    try:
        return TorchKv.allocate(
            layers=arch.layers,
            slots=settings.slots,
            tokens=settings.context_tokens,
            kv_heads=arch.kv_heads,
            head_size=arch.head_size,
        )
    except RuntimeError as error:  # torch's way to say that memory is out
        raise ConfigError("slots", settings.slots, "few enough for the KV to fit") from error


def _torch_row(row: Row) -> TorchRow:
    assert row.slot is not None, "the engine places rows in slots for a SlotGeometry"
    return TorchRow(
        tokens=tuple(row.tokens.tolist()),
        past=row.past,
        slot=row.slot,
        logits=row.logits,
    )
