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

from tidegate.cloud.draw_buffers import MOST_EDITS, DrawBuffers
from tidegate.cloud.gpu_device import (
    context_of,
    device_name,
    memory_limit,
    new_layer,
    open_device,
    part_of,
    running,
    worst_cases,
)
from tidegate.cloud.gpu_memory import (
    MemoryPart,
    MemorySum,
    block_bytes,
    check_weights,
    kv_blocks,
    kv_bytes_per_token,
    precision_name,
    with_kv,
)
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.graphs import CudaRecorder, Graphs
from tidegate.cloud.pending_step import PendingStep, failing, reached
from tidegate.cloud.step_buffers import DeviceStep, StepBuffers, StepShape
from tidegate.cloud.step_shapes import DecodeShapes, exact_shape
from tidegate.cloud.team import Team
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
from tidegate.kernels.paged_kv import KvLayer
from tidegate.kernels.paged_ops import PagedOps
from tidegate.kernels.sampling.asks import SamplingAsks
from tidegate.kernels.sampling.workspace import SamplingWorkspace
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

        Raises:
            ConfigError: a size is wrong, or the memory does not suffice; the sum is written out.
        """
        began_s = time.monotonic()
        self._team, self._settings = team, settings
        self._arch, self._context_tokens = part_of(arch, team), context_of(arch, settings)
        self._at = torch.device(settings.device)
        on_gpu = self._at.type == "cuda"
        limit_bytes = memory_limit(settings, self._at)
        first = weights.linear("layers.0.o") if limit_bytes is not None else None
        packed_bits = first.bits if isinstance(first, PackedLinear) else None
        world = 1 if team is None else team.part.world
        check_weights(self._arch, settings, limit_bytes, packed_bits=packed_bits, world=world)
        if graphs is None:
            graphs = Graphs(CudaRecorder() if on_gpu and settings.graphs else None)
        self._graphs = graphs
        self._shapes = DecodeShapes(
            rows=settings.rows,
            context_tokens=self._context_tokens,
            block_tokens=settings.block_tokens,
        )
        self._buffers = StepBuffers(
            rows=settings.rows,
            tokens=settings.step_tokens,
            logits=settings.step_logits,
            width=-(-self._context_tokens // settings.block_tokens),
            device=self._at,
        )
        self._logits = torch.zeros(
            (settings.step_logits, arch.vocab), dtype=torch.float32, device=self._at
        )
        self._tokens = torch.zeros(settings.step_logits, dtype=torch.int32, device=self._at)
        self._chosen = [
            torch.zeros(settings.step_logits, dtype=torch.int32, pin_memory=on_gpu)
            for _ in range(2)
        ]
        self._draws = DrawBuffers(rows=settings.step_logits, vocab=arch.vocab, device=self._at)
        self._sampling = SamplingWorkspace.allocate(
            rows=settings.step_logits,
            vocab=arch.vocab,
            edits=settings.step_logits * MOST_EDITS,
            device=self._at,
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
        blocks = kv_blocks(
            self._arch,
            settings,
            context_tokens=self._context_tokens,
            used=used,
            limit_bytes=limit_bytes,
        )
        self._blocks = blocks if team is None else team.least(blocks)
        self.memory = with_kv(used, self._arch, settings, self._blocks)
        """What this process takes of its device."""
        self._device = replace(self._device, layers=self._allocate())
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
            logits = self._logits[:count].to("cpu", copy=True).numpy()
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
            tokens = self._tokens[: len(draws)].cpu().numpy().astype(np.int64)[drawn]
            logits = self._logits[left].cpu().numpy() if left else _no_logits(self._arch.vocab)
        return SampledStep(tokens=tokens, sound=tokens >= 0, logits=logits)

    def submit(self, step: ExecutorStep, draws: Sequence[Draw]) -> PendingStep:
        """See `PipelinedExecutor.submit`."""
        with failing(step), running(self._at):
            self._run(step.rows, draws)
            self._chosen.reverse()
            host = self._chosen[0][: len(draws)]
            host.copy_(self._tokens[: len(draws)], non_blocking=True)
            return PendingStep(step=step, tokens=host, reached=reached(self._at))

    def prepared(self, rows: Sequence[Row], draws: Sequence[Draw | None]) -> Callable[[], None]:
        """What a decode step of these rows launches, to be measured alone; valid until the next."""
        shape = self._shapes.of(rows)
        assert shape is not None, "every row decodes one token"
        self._buffers.fill(rows, shape, self._settings.block_tokens)
        step = self._buffers.upload(shape, keep=True)
        _, asks = self._draws.load(draws, shape.logits)

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
            *self._buffers.addresses(),
            *self._device.scratch.addresses(),
            *self._draws.addresses(),
            self._logits.data_ptr(),
            self._tokens.data_ptr(),
            *(one.data_ptr() for one in self._chosen),
            *cache,
        )

    def follow(self) -> None:
        """Run what the first of the team runs, until it closes its executor."""
        assert self._team is not None, "who follows is in a team"
        while (told := self._team.listen()) is not None:
            shape, decode = told
            self._team.receive(self._buffers.staging(shape))
            with running(self._at):
                self._run_filled(shape, None, decode=decode)

    def _run(self, rows: Sequence[Row], draws: Sequence[Draw | None] | None) -> None:
        """Run the rows; their logits are the first of `self._logits`, tokens of `self._tokens`."""
        size = self._settings.block_tokens
        decode = self._shapes.of(rows)
        shape = decode or exact_shape(rows, size)
        staging = self._buffers.fill(rows, shape, size)
        if self._team is not None:
            self._team.tell(shape, staging, decode=decode is not None)
        self._run_filled(shape, draws, decode=decode is not None)

    def _run_filled(
        self, shape: StepShape, draws: Sequence[Draw | None] | None, *, decode: bool
    ) -> None:
        step = self._buffers.upload(shape, keep=decode)
        wish, asks = (None, None) if draws is None else self._draws.load(draws, shape.logits)
        if self._team is None:
            self._graphs.run((shape, wish) if decode else None, lambda: self._walk(step, asks))
            return
        # All of a team record the same steps at the same time, and only the first one chooses.
        self._graphs.run((shape, None) if decode else None, lambda: self._walk(step, None))
        self._choose(asks)

    def _walk(self, step: DeviceStep, asks: SamplingAsks | None) -> None:
        tokens, chosen = step.tensors.tokens, self._tokens
        if self._team is not None:
            self._team.share(chosen)  # only the first of the team has chosen
        # A token that could not be chosen is -1; its row's answer has ended by then.
        fed = chosen.index_select(0, step.fed.clamp(min=0)).clamp(min=0)
        known = tokens.index_select(0, step.last)
        tokens.index_copy_(0, step.last, torch.where(step.fed < 0, known, fed))
        ops = PagedOps(self._device, step.tensors, step.wanted)
        logits = ops.numbers(decoder(ops, self._arch, self._device.weights))
        self._logits[: len(logits)].copy_(logits)
        self._choose(asks)

    def _choose(self, asks: SamplingAsks | None) -> None:
        if asks is not None:
            self._device.kernels.sample(
                self._logits[: asks.rows],
                asks,
                out=self._tokens[: asks.rows],
                workspace=self._sampling,
            )

    def _run_worst_cases(self) -> None:
        """Run the largest steps there can be, so that every buffer gets its size."""
        size = self._settings.block_tokens
        if self._at.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._at)
        with running(self._at):
            for rows in worst_cases(self._settings, self._context_tokens):
                shape = self._shapes.of(rows) or exact_shape(rows, size)
                self._buffers.fill(rows, shape, size)
                self._walk(self._buffers.upload(shape, keep=False), None)
        self._device.scratch.seal()

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
        steps = scratch + self._buffers.nbytes + self._logits.nbytes + self._draws.nbytes
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


def _no_logits(vocab: int) -> Logits:
    return np.empty((0, vocab), np.float32)
