"""Distillation: a smaller model is trained to say what a larger one says (Hinton et al. 2015).

The student is the model as the passes before left it; the teacher is the checkpoint as it was
before them, or another one of the same vocabulary. The loss sums the divergence of the next token,
the difference of the residual streams and, if wanted, the loss on the text's own next tokens.
Both models are in memory in float32; a GPU is used when there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tidegate.converters.passes.base import CalibrationText, Model, PassError, Progress
from tidegate.converters.training.sequences import Tokens
from tidegate.converters.training.torch_model import Said, TorchModel
from tidegate.converters.training.training import (
    Schedule,
    best_device,
    divergence,
    next_token_loss,
    reporter,
    stream_error,
    train,
)
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.recipe import matches

NEEDS_DATA = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to learn from, and how long."""

    teacher: str = ""
    """A checkpoint folder; the model as it was before the first pass when empty."""
    steps: int = 300
    learning_rate: float = 5e-4
    batch_tokens: int = 2048
    warmup: float = 0.05
    weight_decay: float = 0.0
    seed: int = 1
    temperature: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.1
    """Of the difference of the residual streams; needs a teacher of the same width."""
    label_weight: float = 0.0
    """Of the loss on the text itself."""

    def __post_init__(self) -> None:
        self.schedule()
        if not self.temperature > 0:
            raise ConfigError("temperature", self.temperature, "above 0")
        weights = ("kl_weight", "hidden_weight", "label_weight")
        for name in weights:
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "at least 0")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("kl_weight", self.kl_weight, "above 0 if the other weights are 0")

    def schedule(self) -> Schedule:
        """How long and how fast."""
        return Schedule(
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_tokens=self.batch_tokens,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned that the text does not say."""
        return self.kl_weight > 0 or self.hidden_weight > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill:
    """`ModelPass` of kind `distill`."""

    options: Options
    match: tuple[str, ...]

    def apply(self, model: Model, text: CalibrationText | None, progress: Progress) -> Model:
        """See `ModelPass.apply`."""
        trained, _ = self.run(model, text, progress)
        return trained

    def run(
        self, model: Model, text: CalibrationText | None, progress: Progress
    ) -> tuple[Model, list[float]]:
        """The trained model, and the loss of every step."""
        assert text is not None
        arch, options = decoder_of(model), self.options
        student = TorchModel(
            arch,
            model.weights,
            trains=lambda role: matches(role, self.match),
            device=best_device(),
        )
        with _teacher(model, options) as teacher:
            loss = _Loss(teacher=teacher, options=options)
            steps = reporter("distill", options.steps, progress)
            losses = train(student, loss, text.training, options.schedule(), steps)
        return replace(model, weights=student.trained()), losses


def make(options: Options, match: tuple[str, ...]) -> Distill:
    """See `tidegate.converters.passes.base.PassModule.make`."""
    return Distill(options=options, match=match)


def decoder_of(model: Model) -> Architecture:
    """The architecture of a model that says next tokens."""
    if not isinstance(model.arch, Architecture):
        raise PassError(f"{model.arch.model_type} is an encoder: only decoders are trained")
    return model.arch


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Loss:
    teacher: TorchModel | None
    options: Options

    def __call__(self, said: Said, batch: Sequence[Tokens]) -> torch.Tensor:
        options, total = self.options, said.logits.new_zeros(())
        if self.teacher is not None:
            with torch.no_grad():
                meant = self.teacher(batch)
            if options.kl_weight:
                found = divergence(said.logits, meant.logits, options.temperature)
                total = total + options.kl_weight * found
            if options.hidden_weight:
                total = total + options.hidden_weight * stream_error(said.hidden, meant.hidden)
        if options.label_weight:
            total = total + options.label_weight * next_token_loss(said.logits, batch)
        return total


@contextmanager
def _teacher(model: Model, options: Options) -> Iterator[TorchModel | None]:
    """The teacher, frozen; None when nothing is learned from one."""
    if not options.needs_teacher:
        yield None
    elif options.teacher:
        with Checkpoint.open(Path(options.teacher)) as checkpoint:
            arch = checkpoint.decoder
            found = Model(arch=arch, weights=checkpoint.weights())
            yield _frozen(found, model, options)
    elif model.reference is not None:
        yield _frozen(model.reference, model, options)
    else:
        raise PassError("teacher = '': must be a checkpoint folder: no pass came before this one")


def _frozen(teacher: Model, student: Model, options: Options) -> TorchModel:
    large, small = decoder_of(teacher), decoder_of(student)
    if large.vocab != small.vocab:
        raise PassError(f"the teacher has {large.vocab} tokens, the model {small.vocab}")
    if options.hidden_weight and large.width != small.width:
        raise PassError(
            f"hidden_weight = {options.hidden_weight}: must be 0 with a teacher of another width "
            f"({large.width}, the model's is {small.width})"
        )
    return TorchModel(large, teacher.weights, trains=lambda _: False, device=best_device())
