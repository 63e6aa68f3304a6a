"""What runs before anything is served, so that every kernel is compiled in every way serving needs.

How kernels are compiled depends on few numbers of a step: how its products are cut up (by tokens),
which way attention takes (by new tokens and lengths), what is sampled. `warm_rows` and `warm_draws`
are a step of each kind; a test compares what they launch with what serving does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Final

import numpy as np

from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.engine.executor import Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.kernels.attention.plan import SHORT
from tidegate.kernels.device_weights import DeviceWeights
from tidegate.kernels.launch import Gpu
from tidegate.kernels.linear.workspace import token_classes
from tidegate.kernels.moe.plan import pair_classes
from tidegate.model.architecture import Architecture

_DEPTHS: Final[tuple[tuple[float, int | None, float], ...]] = (
    (0.0, None, 1.0),
    (1.0, None, 1.0),
    (1.0, 2, 1.0),
    (1.0, 2, 0.5),
)
"""Temperature, top-k and top-p of each `Depth`."""


def warm_counts(
    arch: Architecture, weights: DeviceWeights, settings: GpuSettings, gpu: Gpu
) -> list[int]:
    """Tokens of a step, one number for each way in which some product is compiled."""
    most = settings.step_tokens
    counts = token_classes(
        weights.products(), gpu, most_tokens=most, deterministic=settings.deterministic
    )
    for kind in arch.kinds:
        if kind.experts is not None:
            chosen, experts = kind.experts.chosen, kind.experts.count
            pairs = pair_classes(most_pairs=most * chosen, experts=experts, gpu=gpu)
            counts += [-(-one // chosen) for one in pairs]
    # 16: whatever a row's width is, as many values are a multiple of 16, as compilers like it.
    return sorted({1, *(min(one, most) for one in (*counts, 16))})


def warm_rows(
    settings: GpuSettings, context_tokens: int, counts: Iterable[int], blocks: int
) -> Iterator[list[Row]]:
    """The rows of each step: every number of tokens that matters, every way of attention.

    Args:
        settings: of the executor.
        context_tokens: of one request.
        counts: tokens for which products are cut up differently.
        blocks: that there are; all rows write to the same ones and mean nothing.
    """
    longest = min(blocks * settings.block_tokens, context_tokens, settings.step_tokens)
    own = np.arange(blocks, dtype=np.int32)
    nobodys = np.zeros(-(-context_tokens // settings.block_tokens), np.int32)

    def row(tokens: int, past: int, logits: int) -> Row:
        where = own if past == 0 else nobodys
        return Row(tokens=np.zeros(tokens, np.int64), past=past, blocks=where, logits=logits)

    for count in counts:
        whole, rest = divmod(count, longest)
        sizes = [longest] * whole + [rest] * (rest > 0)
        if count <= settings.step_tokens and len(sizes) <= settings.rows:
            most = settings.step_logits // len(sizes)
            yield [row(size, 0, min(size, most)) for size in sizes]
    for tokens in range(1, min(SHORT, longest) + 1):
        most = min(settings.rows, settings.step_tokens // tokens)
        for past in {0, context_tokens - tokens}:
            for rows in {1, most}:
                yield [row(tokens, past, 1)] * rows
        yield [row(tokens, 0, 0)]  # the end of a chunk, and not padded as a decode step is


def warm_draws(vocab: int) -> Iterator[Draw]:
    """A draw of every depth, with and without what changes single logits, and with a mask."""
    everything = np.full(-(-vocab // 32), 2**32 - 1, np.uint32)
    for temperature, top_k, top_p in _DEPTHS:
        for bias, allowed in product(((), ((0, 1.0),)), (None, everything)):
            params = SamplingParams(
                max_tokens=1,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                logit_bias=bias,
            )
            yield Draw(params=params, seed=0, position=0, allowed=allowed)
