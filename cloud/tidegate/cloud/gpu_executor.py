"""`GpuExecutor`: the engine's executor on the paged kernels, and on their references for tests.

All memory is taken at start: weights, the buffers of a worst-case step that really ran, staging,
and a KV cache of what is left. Decode steps are padded to a few shapes, so that they can be
recorded and replayed; steps with prompts in them run as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tidegate.cloud.draw_buffers import MOST_EDITS, DrawBuffers
from tidegate.cloud.gpu_memory import (
    LEFT_ALONE,
    MemoryPart,
    MemorySum,
    block_bytes,
    check_weights,
    kv_blocks,
    kv_bytes_per_token,
    precision_name,
)
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.graphs import CudaRecorder, Graphs
from tidegate.cloud.sharding import ShardedWeights, head_of_table, shard
from tidegate.cloud.step_buffers import DeviceStep, StepBuffers, StepShape
from tidegate.cloud.step_shapes import DecodeShapes, exact_shape
from tidegate.cloud.team import Team
from tidegate.engine.device_sampling import SampledStep
from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    PagedGeometry,
    Row,
    StepResult,
)
from tidegate.engine.facts import ExecutorFacts
from tidegate.engine.sampling import Draw
from tidegate.errors import ConfigError, ExecutionError
from tidegate.kernels.attention import workspace_floats
from tidegate.kernels.device_weights import DeviceWeights
from tidegate.kernels.kernel_set import Kernels, torch_kernels, triton_kernels
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.linear.workspace import LinearWorkspace
from tidegate.kernels.moe import MoeWorkspace
from tidegate.kernels.paged_kv import KvLayer
from tidegate.kernels.paged_ops import Device, PagedOps
from tidegate.kernels.sampling.asks import SamplingAsks
from tidegate.kernels.scratch import Scratch
from tidegate.kernels.weight_loading import load_weights
from tidegate.model.architecture import Architecture
from tidegate.model.rope import Rope
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
        head_part = None
        if team is not None:
            whole, part = arch, team.part
            weights, arch = ShardedWeights(weights, whole, part), shard(whole, part.world)
            head_part = partial(head_of_table, vocab=whole.vocab, part=part)
        self._arch = arch
        self._context_tokens = _context_tokens(arch, settings)
        self._at = torch.device(settings.device)
        on_gpu = self._at.type == "cuda"
        limit_bytes = _limit_bytes(settings, self._at)
        check_weights(arch, settings, limit_bytes)
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
        self._draws = DrawBuffers(rows=settings.step_logits, vocab=arch.vocab, device=self._at)
        probe = self._layer(self._probe_blocks())
        loaded = load_weights(
            arch, weights, dtype=settings.dtype, device=self._at, head_part=head_part
        )
        self._device = Device(
            kernels=kernels or (triton_kernels() if on_gpu else torch_kernels()),
            weights=loaded,
            layers=(probe,) * arch.layers,
            scratch=Scratch(self._at),
            ropes=_rope_tables(arch, self._context_tokens, self._at),
            workspace_floats=workspace_floats(
                arch.heads,
                probe,
                dtype=settings.dtype,
                most_requests=settings.rows,
                most_length=self._context_tokens,
                deterministic=settings.deterministic,
            ),
            linear_workspace=LinearWorkspace.of(
                loaded.products(),
                most_tokens=settings.step_tokens,
                dtype=settings.dtype,
                device=self._at,
                deterministic=settings.deterministic,
            ),
            moe_workspace=_moe_workspace(arch, loaded, settings),
            deterministic=settings.deterministic,
            group=team,
        )
        self._run_worst_cases()
        blocks = kv_blocks(
            arch,
            settings,
            context_tokens=self._context_tokens,
            used=self._used(),
            limit_bytes=limit_bytes,
        )
        self._blocks = blocks if team is None else team.least(blocks)
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
            runtime=f"torch {torch.__version__} on {_name(self._at)}",
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
        with _failing(step), torch.inference_mode():
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
        with _failing(step), torch.inference_mode():
            self._run(step.rows, draws)
            tokens = self._tokens[: len(draws)].cpu().numpy().astype(np.int64)[drawn]
            logits = self._logits[left].cpu().numpy()
        return SampledStep(tokens=tokens, sound=tokens >= 0, logits=logits)

    def prepared(self, rows: Sequence[Row], draws: Sequence[Draw | None]) -> Callable[[], None]:
        """What a decode step of these rows launches, to be measured alone; valid until the next."""
        shape = self._shapes.of(rows)
        assert shape is not None, "every row decodes one token"
        self._buffers.fill(rows, shape, self._settings.block_tokens)
        step = self._buffers.upload(shape, keep=True)
        _, asks = self._draws.load(draws, shape.logits)

        def launch() -> None:
            with torch.inference_mode():
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
            *cache,
        )

    def follow(self) -> None:
        """Run what the first of the team runs, until it closes its executor."""
        assert self._team is not None, "who follows is in a team"
        while (told := self._team.listen()) is not None:
            shape, decode = told
            self._team.receive(self._buffers.staging(shape))
            with torch.inference_mode():
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
        self._graphs.run((shape, wish) if decode else None, lambda: self._walk(step, asks))

    def _walk(self, step: DeviceStep, asks: SamplingAsks | None) -> None:
        ops = PagedOps(self._device, step.tensors, step.wanted)
        logits = ops.numbers(decoder(ops, self._arch, self._device.weights))
        self._logits[: len(logits)].copy_(logits)
        if asks is not None:
            self._device.kernels.sample(
                self._logits[: asks.rows], asks, out=self._tokens[: asks.rows]
            )

    def _run_worst_cases(self) -> None:
        """Run the largest steps there can be, so that every buffer gets its size.

        All rows write to one request's blocks, and what they compute means nothing.
        """
        settings, context_tokens = self._settings, self._context_tokens
        tokens = _shared(settings.step_tokens, settings.rows)
        logits = _shared(settings.step_logits, settings.rows)
        blocks = np.arange(self._probe_blocks() - 1, dtype=np.int32)
        prompts = [
            Row(
                tokens=np.zeros(min(some, context_tokens), np.int64),
                past=0,
                blocks=blocks,
                logits=min(wanted, context_tokens),
            )
            for some, wanted in zip(tokens, logits, strict=True)
        ]
        width = -(-context_tokens // settings.block_tokens)
        answers = [
            Row(
                tokens=np.zeros(1, np.int64),
                past=context_tokens - 1,
                blocks=np.zeros(width, np.int32),
            )
        ] * settings.rows
        with torch.inference_mode():
            for rows in (prompts, answers):
                shape = self._shapes.of(rows) or exact_shape(rows, settings.block_tokens)
                self._buffers.fill(rows, shape, settings.block_tokens)
                self._walk(self._buffers.upload(shape, keep=False), None)
        self._device.scratch.seal()

    def _probe_blocks(self) -> int:
        """Blocks of the cache that worst cases write to: one row of the largest step."""
        settings = self._settings
        longest = min(-(-settings.step_tokens // settings.rows), self._context_tokens)
        return -(-longest // settings.block_tokens) + 1

    def _layer(self, blocks: int) -> KvLayer:
        return KvLayer.allocate(
            blocks=blocks,
            block_tokens=self._settings.block_tokens,
            kv_heads=self._arch.kv_heads,
            head_size=self._arch.head_size,
            dtype=self._settings.dtype,
            precision=self._settings.kv_precision,
            device=self._at,
        )

    def _allocate(self) -> tuple[KvLayer, ...]:
        try:
            return tuple(self._layer(self._blocks) for _ in range(self._arch.layers))
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
        if self._at.type == "cuda":
            known = sum(part.nbytes for part in parts)
            others = max(0, torch.cuda.max_memory_allocated(self._at) - known)
            parts.append(MemoryPart(name="what kernels need besides", nbytes=others))
        return MemorySum(parts=tuple(parts))


@contextmanager
def _failing(step: ExecutorStep) -> Iterator[None]:
    """Name the step that fails."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        rows, tokens = len(step.rows), sum(len(row.tokens) for row in step.rows)
        raise ExecutionError(
            f"a step of {rows} rows and {tokens} tokens failed: {error}"
        ) from error


