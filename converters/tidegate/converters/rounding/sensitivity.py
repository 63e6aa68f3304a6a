"""Sensitivity: how far the answers of a model move when one weight of it is rounded.

Measured end to end: a few calibration sequences go through the model with that weight alone
rounded to 4 bits in groups of 64, and what counts is the mean KL divergence of the final logits
from the float model's. A weight that the recipe rounds with feedback is rounded so here too: it
loses far less, while a table that is looked up cannot gain. In other formats a weight costs in
proportion to the squared error of its values rounded to nearest, weighted by the mean square of
their inputs: the divergence of small errors is quadratic.

Above `MOST_MEASURED` weights a run for each would take hours. There a whole layer is rounded to
nearest at once, and its divergence shared out by the relative error of each weight's outputs; a
weight that will be rounded with feedback counts `FEEDBACK_GAIN` times less.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tidegate.converters.passes.base import CalibrationText, Model, Progress
from tidegate.converters.passes.gptq import quantise_with_gram
from tidegate.converters.rounding.rtn import quantise
from tidegate.converters.training.sequences import (
    HeldLayer,
    Tokens,
    batched,
    embedded,
    log_probabilities,
    through,
)
from tidegate.model.architecture import Architecture
from tidegate.model.blocks import block_of, layer_of
from tidegate.model.packed import Array, DenseLinear, Linear, PackedLinear, dense_weight
from tidegate.model.recipe import Format
from tidegate.model.resident import ResidentWeights
from tidegate.model.walk import Weights

MOST_MEASURED = 200_000_000
"""Weights of a model whose layers are measured one by one: 150 runs of about a second."""

FEEDBACK_GAIN = 4.0
"""By how much feedback lowers the divergence: 3.5 and more at 4 bits, groups of 128, on both
checkpoints of examples/assistant (benchmarks/converters/quantisers.py)."""

_TOKENS, _TOKENS_OF_LARGE = 2048, 512
"""Of calibration text: enough to rank weights, whose costs differ by factors, not by percents."""

_BATCH_TOKENS = 1024
_DAMPING = 0.01
_PROBE = Format(bits=4, group_size=64)


def measure(
    model: Model,
    formats: Mapping[str, Collection[Format]],
    fed: Collection[str],
    text: CalibrationText,
    progress: Progress,
) -> dict[str, dict[Format, float]]:
    """The divergence, in nats a token, that each role costs in each of the formats.

    Args:
        model: a decoder, in float32.
        formats: what each role may be stored in.
        fed: the roles that will be rounded with feedback (`rounding.feedback`).
        text: the first of its tokens are used.
        progress: told of every run.
    """
    arch = model.arch
    assert isinstance(arch, Architecture)
    small = arch.parameters <= MOST_MEASURED
    tokens = _first_tokens(text.sequences, _TOKENS if small else _TOKENS_OF_LARGE)
    weights: Weights = ResidentWeights(model.weights) if small else model.weights
    reference = _Reference.of(arch, weights, batched(tokens, _BATCH_TOKENS))
    rounded = [role for role, options in formats.items() if any(o.bits != 32 for o in options)]
    units = [[role] for role in rounded] if small else _by_block(rounded)
    found = {role: dict.fromkeys(options, 0.0) for role, options in formats.items()}
    for done, unit in enumerate(units):
        progress("sensitivity", done, len(units))
        errors = {role: _errors(weights.linear(role), role, formats, reference) for role in unit}
        probes = {role: _probe(weights.linear(role), formats[role]) for role in unit}
        gain = {role: FEEDBACK_GAIN if role in fed else 1.0 for role in unit}
        if small and unit[0] in fed:
            probes |= {role: reference.fed_probe(weights, role, formats[role]) for role in unit}
            gain = dict.fromkeys(unit, 1.0)
        divergence = reference.divergence(_Overlay(base=weights, linears=probes))
        shares = _shares(errors)
        for role, error in errors.items():
            for one in formats[role]:
                ratio = error.of[one] / error.probe if error.probe else 0.0
                found[role][one] = divergence * shares[role] * ratio / gain[role]
    progress("sensitivity", len(units), len(units))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Error:
    """Squared errors of a weight's values, weighted by the mean square of their inputs."""

    of: Mapping[Format, float]
    probe: float
    exact: float
    """The same of the values themselves."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Overlay:
    """`Weights` with some layers replaced."""

    base: Weights
    linears: Mapping[str, Linear]

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        return self.linears[role] if role in self.linears else self.base.linear(role)

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self.base.vector(role)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reference:
    """The float model on the text: what every layer reads and what the last one says."""

    arch: Architecture
    batches: list[list[Tokens]]
    streams: list[list[torch.Tensor]]
    """What enters each layer, and what leaves the last, batch by batch."""
    mean_squares: Mapping[str, Array]
    """Of the inputs of each linear layer that any token reached."""
    expected: list[torch.Tensor]
    """Logarithms of the probabilities of the next token, batch by batch."""

    @classmethod
    def of(cls, arch: Architecture, weights: Weights, batches: list[list[Tokens]]) -> _Reference:
        streams = [embedded(arch, weights, batches)]
        mean_squares: dict[str, Array] = {}
        for index in range(arch.layers):
            held, seen = HeldLayer(arch, weights, index), _Seen()
            streams.append(through(arch, held, index, batches, streams[-1], seen))
            mean_squares |= {
                role: seen.mean_square(linear)
                for role, linear in held.linears.items()
                if id(linear) in seen.sums
            }
        expected = [
            log_probabilities(arch, weights, batch, stream)
            for batch, stream in zip(batches, streams[-1], strict=True)
        ]
        return cls(
            arch=arch,
            batches=batches,
            streams=streams,
            mean_squares=mean_squares,
            expected=expected,
        )

    def fed_probe(self, weights: Weights, role: str, formats: Collection[Format]) -> Linear:
        """The layer of a role rounded with feedback; to nearest if no token reached it."""
        index = layer_of(block_of(role))
        linear = weights.linear(role)
        if index is None or not isinstance(linear, DenseLinear):
            return _probe(linear, formats)
        held, gram = HeldLayer(self.arch, weights, index), torch.zeros(linear.inputs, linear.inputs)

        def see(seen: Linear, x: torch.Tensor) -> None:
            if seen is held.linears[role]:
                gram.addmm_(x.T, x)

        through(self.arch, held, index, self.batches, self.streams[index], see)
        wanted = _probe_format(formats)
        return quantise_with_gram(linear, wanted, gram, _DAMPING) or _probe(linear, formats)

    def divergence(self, weights: _Overlay) -> float:
        """Mean KL divergence with some weights replaced; runs from the first of them on."""
        blocks = [block_of(role) for role in weights.linears]
        layers = [layer_of(block) for block in blocks]
        if "embed" in blocks:
            first, streams = 0, embedded(self.arch, weights, self.batches)
        else:
            first = min((n for n in layers if n is not None), default=self.arch.layers)
            streams = self.streams[first]
        for index in range(first, self.arch.layers):
            streams = through(self.arch, weights, index, self.batches, streams)
        total, count = 0.0, 0
        for batch, stream, expected in zip(self.batches, streams, self.expected, strict=True):
            found = log_probabilities(self.arch, weights, batch, stream)
            total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            count += len(expected)
        return max(total / count, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """Sums the squares of the inputs of every linear layer."""

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)

    def __call__(self, linear: Linear, x: torch.Tensor) -> None:
        """See `tidegate.converters.training.sequences.Observe`."""
        if len(x):
            key = id(linear)
            self.sums[key] = self.sums.get(key, torch.zeros(())) + x.square().sum(dim=0)
            self.rows[key] = self.rows.get(key, 0) + len(x)

    def mean_square(self, linear: Linear) -> Array:
        """Of every input, [in]."""
        found: Array = (self.sums[id(linear)] / self.rows[id(linear)]).numpy()
        return found


def _errors(
    linear: Linear,
    role: str,
    formats: Mapping[str, Collection[Format]],
    reference: _Reference,
) -> _Error:
    weight = dense_weight(linear)
    # A table that is looked up, or an expert that no token reached, has all inputs alike.
    importance = reference.mean_squares.get(role, np.ones(weight.shape[1], np.float32))

    def error(packed: Linear) -> float:
        return _weighted_square(dense_weight(packed) - weight, importance)

    return _Error(
        of={one: error(_round(linear, one)) for one in formats[role]},
        probe=error(_probe(linear, formats[role])),
        exact=_weighted_square(weight, importance),
    )


def _weighted_square(values: Array, importance: Array) -> float:
    return float(np.einsum("oi,oi,i->", values, values, importance, dtype=np.float64))


def _probe(linear: Linear, formats: Collection[Format]) -> Linear:
    return _round(linear, _probe_format(formats))


def _probe_format(formats: Collection[Format]) -> Format:
    return replace(_PROBE, symmetric=next(iter(formats)).symmetric)


def _round(linear: Linear, wanted: Format) -> Linear:
    """Rounded to nearest; a layer that is packed already stays as it is."""
    if wanted.bits == 32 or isinstance(linear, PackedLinear):
        return linear
    return quantise(
        DenseLinear(weight=dense_weight(linear), bias=linear.bias),
        bits=wanted.bits,
        group_size=wanted.group_size,
        symmetric=wanted.symmetric,
    )


def _shares(errors: Mapping[str, _Error]) -> dict[str, float]:
    """How a divergence is shared out: by the relative error of the outputs, squared."""
    relative = {role: error.probe / (error.exact or 1.0) for role, error in errors.items()}
    total = sum(relative.values()) or 1.0
    return {role: one / total for role, one in relative.items()}


def _by_block(roles: Sequence[str]) -> list[list[str]]:
    """Roles of one block together."""
    blocks: dict[str, list[str]] = {}
    for role in roles:
        blocks.setdefault(block_of(role), []).append(role)
    return list(blocks.values())


def _first_tokens(sequences: Sequence[Tokens], count: int) -> Iterator[Tokens]:
    for tokens in sequences:
        if count <= 0:
            return
        if tokens:
            yield tokens[:count]
        count -= len(tokens)
