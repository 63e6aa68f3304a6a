"""Whole sequences at once: the logits of the cached walk, with gradients through all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from smallermodels import every_logit, random_text
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.training.sequences import (
    HeldLayer,
    SequenceOps,
    batched,
    embedded,
    log_probabilities,
    through,
)
from tidegate.kernels.torch_ops import WeightTensors
from tidegate.model.architecture import LayerKind
from tidegate.model.rope import Rope
from tidegate.model.walk import decoder

ARCH = replace(
    tiny_architecture(),
    kinds=(LayerKind(rope=Rope.plain(10000.0, 32), window=4), LayerKind(rope=None)),
    pattern=(0, 1),
    attention_softcap=20.0,
)
WEIGHTS = RandomWeights(ARCH)
TEXT = random_text(ARCH)


def test_every_sequence_gets_the_logits_that_it_gets_alone_with_a_cache() -> None:
    with torch.no_grad():
        found = decoder(SequenceOps(TEXT.sequences, WeightTensors()), ARCH, WEIGHTS).numpy()
    expected = [every_logit(ARCH, WEIGHTS, tokens) for tokens in TEXT.sequences]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-4)


def test_layer_by_layer_over_batches_is_the_whole_walk() -> None:
    batches = batched(TEXT.sequences, 45)
    assert len(batches) > 1
    streams = embedded(ARCH, WEIGHTS, batches)
    for index in range(ARCH.layers):
        streams = through(ARCH, HeldLayer(ARCH, WEIGHTS, index), index, batches, streams)
    for batch, stream in zip(batches, streams, strict=True):
        found = log_probabilities(ARCH, WEIGHTS, batch, stream)
        expected = np.concatenate([every_logit(ARCH, WEIGHTS, tokens) for tokens in batch])
        np.testing.assert_allclose(
            found.numpy(), torch.from_numpy(expected).log_softmax(-1).numpy(), atol=1e-4
        )


def test_an_observer_sees_every_linear_layer_once_with_its_input() -> None:
    held = HeldLayer(ARCH, WEIGHTS, 0)
    batches = batched(TEXT.sequences, 10**6)
    seen: list[tuple[int, tuple[int, ...]]] = []
    through(
        ARCH,
        held,
        0,
        batches,
        embedded(ARCH, WEIGHTS, batches),
        lambda linear, x: seen.append((id(linear), tuple(x.shape))),
    )
    tokens = sum(map(len, TEXT.sequences))
    assert sorted(seen) == sorted(
        (id(linear), (tokens, linear.inputs)) for linear in held.linears.values()
    )


def test_batches_keep_the_order_and_hold_no_more_than_they_may() -> None:
    sequences = [(0,) * 3, (1,) * 4, (2,) * 9, (3,), (4,) * 2]
    batches = batched(sequences, 7)
    assert [tokens for batch in batches for tokens in batch] == sequences
    assert [sum(map(len, batch)) for batch in batches] == [7, 9, 3]