def _shared(whole: int, parts: int) -> list[int]:
    """`whole` in `parts` nearly equal parts, the larger ones first."""
    each, more = divmod(whole, parts)
    return [each + (place < more) for place in range(parts)]


def _context_tokens(arch: Architecture, settings: GpuSettings) -> int:
    if settings.context_tokens is None:
        return arch.context
    if settings.context_tokens > arch.context:
        raise ConfigError("context_tokens", settings.context_tokens, f"at most {arch.context}")
    return settings.context_tokens


def _limit_bytes(settings: GpuSettings, at: torch.device) -> int | None:
    if at.type != "cuda":
        return None if settings.memory_mib is None else settings.memory_mib << 20
    free = int(torch.cuda.mem_get_info(at)[0] * (1 - LEFT_ALONE))
    return free if settings.memory_mib is None else min(free, settings.memory_mib << 20)


def _rope_tables(
    arch: Architecture, context_tokens: int, at: torch.device
) -> dict[Rope, RopeTables]:
    ropes = {kind.rope for kind in arch.kinds if kind.rope is not None}
    return {rope: RopeTables.from_rope(rope, context_tokens, at) for rope in ropes}


def _moe_workspace(
    arch: Architecture, weights: DeviceWeights, settings: GpuSettings
) -> MoeWorkspace | None:
    some, kinds = weights.some_experts(), [kind.experts for kind in arch.kinds]
    if some is None:
        return None
    return MoeWorkspace.of(
        some,
        most_tokens=settings.step_tokens,
        chosen=max(one.chosen for one in kinds if one is not None),
        dtype=settings.dtype,
        device=settings.device,
    )


def _name(at: torch.device) -> str:
    return torch.cuda.get_device_name(at) if at.type == "cuda" else at.type
