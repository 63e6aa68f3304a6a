"""onnxruntime-genai's turn: its generator, greedy. On a CPU it batches only what starts together.

Threads are given to both thread pools' settings in the model's own config (see `ortgenai.py`); the
KV buffer is shared between steps, its default, and sized to what the turn needs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai
from measure import Spec, main


class GenaiSession:
    """See `measure.Session`."""

    kv_bytes: int | None = None

    def __init__(self, spec: Spec) -> None:
        self._model = onnxruntime_genai.Model(spec["model"])
        longest = max(spec["prefix_tokens"], spec["prompt_tokens"])
        self._most_tokens = longest + 128 + spec["decode_tokens"]
        self._kept: onnxruntime_genai.Generator | None = None
        self._held: list[int] = []

    def prefill(self, prompt: Sequence[int]) -> None:
        """See `Session.prefill`."""
        self._start([prompt])

    def answer(self, prompt: Sequence[int]) -> None:
        """See `Session.answer`: the generator is rewound to where the prompts part."""
        pairs = zip(self._held, prompt, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self._held))
        if self._kept is None or shared == 0:
            self._kept = self._start([prompt])
        else:
            self._kept.rewind_to(shared)
            self._kept.append_tokens(np.array([prompt[shared:]], np.int32))
            self._kept.generate_next_token()
        self._held = list(prompt)

    def decode(self, prompts: Sequence[Sequence[int]], warm: int, tokens: int) -> float:
        """See `Session.decode`."""
        generator = self._start(prompts)
        for step in range(warm + tokens):
            if step == warm:
                began_s = time.perf_counter()
            generator.generate_next_token()
        return time.perf_counter() - began_s

    def _start(self, prompts: Sequence[Sequence[int]]) -> onnxruntime_genai.Generator:
        """A generator that has read the prompts and chosen their first tokens."""
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(
            max_length=self._most_tokens,
            min_length=self._most_tokens,
            batch_size=len(prompts),
            do_sample=False,
        )
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        return generator


if __name__ == "__main__":
    main(GenaiSession)
