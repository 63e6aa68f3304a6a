"""OpenVINO GenAI's turn: its continuous-batching pipeline, or its plain one for a single stream.

Threads are given, the hint is latency, KV is u8 (its default), and a step takes prompts of 2048
tokens whole. `dynamic_quantization` is the number of activations that share a scale; 64 is the
weights' group and quicker than the default of 32. KV has the blocks that the turn needs. Prefix
caching is on only where it is measured. Option `pipeline`: `batching`, or `plain` for `LLMPipeline`
on the stateful model (its `SDPA` backend; by default it would be the batching one in disguise).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai
from measure import Session, Spec, main

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
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            spec["model"], scheduler, "CPU", properties(spec)
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

    def decode(self, prompts: Sequence[Sequence[int]], warm: int, tokens: int) -> float:
        """See `Session.decode`."""
        handles = [self._add(prompt, 1 + warm + tokens) for prompt in prompts]
        made = [0] * len(handles)
        while min(made) <= warm:
            self._pipeline.step()
            for place, handle in enumerate(handles):
                made[place] += _new_tokens(handle)
        began_s = time.perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        elapsed_s = time.perf_counter() - began_s
        # A stream that began before the last one has fewer steps left: count what was timed.
        rest = (1 + warm + tokens) * len(handles) - sum(made)
        return elapsed_s * tokens * len(handles) / rest

    def _add(self, prompt: Sequence[int], tokens: int) -> openvino_genai.GenerationHandle:
        self._requests += 1
        return self._pipeline.add_request(self._requests, ids_of(prompt), config_for(tokens))


def _new_tokens(handle: openvino_genai.GenerationHandle) -> int:
    """Tokens that a request has got since it was asked last."""
    if not handle.can_read():
        return 0
    return sum(len(new.generated_ids) for new in handle.read().values())


class Clock(openvino_genai.StreamerBase):
    """When each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        """See `StreamerBase.write`."""
        self.times.append(time.perf_counter())
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """See `StreamerBase.end`."""


class PlainSession:
    """See `measure.Session`; one stream."""

    kv_bytes: int | None = None

    def __init__(self, spec: Spec) -> None:
        self._pipeline = openvino_genai.LLMPipeline(
            spec["model"], "CPU", ATTENTION_BACKEND="SDPA", **properties(spec)
        )

    def prefill(self, prompt: Sequence[int]) -> None:
        """See `Session.prefill`."""
        self.answer(prompt)

    def answer(self, prompt: Sequence[int]) -> None:
        """See `Session.answer`; it keeps no prefix of a request."""
        self._pipeline.generate(ids_of(prompt), config_for(1))

    def decode(self, prompts: Sequence[Sequence[int]], warm: int, tokens: int) -> float:
        """See `Session.decode`."""
        (prompt,) = prompts
        clock = Clock()
        self._pipeline.generate(ids_of(prompt), config_for(1 + warm + tokens), clock)
        return clock.times[-1] - clock.times[warm]


def properties(spec: Spec) -> dict[str, object]:
    """How the model is compiled."""
    return {
        "INFERENCE_NUM_THREADS": spec["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": spec["options"]["dynamic_quantization"],
    }


def ids_of(prompt: Sequence[int]) -> openvino.Tensor:
    """Token ids [1, tokens]."""
    return openvino.Tensor(np.array([prompt], np.int64))


def config_for(tokens: int) -> openvino_genai.GenerationConfig:
    """Greedy, exactly so many tokens."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return config


def open_session(spec: Spec) -> Session:
    """The pipeline that the turn asks for."""
    kinds = {"batching": OpenVinoSession, "plain": PlainSession}
    return kinds[spec["options"]["pipeline"]](spec)


if __name__ == "__main__":
    main(open_session)
