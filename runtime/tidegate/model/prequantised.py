"""Checkpoints that are quantised already, GPTQ and AWQ, repacked into `PackedLinear` without loss.

Both keep int32 words of 4- or 8-bit values, float16 scales [groups, out] and packed zero-points
[groups, out * bits / 32], with `base.qweight` in the place of `base.weight`:

    gptq   qweight [in * bits / 32, out], a word holds inputs in order, lowest bits first
    awq    qweight [in, out / 8], a word holds outputs 0 2 4 6 1 3 5 7, as do the zero-points

Layouts as written by AutoGPTQ (`pack` of its QuantLinear; `checkpoint_format` "gptq" stores every
zero-point less 1, "gptq_v2" as it is) and by AutoAWQ (version "gemm"). What a `PackedLinear`
cannot hold as it is (an order of activations, odd group sizes, overrides) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from tidegate.errors import CheckpointError
from tidegate.model.config import Config, positive_int, text
from tidegate.model.packed import Array, Bits, Bytes, PackedLinear, pack_nibbles
from tidegate.model.safetensors_file import SafetensorsFile

Method = Literal["gptq", "awq"]

GROUP_SIZES = (32, 64, 128)

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each nibble of a word holds, lowest first."""

_WORD_BITS = 32

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """What `quantization_config` says of all quantised layers."""

    method: Method
    bits: Bits
    group_size: int | None
    """None for a whole row."""
    zero_offset: int
    """Added to a stored zero-point."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrequantisedTensor:
    """One quantised weight of a checkpoint: the tensors `base.qweight` and beside it."""

    base: str
    shape: tuple[int, int]
    """[out, in]."""
    how: Quantisation
    where: Mapping[str, SafetensorsFile]

    def read(self, rows: tuple[int, int] | None = None, bias: Array | None = None) -> PackedLinear:
        """The weight, or some rows of it, as it was stored: same integers, scales and zero-points.

        Zero-points that all lie in the middle are left out: the layer is symmetric.

        Raises:
            CheckpointError: a value cannot be kept as it is; names the tensor and the value.
        """
        part = slice(None) if rows is None else slice(*rows)
        scales = self._scales()[part]
        zeros = self._zeros()[part]
        integers = self._integers()[part]
        self._check_order()
        outputs, inputs = integers.shape
        size = self.how.group_size or inputs
        groups = scales.shape[1]
        if groups * size != inputs:
            # The padding holds the zero-point, so it stands for 0.
            padded = np.repeat(zeros, size, axis=1)
            padded[:, :inputs] = integers
            integers = padded
        grouped = integers.reshape(outputs, groups, size)
        return PackedLinear(
            values=pack_nibbles(grouped) if self.how.bits == 4 else grouped,
            scales=scales,
            zeros=None if (zeros == 1 << (self.how.bits - 1)).all() else zeros,
            bias=bias,
            inputs=inputs,
            bits=self.how.bits,
            group_size=size,
        )

    def _integers(self) -> Bytes:
        """[out, in], one byte each."""
        words = self._words("qweight")
        if self.how.method == "awq":
            return np.ascontiguousarray(_awq_values(words).T)
        return _values(np.ascontiguousarray(words.T), self.how.bits)

    def _zeros(self) -> Bytes:
        """[out, groups]."""
        words = self._words("qzeros")
        stored = _awq_values(words) if self.how.method == "awq" else _values(words, self.how.bits)
        zeros = stored.astype(np.int32).T + self.how.zero_offset
        largest = (1 << self.how.bits) - 1
        if zeros.max(initial=0) > largest:
            # Some readers take it for 16 (or 256) and some for 0; the checkpoint does not say.
            raise CheckpointError(
                f"{self.base}.qzeros: a stored zero-point of {largest} with checkpoint_format = "
                f"'gptq' means {largest + 1}: must be at most {largest}"
            )
        return np.ascontiguousarray(zeros, np.uint8)

    def _scales(self) -> Array:
        """[out, groups], refused where float16, as a bundle stores them, would change them."""
        name = f"{self.base}.scales"
        scales = self.where[name].read(name)
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16)
        if not (np.isfinite(half).all() and np.array_equal(half, scales)):
            raise CheckpointError(f"{name}: must be finite and fit float16 exactly")
        return np.ascontiguousarray(scales.T)

    def _check_order(self) -> None:
        """Groups must be of neighbouring inputs."""
        name = f"{self.base}.g_idx"
        if name not in self.where:
            return
        inputs = self.shape[1]
        expected = np.arange(inputs) // (self.how.group_size or inputs)
        if not np.array_equal(self.where[name].read_raw(name), expected):
            raise CheckpointError(
                f"{name}: desc_act: groups of inputs that do not lie side by side cannot be kept: "
                "quantise with desc_act = false, or with static_groups = true"
            )

    def _words(self, part: str) -> Words:
        name = f"{self.base}.{part}"
        return self.where[name].read_raw(name).view(np.uint32)


def find_prequantised(
    config: Config, where: Mapping[str, SafetensorsFile]
) -> dict[str, PrequantisedTensor]:
    """Every quantised weight of a checkpoint, by the name that it would have without: `x.weight`.

    Args:
        config: the parsed `config.json`.
        where: the file of every tensor.

    Raises:
        CheckpointError: the checkpoint is quantised in another way, or a tensor is missing or of
            a wrong shape or type; the message names it.
    """
    bases = [name.removesuffix(".qweight") for name in where if name.endswith(".qweight")]
    if config.get("quantization_config") is None:
        if bases:
            raise CheckpointError(
                f"config.json: quantization_config: is missing, and {bases[0]}.qweight is there"
            )
        return {}
    how = read_quantisation(config)
    return {f"{base}.weight": _checked(base, how, where) for base in bases}


def read_quantisation(config: Config) -> Quantisation:
    """What `quantization_config` says; see `find_prequantised`."""
    found = config["quantization_config"]
    if not isinstance(found, dict):
        raise CheckpointError(
            f"config.json: quantization_config = {found!r:.80}: must be an object"
        )
    method = found.get("quant_method")
    if method not in ("gptq", "awq"):
        raise _refuse("quant_method", method, "gptq or awq")
    bits = positive_int(found, "bits", 4 if method == "awq" else None)
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise _refuse("bits", bits, "4 or 8" if method == "gptq" else "4")
    size = found.get("group_size", 128)
    if type(size) is not int or (size != -1 and size not in GROUP_SIZES):
        raise _refuse("group_size", size, f"one of {GROUP_SIZES}, or -1 for a row")
    return Quantisation(
        method=cast(Method, method),
        bits=cast(Bits, bits),
        group_size=None if size == -1 else size,
        zero_offset=_gptq_offset(found) if method == "gptq" else _awq_offset(found),
    )


def _gptq_offset(found: Config) -> int:
    if found.get("dynamic"):
        raise _refuse("dynamic", found["dynamic"], "absent: layers must not differ")
    layout = text(found, "checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _refuse("checkpoint_format", layout, "gptq or gptq_v2")
    return 1 if layout == "gptq" else 0


def _awq_offset(found: Config) -> int:
    version = text(found, "version", "gemm").lower()
    if version != "gemm":
        raise _refuse("version", version, "gemm")
    if found.get("zero_point", True) is not True:
        raise _refuse("zero_point", found["zero_point"], "true")
    return 0


def _refuse(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.{key} = {value!r:.80}: must be {allowed}"
    )


def _checked(
    base: str, how: Quantisation, where: Mapping[str, SafetensorsFile]
) -> PrequantisedTensor:
    """Check names, types and shapes of the tensors of one weight."""
    if f"{base}.weight" in where:
        raise CheckpointError(f"{base}: has both a weight and a qweight")
    rows, columns = _entry(where, f"{base}.qweight", ("I32", "U32"), 2)
    per_word = _WORD_BITS // how.bits
    if how.method == "gptq":
        outputs, inputs = columns, rows * per_word
    else:
        outputs, inputs = columns * per_word, rows
    groups = 1 if how.group_size is None else -(-inputs // how.group_size)
    for part, dtypes, expected in (
        ("scales", ("F16", "BF16", "F32"), (groups, outputs)),
        ("qzeros", ("I32", "U32"), (groups, -(-outputs // per_word))),
    ):
        shape = _entry(where, f"{base}.{part}", dtypes, 2)
        if shape != expected:
            raise CheckpointError(f"{base}.{part}: shape {shape}: must be {expected}")
    if outputs % per_word:
        raise CheckpointError(f"{base}: {outputs} outputs: must be a multiple of {per_word}")
    if f"{base}.g_idx" in where:
        order = _entry(where, f"{base}.g_idx", ("I32", "I64"), 1)
        if order != (inputs,):
            raise CheckpointError(f"{base}.g_idx: shape {order}: must be ({inputs},)")
    return PrequantisedTensor(base=base, shape=(outputs, inputs), how=how, where=where)


def _entry(
    where: Mapping[str, SafetensorsFile], name: str, dtypes: tuple[str, ...], dimensions: int
) -> tuple[int, ...]:
    """The shape of a tensor that must be there, of one of the types."""
    if name not in where:
        raise CheckpointError(f"the checkpoint has no tensor {name!r}")
    entry = where[name].entries[name]
    if entry.dtype not in dtypes or len(entry.shape) != dimensions or 0 in entry.shape:
        raise CheckpointError(
            f"{name}: {entry.dtype} {entry.shape}: must be {' or '.join(dtypes)} of {dimensions} "
            "dimensions"
        )
    return entry.shape


def _values(words: Words, bits: Bits) -> Bytes:
    """The values of the words' last axis in order, lowest bits first."""
    octets = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if bits == 8:
        return octets
    values = np.empty((*octets.shape[:-1], octets.shape[-1] * 2), np.uint8)
    values[..., 0::2] = octets & 15
    values[..., 1::2] = octets >> 4
    return values


def _awq_values(words: Words) -> Bytes:
    """The 4-bit values of the words' last axis, put in order."""
    stored = _values(words, 4).reshape(*words.shape, len(_AWQ_ORDER))
    values = np.empty_like(stored)
    values[..., _AWQ_ORDER] = stored
    return values.reshape(*words.shape[:-1], -1)
