"""`OpenVinoExecutor`: steps on OpenVINO, KV in blocks that any request may own.

The graph and its inputs are described in `tidegate.converters.openvino.ops`. A step is one run,
whatever mixture of prefill chunks and decode rows it holds: their tokens lie one after another and
the attention operator reads and writes each request's blocks. Input tensors are allocated for the
largest step and only their shapes change, so a running executor asks for no memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.openvino_model import (
    BLOCK_TOKENS,
    Graph,
    Library,
    OpenVinoSettings,
    allocate_kv,
    check_settings,
    compile_graph,
    kv_precision,
    openvino_release,
)
from tidegate.edge.executors.settings import STEP_LOGITS, check_row_logits, check_totals
from tidegate.engine.executor import (
    Blocks,
    ExecutorLimits,
    ExecutorStep,
    Logits,
    PagedGeometry,
    Row,
    StepResult,
)
from tidegate.engine.facts import ExecutorFacts
from tidegate.engine.spill import KvUnit
from tidegate.errors import ConfigError, ExecutionError
from tidegate.model.architecture import Architecture

__all__ = ["OpenVinoExecutor", "OpenVinoSettings"]

_HUGE_AFTER_S = 3.0
"""Weights move to huge pages after the first answers, which a start is waited for."""


class OpenVinoExecutor:
    """`tidegate.engine.executor.Executor` over the `openvino/` folder of a bundle."""

    def __init__(self, folder: Path, arch: Architecture, settings: OpenVinoSettings) -> None:
        """Load the model, allocate all KV, and run the largest steps once.

        Raises:
            ConfigError: a setting is out of range, or OpenVINO is not the version this needs.
            BundleError: the graph cannot be loaded or is not of this architecture.
            ExecutionError: the largest step failed.
        """
        check_settings(settings, arch)
        self._arch, self._settings = arch, settings
        began_s = time.perf_counter()
        # The compiled graph reads the tiles that it holds.
        self._graph: Graph | None = compile_graph(folder / "model.xml", arch, settings)
        compiled = self._graph.compiled
        blocks = blocks_for(settings.kv_tokens)
        try:
            self._caches = allocate_kv(compiled, blocks)
        except (MemoryError, RuntimeError) as error:
            allowed = f"what fits into memory: {error}"
            raise ConfigError("kv_tokens", settings.kv_tokens, allowed) from error
        self._request: Library | None = compiled.create_infer_request()
        for name, tensor in self._caches.items():
            self._request.set_tensor(name, tensor)
        cache_bytes = sum(tensor.get_byte_size() for tensor in self._caches.values())
        self._unit_bytes = int(cache_bytes // blocks)
        self._kv = PagedGeometry(
            block_tokens=BLOCK_TOKENS,
            blocks=blocks,
            bytes_per_token=-(-cache_bytes // (blocks * BLOCK_TOKENS)),
        )
        self._layout = kv_layout(self._caches, linear=self._graph.linear, exact=settings.exact)
        self._requests: dict[int, Library] = {}
        """By threads; what has run before is warm."""
        swapped = self._graph.swapped
        with nullcontext() if swapped is None else swapped.place.rehearsal():
            self._warm_up()
        self._run([_zeros(1, 1)])
        if swapped is not None:
            swapped.place.move_after(_HUGE_AFTER_S)
        if (most := self.most_threads) is not None:
            self._requests[most] = self._request
        self._facts = ExecutorFacts(
            runtime=f"openvino {openvino_release()}",
            linear=self._graph.linear,
            threads=settings.threads,
            kv_precision=kv_precision(arch, settings),
            kv_bytes=cache_bytes,
            cache="nothing to keep" if swapped is None else swapped.place.tiles.source,
            load_s=time.perf_counter() - began_s,
        )

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor.limits`."""
        return ExecutorLimits(
            context_tokens=self._settings.context_tokens,
            step_tokens=self._settings.step_tokens,
            step_rows=self._settings.step_rows,
            step_logits=max(self._settings.step_rows, STEP_LOGITS),
            vocab=self._arch.vocab,
        )

    @property
    def kv(self) -> PagedGeometry:
        """See `Executor.kv`."""
        return self._kv

    def execute(self, step: ExecutorStep) -> StepResult:
        """See `Executor.execute`: one run of the graph.

        Raises:
            ExecutionError: a row is outside the limits, in which case nothing has run, or
                OpenVINO failed.
        """
        self._check(step)
        return StepResult(logits=self._run(step.rows))

    def close(self) -> None:
        """See `Executor.close`."""
        self._request = None
        self._requests = {}
        self._caches = {}
        if self._graph is not None and self._graph.swapped is not None:
            self._graph.swapped.place.close()
        self._graph = None

    @property
    def in_huge_pages(self) -> bool:
        """The native layer's tiles have moved to huge pages."""
        swapped = self._graph.swapped if self._graph is not None else None
        return swapped is not None and swapped.place.moved

    @property
    def most_threads(self) -> int | None:
        """See `LiveThreads.most_threads`: those that the model was opened with.

        None without the native layer: a graph for fewer threads would have weights of its own.
        """
        if self._graph is None or self._graph.swapped is None:
            return None
        return int(self._graph.compiled.get_property("INFERENCE_NUM_THREADS"))

    def limit_threads(self, threads: int) -> None:
        """See `LiveThreads.limit_threads`; from the next step on.

        The first time, the graph is compiled once more, over the same tiles and KV (1.1 B weights:
        0.5 s of processor time and 20 MB). To hold oneTBB's threads back for the process would
        take no time, but it leaves them spinning now and then (2021.13, its `global_control`).
        """
        most = self.most_threads
        if most is None or not 1 <= threads <= most:
            allowed = "absent: threads are fixed here" if most is None else f"from 1 to {most}"
            raise ConfigError("threads", threads, allowed)
        assert self._graph is not None
        request = self._requests.get(threads)
        if request is None:
            try:
                compiled = self._graph.compiled if threads == most else self._graph.again(threads)
                request = compiled.create_infer_request()
            except Exception as error:
                raise ExecutionError(f"OpenVINO failed to compile anew: {error}") from error
            for name, tensor in self._caches.items():
                request.set_tensor(name, tensor)
            self._requests[threads] = request
        self._request = request

    @property
    def facts(self) -> ExecutorFacts:
        """See `Described.facts`."""
        return self._facts

    @property
    def kv_layout(self) -> str:
        """See `SpillingKv.kv_layout`."""
        return self._layout

    @property
    def unit_tokens(self) -> int:
        """See `SpillingKv.unit_tokens`."""
        return BLOCK_TOKENS

    @property
    def unit_bytes(self) -> int:
        """See `SpillingKv.unit_bytes`."""
        return self._unit_bytes

    def read_kv(self, unit: KvUnit) -> bytes:
        """See `SpillingKv.read_kv`."""
        return b"".join(block.tobytes() for block in self._blocks(unit))

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        """See `SpillingKv.write_kv`."""
        blocks = self._blocks(unit)
        if len(data) != self.unit_bytes:
            raise ExecutionError(f"a KV unit of {len(data)} bytes: must be {self.unit_bytes}")
        begin = 0
        for block in blocks:
            block[...] = np.frombuffer(data, np.uint8, block.nbytes, begin)
            begin += block.nbytes

    def _blocks(self, unit: KvUnit) -> list[npt.NDArray[np.uint8]]:
        """The bytes of a block in every cache; views."""
        if not self._caches:
            raise ExecutionError("the executor is closed")
        if not 0 <= unit.home < self._kv.blocks or unit.first != 0:
            raise ExecutionError(f"{unit}: must be a whole block below {self._kv.blocks}")
        # Four-bit caches have no shape in numpy, but every block is a whole number of bytes.
        flat = (tensor.data.reshape(-1).view(np.uint8) for tensor in self._caches.values())
        return [cache.reshape(self._kv.blocks, -1)[unit.home] for cache in flat]

    def _run(self, rows: Sequence[Row]) -> Logits:
        if not rows:
            return np.empty((0, self._arch.vocab), np.float32)
        try:
            return self._infer(step_inputs(rows))
        except Exception as error:
            tokens = sum(len(row.tokens) for row in rows)
            where = f"a step of {len(rows)} rows and {tokens} tokens"
            raise ExecutionError(f"OpenVINO failed on {where}: {error}") from error

    def _infer(self, inputs: dict[str, npt.NDArray[np.int32]]) -> Logits:
        request = self._request  # another thread may change it for the next step
        if request is None:
            raise RuntimeError("the executor is closed")
        for name, values in inputs.items():
            # Within the capacity that the warm-up left, a new shape allocates nothing.
            tensor = request.get_tensor(name)
            tensor.shape = list(values.shape)
            tensor.data[...] = values
        request.infer()
        return np.array(request.get_tensor("logits").data, np.float32)

    def _warm_up(self) -> None:
        """Run the extreme steps, so that weights are repacked and memory has reached its peak.

        The widest prefill runs at the start of the context and narrow ones at its end: each takes
        the memory that it alone needs, and both at once would take minutes when it is long.
        """
        pool = self._kv.blocks * BLOCK_TOKENS
        context = min(self._settings.context_tokens, pool)
        widest = min(self._settings.step_tokens, context)
        rows = min(self._settings.step_rows, self._settings.step_tokens)
        self._run([_zeros(widest, widest)])
        self._run([_zeros(min(widest, BLOCK_TOKENS), context)])
        # Chunks of all rows: the keys and values of their blocks are unpacked together.
        share = max(min(context, pool // rows), 1)
        self._run([_zeros(max(min(2, widest // rows, share), 1), share)] * rows)
        self._run([_zeros(1, context)] * rows)
        if self._arch.attention_softcap is not None:
            # The graph holds the scores of all tokens of the step at once.
            self._run([_zeros(widest, context)])

    def _check(self, step: ExecutorStep) -> None:
        """Raise `ExecutionError` if the step is outside the limits."""
        if step.copies:
            raise ExecutionError("copies: blocks are shared, not copied; must be none")
        if len(step.rows) > self._settings.step_rows:
            raise ExecutionError(
                f"{len(step.rows)} rows in a step: at most {self._settings.step_rows}"
            )
        for index, row in enumerate(step.rows):
            self._check_row(index, row)
        check_totals(step, self.limits)

    def _check_row(self, index: int, row: Row) -> None:
        """The plugin checks neither tokens nor block ids and would read or write out of bounds."""
        context, count = self._settings.context_tokens, len(row.tokens)
        if count == 0 or row.past < 0 or row.past + count > context:
            raise ExecutionError(
                f"row {index}: {count} tokens after {row.past}: must be some, up to {context}"
            )
        check_row_logits(index, row)
        _check_range(f"row {index}: token", row.tokens, self._arch.vocab)
        needed = blocks_for(row.past + count)
        if row.blocks is None or len(row.blocks) < needed:
            given = 0 if row.blocks is None else len(row.blocks)
            raise ExecutionError(
                f"row {index}: {given} blocks: {row.past + count} tokens need {needed}"
            )
        _check_range(f"row {index}: block", row.blocks[:needed], self._kv.blocks)


def kv_layout(caches: dict[str, Library], *, linear: str, exact: bool) -> str:
    """`SpillingKv.kv_layout` of these cache tensors [blocks, ...].

    Native products round otherwise than OpenVINO's, in the same way on every processor.
    """
    import openvino

    shapes = [
        f"{name} {tensor.element_type.to_string()} {list(tensor.shape)[1:]}"
        for name, tensor in caches.items()
    ]
    native = linear.startswith("native")
    return f"openvino {openvino.__version__} {exact=} {native=}: " + ", ".join(shapes)


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def _zeros(count: int, end: int) -> Row:
    """A row of `count` tokens that ends at `end`, in the first blocks."""
    blocks = np.arange(blocks_for(end), dtype=np.int32)
    return Row(tokens=np.zeros(count, np.int64), past=end - count, blocks=blocks)


def step_inputs(rows: Sequence[Row]) -> dict[str, npt.NDArray[np.int32]]:
    """The graph's inputs for one step, all but the caches. Every row must have its blocks."""
    counts = [len(row.tokens) for row in rows]
    begins = np.cumsum([0, *counts])
    used = [_used_blocks(row) for row in rows]
    ends = [np.arange(end - row.logits, end) for end, row in zip(begins[1:], rows, strict=True)]
    inputs = {
        "input_ids": np.concatenate([row.tokens for row in rows]),
        "position_ids": np.concatenate(
            [np.arange(row.past, row.past + len(row.tokens)) for row in rows]
        ),
        "past_lens": np.array([row.past for row in rows]),
        "subsequence_begins": begins,
        "block_indices": np.concatenate(used),
        "block_indices_begins": np.cumsum([0, *(len(blocks) for blocks in used)]),
        "max_context_len": np.array(max(row.past + len(row.tokens) for row in rows)),
        "sampled": np.concatenate(ends),
    }
    return {name: values.astype(np.int32) for name, values in inputs.items()}


def _used_blocks(row: Row) -> Blocks:
    assert row.blocks is not None, "checked before the step runs"
    return row.blocks[: blocks_for(row.past + len(row.tokens))]


def _check_range(what: str, values: npt.NDArray[np.signedinteger], limit: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise ExecutionError(f"{what} {low if low < 0 else high}: must be below {limit}")
