"""Processor time that the engine spends on a step around its executor, which here does nothing.

Planning, the KV books, the hop to the thread and back, choosing tokens, detokenising and handing
out text, for 1 and 8 streams, greedy and sampled. Logits are ready-made rows of random tokens, so
nothing but the engine is timed, and hardly ever does a guess hold.

    python benchmarks/edge/step_overhead.py
    python benchmarks/edge/step_overhead.py --profile 8
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import random
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from tidegate.engine.engine import Engine
from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    PagedGeometry,
    SlotGeometry,
    StepResult,
)
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS, ANSWER_TOKENS = 64, 400
VOCAB = 32_000


class NullExecutor:
    """Answers every step at once, with logits that name any of 512 tokens."""

    def __init__(self, kind: str, vocab: int) -> None:
        self.limits = ExecutorLimits(
            context_tokens=1024, step_tokens=256, step_rows=8, step_logits=16, vocab=vocab
        )
        self.kv: PagedGeometry | SlotGeometry = (
            PagedGeometry(block_tokens=32, blocks=512, bytes_per_token=1)
            if kind == "paged"
            else SlotGeometry(slots=8, slot_tokens=1024, bytes_per_token=1)
        )
        generator = np.random.default_rng(0)
        self._logits = generator.normal(0, 1, (512, vocab)).astype(np.float32)
        self._logits[np.arange(512), np.arange(300, 812)] = 20
        self._turns = random.Random(1)

    def execute(self, step: ExecutorStep) -> StepResult:
        rows = sum(row.logits for row in step.rows)
        turn = self._turns.randrange(512 - rows)
        return StepResult(logits=self._logits[turn : turn + rows])

    def close(self) -> None:
        """Nothing to free."""


async def step_us(text: TextModel, kind: str, streams: int, *, warm: bool, guess: bool) -> float:
    """Of the steps that decode: `streams` answers, read as they come."""
    settings = EngineSettings(speculation=guess, prefix_reuse=True)
    engine = Engine(NullExecutor(kind, VOCAB), text, model_id="null", settings=settings)
    sampling = SamplingParams(
        max_tokens=ANSWER_TOKENS,
        temperature=0.8 if warm else 0,
        top_p=0.95 if warm else 1.0,
        seed=1,
        ignore_eos=True,
    )

    async def read(number: int) -> None:
        prompt = tuple(range(number + 3, number + 3 + PROMPT_TOKENS))
        request = GenerationRequest(id=RequestId(str(number)), prompt=prompt, sampling=sampling)
        async for _ in engine.submit(request):
            pass

    running = asyncio.create_task(engine.run())
    # Of the processor, both threads: waking a thread takes as long as the machine is busy.
    began_s = time.process_time()
    await asyncio.gather(*(read(number) for number in range(streams)))
    spent_s = time.process_time() - began_s
    steps = engine.snapshot().steps
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    return spent_s / steps * 1e6


def main() -> int:
    """Print a line for each case, or the profile of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", type=int, metavar="STREAMS")
    args = parser.parse_args()
    text = TextModel.load(ROOT / "examples/assistant/edge", context_tokens=1024)
    if args.profile:
        profile = cProfile.Profile()
        profile.enable()
        asyncio.run(step_us(text, "paged", args.profile, warm=False, guess=True))
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return 0
    cases = [
        (kind, streams, warm, guess)
        for kind in ("paged", "slots")
        for streams in (1, 8)
        for warm, guess in ((False, False), (False, True), (True, False))
    ]
    found: dict[tuple[str, int, bool, bool], list[float]] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case in cases:
            kind, streams, warm, guess = case
            spent = asyncio.run(step_us(text, kind, streams, warm=warm, guess=guess))
            found[case].append(spent)
    for (kind, streams, warm, guess), values in found.items():
        how = ("sampled" if warm else "greedy") + (", guessing" if guess else "")
        print(
            f"{kind:<6} {streams} x {how:<18} {statistics.median(values):>7.0f} us a step"
            f" (least {min(values):.0f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
