"""llama.cpp's turn, on its C interface: batches of tokens of several sequences, greedy.

As its documentation advises for a CPU: as many threads as cores for prompt and answer alike, flash
attention on, batches of 2048 in parts of 512, weights repacked for this processor, mapped from the
file. Sequences have a KV of their own each (`kv_unified` off, as its parallel benchmark has it).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import llama_cpp as llama
import numpy as np
from measure import Spec, main

BATCH_TOKENS = 2048


class LlamaSession:
    """See `measure.Session`."""

    kv_bytes: int | None = None

    def __init__(self, spec: Spec) -> None:
        self._log = llama.llama_log_callback(lambda level, text, user: None)
        llama.llama_log_set(self._log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            spec["model"].encode(), llama.llama_model_default_params()
        )
        params = llama.llama_context_default_params()
        longest = max(spec["prefix_tokens"], spec["prompt_tokens"]) + 128 + spec["decode_tokens"]
        self._streams = max([*spec["streams"], 1])
        params.n_ctx = -(-longest // 256) * 256 * self._streams
        params.n_batch = BATCH_TOKENS
        params.n_seq_max = self._streams
        params.n_threads = params.n_threads_batch = spec["threads"]
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._vocab = spec["vocab"]
        self._held: list[list[int]] = [[] for _ in range(self._streams)]

    def prefill(self, prompt: Sequence[int]) -> None:
        """See `Session.prefill`."""
        self._keep(0, 0)
        self._read(0, prompt)

    def answer(self, prompt: Sequence[int]) -> None:
        """See `Session.answer`: the sequence is cut where the prompts part, and read from there."""
        pairs = zip(self._held[0], prompt, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self._held[0]))
        self._keep(0, shared)
        self._read(0, prompt)

    def decode(self, prompts: Sequence[Sequence[int]], warm: int, tokens: int) -> float:
        """See `Session.decode`. Prompts that are in the KV already are not read again."""
        newest = []
        for place, prompt in enumerate(prompts):
            if self._held[place][: len(prompt) - 1] == list(prompt)[:-1]:
                self._keep(place, len(prompt) - 1)
            else:
                self._keep(place, 0)
            newest.append(self._read(place, prompt))
        for step in range(warm + tokens):
            if step == warm:
                began_s = time.perf_counter()
            rows = [(token, place) for place, token in enumerate(newest)]
            newest = self._step(rows, wanted=range(len(rows)))
        return time.perf_counter() - began_s

    def _keep(self, place: int, tokens: int) -> None:
        llama.llama_memory_seq_rm(self._memory, place, tokens, -1)
        del self._held[place][tokens:]

    def _read(self, place: int, prompt: Sequence[int]) -> int:
        """The rest of a prompt, then the token after it."""
        rest = [(token, place) for token in prompt[len(self._held[place]) :]]
        return self._step(rest, wanted=[len(rest) - 1])[0]

    def _step(self, rows: Sequence[tuple[int, int]], wanted: Sequence[int]) -> list[int]:
        """Run (token, sequence) rows, each at the end of its sequence; the best next tokens."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, place) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, len(self._held[place])
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, place, 0
            self._held[place].append(token)
        for i in wanted:
            batch.logits[i] = 1
        if llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError(f"llama.cpp failed on a batch of {len(rows)} tokens")
        return [self._best(i) for i in wanted]

    def _best(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


if __name__ == "__main__":
    main(LlamaSession)
