"""Rotary position embedding: one list of frequencies, whatever scaling a config asks for.

Every scaling in use is a rule that changes the frequencies `theta ** (-2 i / size)` and perhaps
the magnitude of the rotation, so it is resolved here and no backend knows of it. Two rules depend
on the sequence's length (dynamic, longrope). They are resolved once, at the longest sequence that
will be served: a key in the cache then stays valid while its sequence grows, and the same text
gives the same tokens however it was cut into steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tidegate.errors import CheckpointError
from tidegate.model.config import Config, flag, mapping, positive_float, positive_int, text

Frequencies = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotation of value `i` with value `i + len(frequencies)` (rotate-half; Su et al. 2021).

    The first `2 * len(frequencies)` values of a head are rotated and the others left alone.
    """

    frequencies: tuple[float, ...]
    """Radians per position, the fastest first."""
    magnitude: float = 1.0
    """Factor on cosine and sine, so on both query and key; other than 1 with yarn and longrope."""

    @classmethod
    def plain(cls, theta: float, size: int) -> Self:
        """Unscaled rotation of the first `size` values of a head."""
        return cls(frequencies=_tuple(_frequencies(theta, size)))

    @property
    def size(self) -> int:
        """How many values of a head are rotated."""
        return 2 * len(self.frequencies)

    def tables(self, positions: npt.NDArray[np.int64]) -> tuple[Frequencies, Frequencies]:
        """Cosines and sines [T, size / 2] at the positions, magnitude included, in float64."""
        angles = positions[:, None] * np.array(self.frequencies)
        return np.cos(angles) * self.magnitude, np.sin(angles) * self.magnitude


def read_rope(
    config: Config,
    *,
    head_size: int,
    trained_context: int,
    context: int,
    kind: str | None = None,
    partial: bool = False,
) -> Rope:
    """The rotation that a Hugging Face config asks for, in either spelling.

    Args:
        config: `rope_parameters` (transformers >= 5), or `rope_theta` and `rope_scaling`.
        head_size: values of a head; `partial_rotary_factor` of them are rotated.
        trained_context: the config's `max_position_embeddings`.
        context: the longest sequence that will be served.
        kind: the layer type, for a config with one entry of `rope_parameters` for each.
        partial: the model may rotate a part of a head; others refuse to be asked for it.

    Raises:
        CheckpointError: a key is missing or wrong, or the rope type is unknown.
    """
    parameters = _parameters(config, kind)
    theta = positive_float(parameters, "rope_theta", 10000.0)
    name = _rope_type(parameters)
    if name not in _SCALINGS:
        known = ", ".join(sorted(_SCALINGS))
        raise CheckpointError(f"config.json: rope_type = {name!r}: must be one of {known}")
    size = _rotated(parameters, head_size, partial)
    shape = _Shape(theta=theta, size=size, trained=trained_context, context=context)
    try:
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            frequencies, magnitude = _SCALINGS[name](parameters, shape)
    except ArithmeticError as error:
        raise CheckpointError(
            f"config.json: rope_type = {name!r}: {error}: {parameters!r:.200}"
        ) from error
    return Rope(frequencies=_tuple(frequencies), magnitude=magnitude)


def longest_context(config: Config, trained_context: int) -> int:
    """Positions a model can be served with: more than it says with a scaling that stretches them.

    With longrope and llama3, `max_position_embeddings` is what they are stretched to already.
    """
    parameters = _parameters(config, None)
    name = _rope_type(parameters)
    if name in ("linear", "dynamic"):
        return max(trained_context, int(trained_context * positive_float(parameters, "factor")))
    if name == "yarn":
        original = positive_int(parameters, "original_max_position_embeddings", trained_context)
        return max(trained_context, int(original * positive_float(parameters, "factor", 1.0)))
    return trained_context


def _rope_type(parameters: Config) -> str:
    return text(parameters, "rope_type", text(parameters, "type", "default"))


def _rotated(parameters: Config, head_size: int, partial: bool) -> int:
    """How many values of a head are rotated."""
    share = positive_float(parameters, "partial_rotary_factor", 1.0)
    size = int(head_size * share)
    if size < 2 or size % 2 or size > head_size:
        raise CheckpointError(
            f"config.json: partial_rotary_factor = {share}: must rotate an even number of the "
            f"{head_size} values of a head"
        )
    if share != 1 and not partial:
        raise CheckpointError(
            f"config.json: partial_rotary_factor = {share}: must be 1 for this model_type"
        )
    return size


