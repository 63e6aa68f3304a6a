"""Tune: train the integers, scales and norms of a packed model to say what the checkpoint says.

The loss is the mean KL divergence of the next-token distribution from the checkpoint's, over all
tokens of the calibration text. Every integer has a place on its grid that is trained through
rounding as if rounding were not there (straight-through, arXiv 1308.3432), starting in the middle
of its step; scales are trained by their logarithm, norms by a factor. Zero-points stay.

One sequence in eight is kept back: a model that is not better on those is left as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tidegate.converters.passes.base import CalibrationText, Model, PassError, Progress
from tidegate.converters.rounding.feedback import with_integers
from tidegate.converters.training.sequences import SequenceOps, Tokens, batched
from tidegate.errors import ConfigError
from tidegate.kernels.torch_ops import WeightTensors, root_mean_square_norm
from tidegate.model.architecture import Architecture
from tidegate.model.packed import Array, Linear, PackedLinear
from tidegate.model.recipe import matches
from tidegate.model.resident import ResidentWeights
from tidegate.model.roles import roles
from tidegate.model.walk import Weights, decoder

NEEDS_DATA = True

MOST_PARAMETERS = 1 << 29
"""Training takes about 20 bytes a weight: 10 GiB."""

_KEPT_BACK = 8
"""One sequence in this many decides whether the result is better and trains nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How long and how fast to train."""

    steps: int = 100
    batch_tokens: int = 2048
    place_rate: float = 0.03
    """Adam's learning rate of an integer's place, in steps of its grid."""
    scale_rate: float = 0.001
    """And of the logarithm of scales and norms."""
    seed: int = 0
    """Of the order of the sequences."""

    def __post_init__(self) -> None:
        for name, least, most in (("steps", 1, 100_000), ("batch_tokens", 16, 1 << 20)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(name, getattr(self, name), f"from {least} to {most}")
        for name in ("place_rate", "scale_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(name, getattr(self, name), "from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tune:
    options: Options
    match: tuple[str, ...]

    def apply(self, model: Model, text: CalibrationText | None, progress: Progress) -> Model:
        """See `ModelPass`."""
        arch, reference = model.arch, model.reference
        assert text is not None
        if not isinstance(arch, Architecture) or arch.parameters > MOST_PARAMETERS:
            raise PassError(
                f"tune: trains decoders of at most {MOST_PARAMETERS} weights, not a "
                f"{arch.model_type} of {arch.parameters}"
            )
        if reference is None or not isinstance(reference.arch, Architecture):
            raise PassError("tune: needs the checkpoint to train towards")
        student = _Student.of(arch, model, self.match)
        if not student.layers:
            raise PassError(f"tune: no packed layer matches {self.match}: put it behind a packer")
        teacher = _Teacher(arch=reference.arch, weights=ResidentWeights(reference.weights))
        kept = text.sequences[::_KEPT_BACK]
        trained = [seq for n, seq in enumerate(text.sequences) if n % _KEPT_BACK] or list(kept)
        size = self.options.batch_tokens
        before = _measure(student, teacher, kept, size)
        _train(student, teacher, trained, self.options, progress)
        after = _measure(student, teacher, kept, size)
        progress(f"tune: divergence {before:.4g} to {after:.4g} on text kept back", 1, 1)
        if not after < before:
            return model
        return replace(model, weights=student.frozen())


def make(options: Options, match: tuple[str, ...]) -> _Tune:
    """The pass for the roles that match."""
    return _Tune(options=options, match=match)


@dataclass(frozen=True, kw_only=True, eq=False)
class _TrainedLinear:
    """A packed layer whose integers and scales can be trained."""

    start: PackedLinear
    places: torch.Tensor
    """[out, groups, group_size]: which integer, and where between it and the next."""
    logs: torch.Tensor
    """[out, groups]: logarithm of the factor on the scales."""

    @classmethod
    def of(cls, linear: PackedLinear) -> _TrainedLinear:
        places = torch.from_numpy(linear.integers().astype(np.float32))
        logs = torch.zeros(linear.scales.shape)
        return cls(start=linear, places=places.requires_grad_(), logs=logs.requires_grad_())

    def weight(self) -> torch.Tensor:
        """What the layer stands for, [out, in], differentiable."""
        places = self.places.clamp(0, (1 << self.start.bits) - 1)
        integers = places + (places.round() - places).detach()
        weight = (integers - self._centre()) * self._scales()[..., None]
        return weight.flatten(1)[:, : self.start.inputs]

    def frozen(self) -> PackedLinear:
        """The layer as packed integers."""
        top = (1 << self.start.bits) - 1
        integers = self.places.detach().clamp(0, top).round()
        filled = torch.arange(integers[0].numel()).view(integers.shape[1:]) < self.start.inputs
        integers = torch.where(filled, integers, self._centre())
        scales: Array = self._scales().detach().numpy()
        return with_integers(self.start, integers.numpy().astype(np.uint8), scales)

    def _scales(self) -> torch.Tensor:
        """Rounded to float16, as a bundle keeps them."""
        exact = torch.from_numpy(self.start.scales) * self.logs.exp()
        kept = exact.detach().clamp(2.0**-24, 65504).half().float()
        return exact + (kept - exact).detach()

    def _centre(self) -> torch.Tensor:
        if self.start.zeros is None:
            return torch.full((1, 1, 1), float(self.start.symmetric_zero))
        return torch.from_numpy(self.start.zeros).float()[..., None]


@dataclass(kw_only=True, eq=False)
class _Student(WeightTensors):
    """The packed model: its weights as `Weights`, and as tensors that gradients flow into."""

    arch: Architecture
    linears: dict[str, Linear]
    vectors: dict[str, Array]
    layers: dict[str, _TrainedLinear]
    norms: dict[str, torch.Tensor]
    """Logarithm of a factor on each value of a norm, by role."""
    _by_id: dict[int, str] = field(default_factory=dict)
    _made: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, arch: Architecture, model: Model, match: tuple[str, ...]) -> _Student:
        expected = roles(arch)
        linears = {r: model.weights.linear(r) for r, role in expected.items() if role.is_linear}
        vectors = {r: model.weights.vector(r) for r, role in expected.items() if not role.is_linear}
        layers = {
            role: _TrainedLinear.of(linear)
            for role, linear in linears.items()
            if isinstance(linear, PackedLinear) and matches(role, match)
        }
        norms = {
            role: torch.zeros(len(vector)).requires_grad_()
            for role, vector in vectors.items()
            if matches(role, match)
        }
        student = cls(arch=arch, linears=linears, vectors=vectors, layers=layers, norms=norms)
        student._by_id = {id(linear): role for role, linear in linears.items()}
        student._by_id |= {id(vector): role for role, vector in vectors.items()}
        return student

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self.linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self.vectors[role]

    def get(self, linear: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `WeightTensors.get`; made once a step, however often it is used."""
        role = self._by_id.get(id(linear), "")
        if role not in self.layers:
            return super().get(linear)
        if role not in self._made:
            self._made[role] = self.layers[role].weight()
        bias = linear.bias
        return self._made[role], None if bias is None else torch.from_numpy(bias)

    def norm(self, vector: Array) -> torch.Tensor:
        """A norm's weight."""
        values, role = torch.from_numpy(vector), self._by_id[id(vector)]
        return values * self.norms[role].exp() if role in self.norms else values

    def logits(self, batch: Sequence[Tokens]) -> torch.Tensor:
        """Logits [tokens, V]."""
        self._made.clear()
        return decoder(_StudentOps(batch, self), self.arch, self)

    def frozen(self) -> _Tuned:
        """The weights as they are now, packed."""
        linears = self.linears | {role: layer.frozen() for role, layer in self.layers.items()}
        with torch.no_grad():
            norms = {role: self.norm(self.vectors[role]).numpy() for role in self.norms}
        return _Tuned(linears=linears, vectors=self.vectors | norms)


