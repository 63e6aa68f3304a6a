"""The header of a safetensors file, checked before anything it says is believed. No I/O.

The format (github.com/huggingface/safetensors, README): u64 little-endian header length, that many
bytes of JSON, then tensor bytes that the header indexes without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tidegate.errors import CheckpointError

STORED_AS: Mapping[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""The numpy type of each dtype's bytes; a bfloat16 is the upper half of a float32's bits."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

_ONE_BYTE_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in STORED_AS.items()} | dict.fromkeys(
    _ONE_BYTE_FLOATS, 1
)
_MAX_DIMENSIONS, _MAX_VALUES = 64, 1 << 60
"""What a numpy array can have; an empty tensor may claim any shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `start` and `stop` are byte offsets from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_bytes(length: bytes, total_bytes: int) -> int:
    """Bytes of JSON, from the first eight bytes of a file of `total_bytes`.

    Raises:
        CheckpointError: the file is not as long as that.
    """
    nbytes = int.from_bytes(length, "little")
    if len(length) < LENGTH_BYTES or nbytes > min(total_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise CheckpointError(f"is truncated or no safetensors file ({total_bytes} bytes)")
    return nbytes


def parse_header(encoded: bytes, total_bytes: int) -> Mapping[str, TensorEntry]:
    """The tensors of a file of `total_bytes` by name.

    Raises:
        CheckpointError: the header is malformed, or does not cover the file exactly.
    """
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError("its header is not an object")
    header.pop("__metadata__", None)
    base = LENGTH_BYTES + len(encoded)
    entries = {name: _entry(name, value, base, total_bytes) for name, value in header.items()}
    _check_cover(entries, base, total_bytes)
    return entries


def _entry(name: str, value: object, base: int, total: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise CheckpointError(f"tensor {name!r}: its entry is not an object")
    dtype = value.get("dtype")
    shape, offsets = _whole(value.get("shape")), _whole(value.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"tensor {name!r}: its entry is malformed")
    # Zeros are left out: numpy refuses an empty array whose other dimensions are beyond it.
    if len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) > _MAX_VALUES:
        raise CheckpointError(f"tensor {name!r}: no array can have its shape")
    start, stop = offsets
    if stop > total:
        raise CheckpointError(f"is truncated: tensor {name!r} ends beyond its {total} bytes")
    item = _ITEM_BYTES.get(dtype)
    if start > stop or (item is not None and stop - start != math.prod(shape) * item):
        raise CheckpointError(f"tensor {name!r}: {stop - start} bytes do not hold {dtype} {shape}")
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=base + start, stop=base + stop)


def _check_cover(entries: Mapping[str, TensorEntry], base: int, total: int) -> None:
    """The bytes must be indexed entirely, without overlap: a hole hides what nobody reads."""
    position = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            raise CheckpointError(f"has a gap or an overlap at byte {position}")
        position = entry.stop
    if position != total:
        raise CheckpointError(f"is truncated: {total} bytes, its header speaks of {position}")


def _whole(value: object) -> list[int] | None:
    """`value` if it is a list of whole numbers of at least 0."""
    if not isinstance(value, list):
        return None
    whole = all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
    return value if whole else None
