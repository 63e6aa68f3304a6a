"""Our turn: the executor in a plain greedy loop; prompts that share a prefix through the engine.

Options: `choice` of the executor, `native`, whether its own 4-bit linear runs (None where the
executor has none), and `through`, whether streams are decoded by the loop or the engine. KV has
room for all streams of the turn, the step for 256 tokens as the daemon has it; what one start keeps
for the next lies beside the bundle, so every turn but the first finds it.
"""

from __future__ import annotations

import asyncio
import atexit
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import Spec, main

from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.edge.executors.openvino import OpenVinoExecutor
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.executor import Executor, ExecutorStep, Row
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.text import TextModel
from tidegate.model.bundle import Bundle

CACHE = "start-cache"
"""Beside the bundle: what a start keeps for the next, as the daemon does."""
BLOCK_TOKENS = 32
"""Of OpenVINO's paged KV on a CPU."""


def open_for(spec: Spec, bundle: Bundle) -> Executor:
    """The executor that the turn asks for."""
    longest = max(spec["prefix_tokens"], spec["prompt_tokens"]) + 64 + spec["decode_tokens"]
    # Whole blocks, so that every stream has its own.
    whole = -(-longest // BLOCK_TOKENS) * BLOCK_TOKENS
    settings = ExecutorSettings(
        choice=spec["options"]["choice"],
        context_tokens=min(whole, bundle.manifest.context_tokens),
        rows=max([*spec["streams"], 1]),
        threads=spec["threads"],
        cache_dir=Path(spec["model"]).parent / CACHE,
    )
    if spec["options"]["native"] is not None:
        settings = replace(settings, **{"native": spec["options"]["native"]})
    return open_executor(bundle, settings)


def kv_bytes(executor: Executor) -> int:
    """All KV of an executor."""
    kv = executor.kv
    tokens = kv.slots * kv.slot_tokens if kv.kind == "slots" else kv.blocks * kv.block_tokens
    return tokens * kv.bytes_per_token


def wait_for_huge_pages(executor: Executor) -> None:
    """Weights that were mapped move a few seconds after a start: streams come after that."""
    if isinstance(executor, OpenVinoExecutor) and executor.facts.cache.endswith("cache"):
        deadline_s = time.monotonic() + 10
        while not executor.in_huge_pages and time.monotonic() < deadline_s:
            time.sleep(0.05)


class TidegateSession:
    """See `measure.Session`."""

    def __init__(self, spec: Spec) -> None:
        self._bundle = Bundle.open(Path(spec["model"]))
        self._executor = open_for(spec, self._bundle)
        self._through = spec["options"].get("through", "executor")
        self._engine: Engine | None = None
        self._runner = asyncio.Runner()
        self._requests = 0

    @property
    def kv_bytes(self) -> int | None:
        """See `Session.kv_bytes`."""
        return kv_bytes(self._executor)

    def prefill(self, prompt: Sequence[int]) -> None:
        """See `Session.prefill`."""
        self._read(0, prompt)

    def decode(self, prompts: Sequence[Sequence[int]], warm: int, tokens: int) -> float:
        """See `Session.decode`."""
        wait_for_huge_pages(self._executor)
        if self._through == "engine":
            return self._runner.run(self._decode_in_engine(prompts, warm, tokens))
        newest = np.array([self._read(i, prompt) for i, prompt in enumerate(prompts)])
        lengths = [len(prompt) for prompt in prompts]
        for step in range(warm + tokens):
            if step == warm:
                began_s = time.perf_counter()
            rows = (
                self._row(place, newest[place : place + 1], length + step)
                for place, length in enumerate(lengths)
            )
            result = self._executor.execute(ExecutorStep(rows=tuple(rows)))
            newest = result.logits.argmax(-1)
        return time.perf_counter() - began_s

    def answer(self, prompt: Sequence[int]) -> None:
        """See `Session.answer`."""
        self._runner.run(self._first_token(prompt))

    async def _first_token(self, prompt: Sequence[int]) -> None:
        await self._stream(prompt, 1)

    async def _decode_in_engine(
        self, prompts: Sequence[Sequence[int]], warm: int, tokens: int
    ) -> float:
        """As the daemon's streams are timed: prompts are known, and all of them run."""
        for prompt in prompts:
            await self._stream(prompt, 1)
        whole = 1 + warm + tokens
        streams = await asyncio.gather(*(self._stream(prompt, whole) for prompt in prompts))
        began_s, ended_s = max(one[warm] for one in streams), min(one[-1] for one in streams)
        inside = sum(began_s < at <= ended_s for one in streams for at in one)
        return (ended_s - began_s) * tokens * len(streams) / inside

    async def _stream(self, prompt: Sequence[int], tokens: int) -> list[float]:
        """When each token of an answer came."""
        if self._engine is None:
            text = TextModel.load(self._bundle.folder, context_tokens=8192)
            self._engine = Engine(self._executor, text, model_id="bench")
            self._loop = asyncio.create_task(self._engine.run())
            atexit.register(self._runner.close)
        self._requests += 1
        request = GenerationRequest(
            id=RequestId(str(self._requests)),
            prompt=tuple(prompt),
            sampling=SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
            # What is compared is the way of a token, and random weights repeat themselves.
            speculation=False,
        )
        times: list[float] = []
        async for event in self._engine.submit(request, join_unread=False):
            if isinstance(event, TextDelta):
                times += [time.perf_counter()] * len(event.tokens)
            else:
                assert isinstance(event, Finished), event
        return times

    def _read(self, place: int, prompt: Sequence[int]) -> int:
        """Read a prompt in the chunks of a step; the token after it."""
        chunk = self._executor.limits.step_tokens
        tokens = np.array(prompt, np.int64)
        for start in range(0, len(tokens), chunk):
            row = self._row(place, tokens[start : start + chunk], start)
            result = self._executor.execute(ExecutorStep(rows=(row,)))
        return int(result.logits[0].argmax())

    def _row(self, place: int, tokens: np.ndarray, past: int) -> Row:
        kv = self._executor.kv
        if kv.kind == "slots":
            return Row(tokens=tokens, past=past, slot=place)
        blocks = -(-self._executor.limits.context_tokens // kv.block_tokens)
        used = np.arange(-(-(past + len(tokens)) // kv.block_tokens), dtype=np.int32)
        return Row(tokens=tokens, past=past, blocks=used + place * blocks)


if __name__ == "__main__":
    main(TidegateSession)
