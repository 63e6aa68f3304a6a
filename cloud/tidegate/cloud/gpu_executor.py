"""`GpuExecutor`: the engine's executor on the paged kernels, and on their references for tests.

All memory is taken at start: weights, the buffers of a worst-case step that really ran, staging,
and a KV cache of what is left. Decode steps are padded to a few shapes, so that they can be
recorded and replayed; steps with prompts in them run as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from tidegate.cloud.draw_buffers import MOST_EDITS
from tidegate.cloud.gpu_device import (
    context_of,
    device_name,
    memory_limit,
    new_layer,
    open_device,
    part_of,
    running,
    wait_for,
    worst_cases,
)
from tidegate.cloud.gpu_memory import (
    MemoryPart,
    MemorySum,
    block_bytes,
    check_weights,
    kv_blocks,
    kv_bytes_per_token,
    least_blocks,
    precision_name,
    with_kv,
)
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.graphs import CudaRecorder, Graphs
from tidegate.cloud.pending_step import PendingStep, failing, reached
from tidegate.cloud.step_buffers import DeviceStep, StepShape, feed
from tidegate.cloud.step_memory import StepMemory
from tidegate.cloud.step_shapes import DecodeShapes, exact_shape
from tidegate.cloud.team import Team
from tidegate.cloud.warm_up import warm_counts, warm_draws, warm_rows
from tidegate.engine.device_sampling import SampledStep
from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    Logits,
    PagedGeometry,
    Row,
    StepResult,
)
from tidegate.engine.facts import ExecutorFacts
from tidegate.engine.sampling import Draw
from tidegate.errors import ConfigError
from tidegate.kernels.device_weights import DeviceWeights
from tidegate.kernels.kernel_set import Kernels, torch_kernels, triton_kernels
from tidegate.kernels.launch import gpu_of
from tidegate.kernels.paged_kv import KvLayer
from tidegate.kernels.paged_ops import PagedOps
from tidegate.kernels.sampling.asks import SamplingAsks
from tidegate.kernels.scratch import Scratch
from tidegate.model.architecture import Architecture
from tidegate.model.packed import PackedLinear
from tidegate.model.walk import Weights, decoder

Tensor = torch.Tensor


class GpuExecutor:
    """See `tidegate.engine.executor.Executor`. Not thread safe, like every executor."""

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        settings: GpuSettings,
        *,
        kernels: Kernels | None = None,
        graphs: Graphs | None = None,
        team: Team | None = None,
        warm: bool | None = None,
    ) -> None:
        """Read all weights, run a worst-case step, and allocate the KV.

        Args:
            arch: the model, the whole of it.
            weights: may be closed afterwards.
            settings: sizes.
            kernels: None for Triton's on CUDA and the references elsewhere.
            graphs: None for what the device can and the settings ask for.
            team: whom it runs the model with, everybody a part; those that are not the first call
                `follow`.
            warm: whether to run a step of each kind that serving can meet, so that all kernels are
                compiled; None for where kernels are compiled at all.

        Raises:
            ConfigError: a size is wrong, or the memory does not suffice; the sum is written out.
        """
        began_s = time.monotonic()
        self._team, self._settings = team, settings
        self._arch, self._context_tokens = part_of(arch, team), context_of(arch, settings)
        self._at = torch.device(settings.device)
        on_gpu = self._at.type == "cuda"
        self._limit_bytes = memory_limit(settings, self._at)
        self._check_weights(weights)
        recorder = CudaRecorder() if graphs is None and on_gpu and settings.graphs else None
        self._graphs = Graphs(recorder) if graphs is None else graphs
        self._shapes = _shapes_of(settings, self._context_tokens)
        self._memory = StepMemory.allocate(
            settings, vocab=arch.vocab, context_tokens=self._context_tokens, device=self._at
        )
        self._device = open_device(
            arch,
            weights,
            settings,
            context_tokens=self._context_tokens,
            kernels=kernels or (triton_kernels() if on_gpu else torch_kernels()),
            team=team,
        )
        self._run_worst_cases()
        used = self._used()
        self._blocks = self._fitting_blocks(used)
        self.memory = with_kv(used, self._arch, settings, self._blocks)
        """What this process takes of its device."""
        self._device = replace(self._device, layers=self._allocate())
        if on_gpu if warm is None else warm:
            self._warm_up()
        self._load_s = time.monotonic() - began_s

    @property
    def settings(self) -> GpuSettings:
        """As it was made."""
        return self._settings

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor.limits`."""
        return ExecutorLimits(
            context_tokens=self._context_tokens,
            step_tokens=self._settings.step_tokens,
            step_rows=self._settings.rows,
            step_logits=self._settings.step_logits,
            vocab=self._arch.vocab,
        )

    @property
    def kv(self) -> PagedGeometry:
        """See `Executor.kv`; without nobody's block."""
        return PagedGeometry(
            block_tokens=self._settings.block_tokens,
            blocks=self._blocks - 1,
            bytes_per_token=kv_bytes_per_token(self._arch, self._settings),
        )

    @property
    def facts(self) -> ExecutorFacts:
        """See `Described`."""
        return ExecutorFacts(
            runtime=f"torch {torch.__version__} on {device_name(self._at)}",
            linear=self._device.kernels.name,
            threads=None,
            kv_precision=precision_name(self._settings),
            kv_bytes=self._blocks * block_bytes(self._arch, self._settings),
            cache="none",
            load_s=self._load_s,
        )

    def execute(self, step: ExecutorStep) -> StepResult:
        """See `Executor.execute`."""
        count = sum(row.logits for row in step.rows)
        with failing(step), running(self._at):
            self._run(step.rows, None)
            logits = self._memory.logits[:count].to("cpu", copy=True).numpy()
        return StepResult(logits=logits)

    def can_draw(self, draw: Draw) -> bool:
        """See `SamplingExecutor.can_draw`: all but draws about very many tokens."""
        named = len(draw.params.logit_bias) + len(draw.ends)
        if draw.history is not None:
            named += len(draw.history.ids)
        return named <= MOST_EDITS

    def execute_and_sample(self, step: ExecutorStep, draws: Sequence[Draw | None]) -> SampledStep:
        """See `SamplingExecutor.execute_and_sample`."""
        drawn = [place for place, draw in enumerate(draws) if draw is not None]
        left = [place for place, draw in enumerate(draws) if draw is None]
        with failing(step), running(self._at):
            self._run(step.rows, draws)
            tokens = self._memory.tokens[: len(draws)].cpu().numpy().astype(np.int64)[drawn]
            logits = (
                self._memory.logits[left].cpu().numpy() if left else _no_logits(self._arch.vocab)
            )
        return SampledStep(tokens=tokens, sound=tokens >= 0, logits=logits)

    def submit(self, step: ExecutorStep, draws: Sequence[Draw]) -> PendingStep:
        """See `PipelinedExecutor.submit`."""
        with failing(step), running(self._at):
            self._run(step.rows, draws)
            self._memory.chosen.reverse()
            host = self._memory.chosen[0][: len(draws)]
            host.copy_(self._memory.tokens[: len(draws)], non_blocking=True)
            return PendingStep(step=step, tokens=host, reached=reached(self._at))

    def prepared(self, rows: Sequence[Row], draws: Sequence[Draw | None]) -> Callable[[], None]:
        """What a decode step of these rows launches, to be measured alone; valid until the next."""
        shape = self._shapes.of(rows)
        assert shape is not None, "every row decodes one token"
        self._memory.steps.fill(rows, shape, self._settings.block_tokens)
        step = self._memory.steps.upload(shape, keep=True)
        _, asks = self._memory.draws.load(draws, shape.logits)

        def launch() -> None:
            with running(self._at):
                self._walk(step, asks)

        return launch

    def close(self) -> None:
        """See `Executor.close`."""
        if self._team is not None and self._team.part.rank == 0:
            self._team.dismiss()
        self._graphs.clear()
        self._device = replace(
            self._device, layers=(), weights=DeviceWeights(), scratch=Scratch(self._at), ropes={}
        )

    def addresses(self) -> tuple[int, ...]:
        """Where all that outlives a step lies, for tests that it stays there."""
        cache = (one.data_ptr() for kv in self._device.layers for one in (kv.keys, kv.values))
        return (
            *self._memory.addresses(),
            *self._device.scratch.addresses(),
            *cache,
        )

    def follow(self) -> None:
        """Run what the first of the team runs, until it closes its executor."""
        assert self._team is not None, "who follows is in a team"
        while (told := self._team.listen()) is not None:
            shape, decode = told
            self._team.receive(self._memory.steps.staging(shape))
            with running(self._at):
                self._run_filled(shape, None, decode=decode)

    def _run(self, rows: Sequence[Row], draws: Sequence[Draw | None] | None) -> None:
        """Run the rows; the first of the memory's logits and tokens are theirs."""
        size = self._settings.block_tokens
        decode = self._shapes.of(rows)
        shape = decode or exact_shape(rows, size)
        staging = self._memory.steps.fill(rows, shape, size)
        if self._team is not None:
            self._team.tell(shape, staging, decode=decode is not None)
        self._run_filled(shape, draws, decode=decode is not None)

    def _run_filled(
        self, shape: StepShape, draws: Sequence[Draw | None] | None, *, decode: bool
    ) -> None:
        step = self._memory.steps.upload(shape, keep=decode)
        wish, asks = (None, None) if draws is None else self._memory.draws.load(draws, shape.logits)
        if self._team is None:
            self._graphs.run((shape, wish) if decode else None, lambda: self._walk(step, asks))
            return
        # All of a team record the same steps at the same time, and only the first one chooses.
        self._graphs.run((shape, None) if decode else None, lambda: self._walk(step, None))
        self._choose(asks)

    def _walk(self, step: DeviceStep, asks: SamplingAsks | None) -> None:
        if self._team is not None:
            self._team.share(self._memory.tokens)  # only the first of the team has chosen
        feed(step, self._memory.tokens, self._device.scratch)
        ops = PagedOps(self._device, step.tensors, step.wanted, logits=self._memory.logits)
        ops.numbers(decoder(ops, self._arch, self._device.weights))
        self._choose(asks)

    def _choose(self, asks: SamplingAsks | None) -> None:
        if asks is not None:
            self._device.kernels.sample(
                self._memory.logits[: asks.rows],
                asks,
                out=self._memory.tokens[: asks.rows],
                workspace=self._memory.sampling,
            )

    def _check_weights(self, weights: Weights) -> None:
        if self._limit_bytes is not None:
            first = weights.linear("layers.0.o")
            packed_bits = first.bits if isinstance(first, PackedLinear) else None
            check_weights(
                self._arch,
                self._settings,
                self._limit_bytes,
                packed_bits=packed_bits,
                world=1 if self._team is None else self._team.part.world,
            )

    def _fitting_blocks(self, used: MemorySum) -> int:
        """Blocks of the KV; the least that any of the team has room for."""
        blocks = kv_blocks(
            self._arch,
            self._settings,
            context_tokens=self._context_tokens,
            used=used,
            limit_bytes=self._limit_bytes,
        )
        return blocks if self._team is None else self._team.least(blocks)

    def _run_worst_cases(self) -> None:
        """Run the largest steps there can be, so that every buffer gets its size."""
        if self._at.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._at)
        with running(self._at):
            for rows in worst_cases(self._settings, self._context_tokens):
                self._run_alone(rows)
        self._device.scratch.seal()

    def _run_alone(self, rows: Sequence[Row]) -> None:
        """One step whose results nobody reads, to its end.

        Steps that are served are read before the next but one is written, so two stagings suffice.
        Here nothing else would wait, and a staging would be overwritten while its copy is queued.
        """
        size = self._settings.block_tokens
        shape = self._shapes.of(rows) or exact_shape(rows, size)
        self._memory.steps.fill(rows, shape, size)
        self._walk(self._memory.steps.upload(shape, keep=False), None)
        wait_for(self._at)

    def _warm_up(self) -> None:
        """Run a step of each kind, and choose in each way."""
        weights, settings, context = self._device.weights, self._settings, self._context_tokens
        counts = warm_counts(self._arch, weights, settings, gpu_of(self._at))
        if self._team is not None:  # which all run the same steps, or wait for each other for ever
            counts = self._team.union(counts, settings.step_tokens)
        blocks = least_blocks(context, settings) - 1
        with running(self._at):
            for rows in warm_rows(settings, context, counts, blocks):
                self._run_alone(rows)
            for draw in warm_draws(self._arch.vocab):
                self._choose(self._memory.draws.load([draw], 1)[1])
                wait_for(self._at)  # as in `_run_alone`

    def _allocate(self) -> tuple[KvLayer, ...]:
        try:
            return tuple(
                new_layer(self._arch, self._settings, self._blocks)
                for _ in range(self._arch.layers)
            )
        except RuntimeError as error:  # torch's way to say that memory is out
            tokens = (self._blocks - 1) * self._settings.block_tokens
            raise ConfigError("kv_tokens", tokens, "few enough for the KV to fit") from error

    def _used(self) -> MemorySum:
        scratch = self._device.scratch.nbytes
        steps = scratch + self._memory.nbytes
        parts = [
            MemoryPart(name="weights", nbytes=self._device.weights.nbytes),
            MemoryPart(name=f"steps of {self._settings.step_tokens} tokens", nbytes=steps),
        ]
        if self._team is not None:
            parts.append(MemoryPart(name="logits of all devices", nbytes=self._team.nbytes))
        if self._at.type == "cuda":
            known = sum(part.nbytes for part in parts)
            others = max(0, torch.cuda.max_memory_allocated(self._at) - known)
            parts.append(MemoryPart(name="what kernels need besides", nbytes=others))
        return MemorySum(parts=tuple(parts))


def _shapes_of(settings: GpuSettings, context_tokens: int) -> DecodeShapes:
    return DecodeShapes(
        rows=settings.rows, context_tokens=context_tokens, block_tokens=settings.block_tokens
    )


def _no_logits(vocab: int) -> Logits:
    return np.empty((0, vocab), np.float32)