def _parameters(config: Config, kind: str | None) -> Config:
    """All rotary keys in one mapping, from either spelling.

    Of keys given twice, those win that win in transformers 5: `rope_scaling` as a whole, theta and
    the rotated part within it, the original context beside it.
    """
    found = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
    outer = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    given = {key: value for key, value in outer.items() if value is not None}
    if kind is not None and kind in found:
        return {**given, **mapping(found, kind)}
    original = config.get("original_max_position_embeddings")
    last = {} if original is None else {"original_max_position_embeddings": original}
    return {**given, **found, **last}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    theta: float
    size: int
    trained: int
    context: int


Scaled = tuple[Frequencies, float]


def _default(parameters: Config, shape: _Shape) -> Scaled:
    return _frequencies(shape.theta, shape.size), 1.0


def _linear(parameters: Config, shape: _Shape) -> Scaled:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    factor = positive_float(parameters, "factor")
    return _frequencies(shape.theta, shape.size) / factor, 1.0


def _dynamic(parameters: Config, shape: _Shape) -> Scaled:
    """NTK-aware scaling of theta for a length beyond the trained one."""
    factor = positive_float(parameters, "factor")
    longest = max(shape.context, shape.trained)
    growth = factor * longest / shape.trained - (factor - 1)
    theta = shape.theta * growth ** (shape.size / (shape.size - 2))
    return _frequencies(theta, shape.size), 1.0


def _llama3(parameters: Config, shape: _Shape) -> Scaled:
    """Llama 3.1: slow frequencies divided, fast ones kept, a ramp between (Meta 2024)."""
    factor = positive_float(parameters, "factor")
    low = positive_float(parameters, "low_freq_factor")
    high = positive_float(parameters, "high_freq_factor")
    if high <= low:
        raise CheckpointError(
            f"config.json: high_freq_factor = {high}: must be above low_freq_factor = {low}"
        )
    trained = _original(parameters, shape)
    plain = _frequencies(shape.theta, shape.size)
    turns = trained * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (keep + (1 - keep) / factor), 1.0


def _yarn(parameters: Config, shape: _Shape) -> Scaled:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2 and the magnitude of 3.4."""
    trained = _original(parameters, shape)
    factor = positive_float(parameters, "factor", max(shape.trained / trained, 1.0))
    fast = positive_float(parameters, "beta_fast", 32.0)
    slow = positive_float(parameters, "beta_slow", 1.0)
    low, high = (_dimension(turns, trained, shape) for turns in (fast, slow))
    if flag(parameters, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.size - 1)
    if low == high:
        high += 0.001  # as the reference implementation does, against a division by 0
    ramp = np.clip((np.arange(shape.size // 2) - low) / (high - low), 0, 1)
    plain = _frequencies(shape.theta, shape.size)
    return plain * (1 - ramp) + plain / factor * ramp, _yarn_magnitude(parameters, factor)


def _dimension(turns: float, trained: int, shape: _Shape) -> float:
    """The (fractional) frequency index that makes `turns` full turns over the trained context."""
    ratio = math.log(trained / (turns * 2 * math.pi))
    return shape.size * ratio / (2 * math.log(shape.theta))


def _yarn_magnitude(parameters: Config, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return positive_float(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        whole = positive_float(parameters, "mscale_all_dim")
        return magnitude(positive_float(parameters, "mscale")) / magnitude(whole)
    return magnitude(1.0)


def _longrope(parameters: Config, shape: _Shape) -> Scaled:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one searched divisor per frequency."""
    trained = _original(parameters, shape)
    key = "long_factor" if shape.context > trained else "short_factor"
    divisors = _positive_list(parameters, key, shape.size // 2)
    factor = positive_float(parameters, "factor", shape.trained / trained)
    magnitude = 1.0
    if parameters.get("attention_factor") is not None:
        magnitude = positive_float(parameters, "attention_factor")
    elif factor > 1:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained))
    return _frequencies(shape.theta, shape.size) / np.array(divisors), magnitude


_SCALINGS: dict[str, Callable[[Config, _Shape], Scaled]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original(parameters: Config, shape: _Shape) -> int:
    return positive_int(parameters, "original_max_position_embeddings", shape.trained)


def _positive_list(parameters: Config, key: str, length: int) -> list[float]:
    values = parameters.get(key)
    if not isinstance(values, list) or len(values) != length:
        raise CheckpointError(f"config.json: {key} = {values!r:.80}: must be {length} numbers")
    return [positive_float({key: value}, key) for value in values]


def _frequencies(theta: float, size: int) -> Frequencies:
    return theta ** (-np.arange(0, size, 2) / size)


def _tuple(values: Sequence[float] | Frequencies) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
