"""Reads safetensors files without trusting them, one tensor at a time, through a memory map.

The format (github.com/huggingface/safetensors, README): u64 little-endian header length, that many
bytes of JSON, then tensor bytes that the header indexes without holes. Everything is checked
before a byte of a tensor is handed out. Tensors come back as float32 because numpy has no
bfloat16; the reader exists for that, and because a device should not need torch to read weights.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from tidegate.errors import CheckpointError
from tidegate.model.packed import Array

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `start` and `stop` are byte offsets from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One open file. Use it as a context manager, or `close` it."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header.

        Raises:
            CheckpointError: the file is missing, truncated or not what the format says.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path.name}: cannot be read: {error}") from error
        try:
            self.entries = self._read_header()
        except CheckpointError:
            self._map.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def read(self, name: str) -> Array:
        """A copy of a tensor, widened to float32 in its own shape.

        Raises:
            CheckpointError: there is no such tensor, or it is of a type that holds no weights.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path.name}: has no tensor {name!r}")
        raw = self._map[entry.start : entry.stop]
        if entry.dtype == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry.dtype in _ITEM_BYTES:
            values = np.frombuffer(raw, f"<f{_ITEM_BYTES[entry.dtype]}").astype(np.float32)
        else:
            allowed = ", ".join(_ITEM_BYTES)
            raise CheckpointError(f"{name}: dtype {entry.dtype!r}: must be one of {allowed}")
        return values.reshape(entry.shape)

    def _refuse(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {problem}")

    def _read_header(self) -> Mapping[str, TensorEntry]:
        total = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        if total < 8 or length > min(total - 8, _MAX_HEADER_BYTES):
            raise self._refuse(f"is truncated or no safetensors file ({total} bytes)")
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self._refuse("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._refuse("its header is not an object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        self._check_cover(entries, 8 + length, total)
        return entries

    def _entry(self, name: str, value: object, base: int) -> TensorEntry:
        if not isinstance(value, dict):
            raise self._refuse(f"tensor {name!r}: its entry is not an object")
        dtype = value.get("dtype")
        shape, offsets = _whole(value.get("shape")), _whole(value.get("data_offsets"))
        if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
            raise self._refuse(f"tensor {name!r}: its entry is malformed")
        start, stop = offsets
        item = _ITEM_BYTES.get(dtype)
        if start > stop or (item is not None and stop - start != math.prod(shape) * item):
            raise self._refuse(f"tensor {name!r}: {stop - start} bytes do not hold {dtype} {shape}")
        return TensorEntry(dtype=dtype, shape=tuple(shape), start=base + start, stop=base + stop)

    def _check_cover(self, entries: Mapping[str, TensorEntry], base: int, total: int) -> None:
        """The bytes must be indexed entirely, without overlap: a hole hides what nobody reads."""
        position = base
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
            if entry.start != position:
                raise self._refuse(f"has a gap or an overlap at byte {position}")
            position = entry.stop
        if position != total:
            raise self._refuse(f"is truncated: {total} bytes, its header speaks of {position}")


def _whole(value: object) -> list[int] | None:
    """`value` if it is a list of whole numbers of at least 0."""
    if not isinstance(value, list):
        return None
    whole = all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
    return value if whole else None
