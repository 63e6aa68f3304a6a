"""Quantisation-aware training: the weights learn to be good after they are rounded.

Every step rounds the linear layers with the quantiser and the format that they will be stored
with, and holds what the rounded model says against the model in floats. What comes out are the
weights behind the rounding: rounded to nearest (no `clip`, no pass after it that moves them), they
are exactly those that were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tidegate.converters.passes.base import CalibrationText, Model, PassError, Progress
from tidegate.converters.passes.distill import decoder_of
from tidegate.converters.training.sequences import Tokens
from tidegate.converters.training.torch_model import Said, TorchModel
from tidegate.converters.training.training import Schedule, best_device, divergence, reporter, train
from tidegate.model.recipe import matches

NEEDS_DATA = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How long and how fast."""

    steps: int = 200
    learning_rate: float = 1e-4
    batch_tokens: int = 2048
    warmup: float = 0.05
    weight_decay: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        self.schedule()

    def schedule(self) -> Schedule:
        """The same, checked."""
        return Schedule(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_tokens=self.batch_tokens,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Qat:
    """`ModelPass` of kind `qat`."""

    options: Options
    match: tuple[str, ...]

    def apply(self, model: Model, text: CalibrationText | None, progress: Progress) -> Model:
        """See `ModelPass.apply`."""
        assert text is not None
        arch, options = decoder_of(model), self.options
        if not model.formats:
            raise PassError("the formats must be known before training: leave out target_bpw")
        teacher = TorchModel(arch, model.weights, trains=lambda _: False, device=best_device())
        student = TorchModel(
            arch,
            model.weights,
            trains=lambda role: matches(role, self.match),
            rounded=model.formats,
            device=best_device(),
        )

        def loss(said: Said, batch: Sequence[Tokens]) -> torch.Tensor:
            with torch.no_grad():
                meant = teacher(batch)
            return divergence(said.logits, meant.logits, 1.0)

        steps = reporter("qat", options.steps, progress)
        train(student, loss, text.training, options.schedule(), steps)
        return replace(model, weights=student.trained())


def make(options: Options, match: tuple[str, ...]) -> Qat:
    """See `tidegate.converters.passes.base.PassModule.make`."""
    return Qat(options=options, match=match)
