"""Losses and schedules: what they compute, and that a run is a function of its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from smallermodels import random_text
from tinymodel import RandomWeights, tiny_architecture

from tidegate.converters.passes.base import PassError
from tidegate.converters.training.torch_model import Said, TorchModel
from tidegate.converters.training.training import (
    Schedule,
    divergence,
    mapped_layer,
    next_token_loss,
    stream_error,
    train,
)

ARCH = tiny_architecture(layers=1, width=32)
SCHEDULE = Schedule(
    steps=4, learning_rate=0.01, batch_tokens=50, warmup=0.5, weight_decay=0.0, seed=3
)


def logits(seed: int, tokens: int = 5, vocab: int = 9) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def silent(step: int) -> None:
    pass


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_the_mean_over_tokens_times_the_temperature_squared(
    temperature: float,
) -> None:
    student, teacher = logits(0).double(), logits(1).double()
    said, meant = ((x / temperature).softmax(-1).numpy() for x in (student, teacher))
    expected = (meant * np.log(meant / said)).sum(-1).mean() * temperature**2
    assert float(divergence(student, teacher, temperature)) == pytest.approx(expected)
    assert float(divergence(student, student, temperature)) == pytest.approx(0, abs=1e-12)


def test_the_loss_of_the_text_skips_the_last_token_of_every_sequence() -> None:
    found = logits(2, tokens=5)
    batch = [(3, 1, 4), (1, 5)]
    chances = found.log_softmax(-1)
    expected = -(chances[0, 1] + chances[1, 4] + chances[3, 5]) / 3
    assert float(next_token_loss(found, batch)) == pytest.approx(float(expected))


def test_streams_are_held_against_those_at_the_same_depth() -> None:
    streams = [logits(seed) for seed in range(4)]
    assert float(stream_error([streams[1], streams[3]], streams)) == 0
    error = float(stream_error([streams[0], streams[3]], streams))
    first = (streams[0] - streams[1]).square().mean() / streams[1].square().mean()
    assert error == pytest.approx(float(first) / 2)


@given(st.integers(1, 50), st.integers(1, 50))
def test_every_layer_maps_to_one_at_its_depth_and_the_last_to_the_last(
    student: int, teacher: int
) -> None:
    mapped = [mapped_layer(index, student, teacher) for index in range(student)]
    assert mapped == sorted(mapped)
    assert mapped[-1] == teacher - 1
    assert mapped[0] >= 0


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    schedule = Schedule(
        steps=100, learning_rate=1.0, batch_tokens=1, warmup=0.1, weight_decay=0, seed=0
    )
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def run(schedule: Schedule) -> tuple[list[float], np.ndarray]:
    """Train a model to say 7 after everything."""
    model = TorchModel(ARCH, RandomWeights(ARCH), trains=lambda _: True)

    def loss(said: Said, batch: object) -> torch.Tensor:
        return -said.logits.log_softmax(-1)[:, 7].mean()

    losses = train(model, loss, random_text(ARCH, count=5).sequences, schedule, silent)
    return losses, model.trained().vector("final_norm")


def test_a_run_is_a_function_of_its_seed() -> None:
    first, second = run(SCHEDULE), run(SCHEDULE)
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])
    other = run(Schedule(**{**_fields(SCHEDULE), "seed": 4}))  # type: ignore[arg-type]
    assert first[0] != other[0]


def test_training_lowers_the_loss() -> None:
    losses, _ = run(Schedule(**{**_fields(SCHEDULE), "steps": 20}))  # type: ignore[arg-type]
    assert losses[-1] < 0.5 * losses[0]
    assert len(losses) == 20


def test_a_loss_that_is_no_number_ends_it() -> None:
    model = TorchModel(ARCH, RandomWeights(ARCH), trains=lambda _: True)
    sequences = random_text(ARCH).sequences
    with pytest.raises(PassError, match="step 0: the loss is no longer a number"):
        train(model, lambda said, _: said.logits.sum() * torch.nan, sequences, SCHEDULE, silent)


def test_training_nothing_is_refused() -> None:
    model = TorchModel(ARCH, RandomWeights(ARCH), trains=lambda _: False)
    with pytest.raises(PassError, match="nothing is trained"):
        train(model, lambda said, _: said.logits.sum(), [(1, 2)], SCHEDULE, silent)


def _fields(schedule: Schedule) -> dict[str, object]:
    return {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}