class _StudentOps(SequenceOps):
    def __init__(self, batch: Sequence[Tokens], student: _Student) -> None:
        super().__init__(batch, student)
        self._student = student

    def rms_norm(self, x: torch.Tensor, weight: Array, eps: float) -> torch.Tensor:
        """See `Ops.rms_norm`."""
        return root_mean_square_norm(x, self._student.norm(weight), eps)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tuned:
    """`Weights` held in memory."""

    linears: Mapping[str, Linear]
    vectors: Mapping[str, Array]

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self.linears[role]

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self.vectors[role]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Teacher:
    """The checkpoint; its weights are read once and kept."""

    arch: Architecture
    weights: Weights
    tensors: WeightTensors = field(default_factory=WeightTensors)

    @torch.no_grad()
    def logits(self, batch: Sequence[Tokens]) -> torch.Tensor:
        """Logits [tokens, V]."""
        return decoder(SequenceOps(batch, self.tensors), self.arch, self.weights)


def _train(
    student: _Student,
    teacher: _Teacher,
    sequences: Sequence[Tokens],
    options: Options,
    progress: Progress,
) -> None:
    scales = [*(layer.logs for layer in student.layers.values()), *student.norms.values()]
    groups: list[dict[str, object]] = [
        {"params": [layer.places for layer in student.layers.values()], "lr": options.place_rate},
        {"params": scales, "lr": options.scale_rate},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _falling(options.steps))
    drawn = _endless(sequences, options)
    for step in range(options.steps):
        batch = next(drawn)
        loss = _divergence(teacher.logits(batch), student.logits(batch)).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        progress("tune: steps", step + 1, options.steps)


def _falling(steps: int) -> Callable[[int], float]:
    """From the full rate to none along half a cosine."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _endless(sequences: Sequence[Tokens], options: Options) -> Iterator[list[Tokens]]:
    """Batches of the sequences, in an order drawn anew for each round."""
    rng = random.Random(options.seed)
    order = list(sequences)
    while True:
        rng.shuffle(order)
        yield from batched(order, options.batch_tokens)


@torch.no_grad()
def _measure(
    student: _Student, teacher: _Teacher, sequences: Sequence[Tokens], batch_tokens: int
) -> float:
    """Mean divergence over all tokens."""
    total, count = 0.0, 0
    for batch in batched(sequences, batch_tokens):
        found = _divergence(teacher.logits(batch), student.logits(batch))
        total, count = total + float(found.double().sum()), count + found.numel()
    return total / count


def _divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats of every token, from the reference's logits [tokens, V] to these."""
    expected, found = (part.log_softmax(dim=-1) for part in (reference, logits))
    return (expected.exp() * (expected - found)).sum(dim=-1)
