"""OpenVINO GenAI's turn, on its continuous-batching pipeline.

Threads are given, the hint is latency, KV is u8 (its default), and a step takes prompts of 2048
tokens whole. `dynamic_quantization` is the number of activations that share a scale; 64 is the
weights' group and quicker than the default of 32. KV has the blocks that the turn needs. Prefix
caching is on only where it is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai
from measure import Spec, main

BLOCK_TOKENS = 32
"""Fixed by the CPU plugin."""


class OpenVinoSession:
    """See `measure.Session`."""

    kv_bytes: int | None = None

    def __init__(self, spec: Spec) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        longest = max(spec["prefix_tokens"], spec["prompt_tokens"]) + 64 + spec["decode_tokens"]
        streams = max([*spec["streams"], 1])
        scheduler.num_kv_blocks = (streams + 1) * -(-longest // BLOCK_TOKENS)
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = spec["prefix_tokens"] > 0
        properties = {
            "INFERENCE_NUM_THREADS": spec["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": spec["options"]["dynamic_quantization"],
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            spec["model"], scheduler, "CPU", properties
        )
        self._requests = 0

    def prefill(self, prompt: Sequence[int]) -> None:
        """See `Session.prefill`."""
        self.answer(prompt)

    def answer(self, prompt: Sequence[int]) -> None:
        """See `Session.answer`."""
        handle = self._add(prompt, 1)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        handle.read_all()

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """See `Session.decode`."""
        handles = [self._add(prompt, tokens + 1) for prompt in prompts]
        waiting = list(handles)
        while waiting:
            self._pipeline.step()
            waiting = [one for one in waiting if not one.can_read()]
        early = sum(len(new.generated_ids) for one in handles for new in one.read().values())
        began_s = time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        elapsed_s = time.perf_counter() - began_s
        rest = (tokens + 1) * len(handles) - early
        # A stream that began before the last one has fewer steps left: count what was timed.
        return elapsed_s * tokens * len(handles) / rest

    def _add(self, prompt: Sequence[int], tokens: int) -> openvino_genai.GenerationHandle:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        self._requests += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(self._requests, ids, config)


if __name__ == "__main__":
    main(OpenVinoSession)
