"""Reads safetensors files without trusting them, a tensor or some rows of one at a time.

Everything is checked before a byte of a tensor is handed out. Tensors are read, not mapped: mapped
pages count as the process's memory until the kernel takes them back. `read` widens to float32
because numpy has no bfloat16, and a device should not need torch to read weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from tidegate.errors import CheckpointError
from tidegate.model.packed import Array, Bytes
from tidegate.model.safetensors_header import (
    LENGTH_BYTES,
    STORED_AS,
    TensorEntry,
    header_bytes,
    parse_header,
)

_FLOATS = ("F64", "F32", "F16", "BF16")
_CHUNK_BYTES = 1 << 19
"""Read and widened at a time: small enough to be in a core's cache for the second pass."""


FileIdentity = tuple[int, int, int, int]
"""Device, inode, bytes and nanoseconds of the last change: what tells that a name means another
file than before, or that it was written to."""


def file_identity(facts: os.stat_result) -> FileIdentity:
    """Of a file that was looked at."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


class SafetensorsFile:
    """One open file. Use it as a context manager, or `close` it. Threads may share it."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header.

        Raises:
            CheckpointError: the file is missing, truncated or not what the format says.
        """
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except (OSError, ValueError) as error:  # a name that no file can have
            raise self._refuse(f"cannot be read: {error}") from error
        try:
            self.entries = self._read_header()
        except CheckpointError as error:
            self._file.close()
            raise self._refuse(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def identity(self) -> FileIdentity:
        """Of what is open, wherever its name leads by now."""
        return file_identity(os.fstat(self._file.fileno()))

    def dtype(self, name: str) -> np.dtype[np.generic]:
        """What `read_raw` gives a tensor as.

        Raises:
            CheckpointError: there is no such tensor, or numpy has no such type.
        """
        return np.dtype(STORED_AS[self._find(name, STORED_AS).dtype])

    def read(self, name: str, rows: tuple[int, int] | None = None, *, flat: bool = False) -> Array:
        """A copy of a tensor, widened to float32 in its own shape.

        Args:
            name: the tensor.
            rows: read only `rows[0]` up to, without, `rows[1]` of its first dimension, which is
                kept; all when None.
            flat: take a stack of matrices for one, their rows one after another.

        Raises:
            CheckpointError: there is no such tensor or row, it is of a type that holds no weights,
                or the file cannot be read any more.
        """
        entry = self._find(name, _FLOATS)
        shape, start = self._part(name, entry, rows, flat)
        values = np.empty(shape, np.float32)
        try:
            self._widen(values.reshape(-1), entry.dtype, start)
        except CheckpointError as error:
            raise self._refuse(f"{name}: {error}") from error
        return values

    def read_raw(
        self, name: str, rows: tuple[int, int] | None = None, *, flat: bool = False
    ) -> npt.NDArray[np.generic]:
        """A copy of a tensor in its own type, bfloat16 as the bits of its values in uint16.

        Args:
            name: the tensor.
            rows: as for `read`.
            flat: as for `read`.

        Raises:
            CheckpointError: there is no such tensor, numpy has no such type, or the file cannot
                be read any more.
        """
        entry = self._find(name, STORED_AS)
        shape, start = self._part(name, entry, rows, flat)
        values: npt.NDArray[np.generic] = np.empty(shape, np.dtype(STORED_AS[entry.dtype]))
        try:
            self._fill(values.reshape(-1).view(np.uint8), start)
        except CheckpointError as error:
            raise self._refuse(f"{name}: {error}") from error
        return values

    def _part(
        self, name: str, entry: TensorEntry, rows: tuple[int, int] | None, flat: bool
    ) -> tuple[tuple[int, ...], int]:
        """Shape and first byte of what is asked for of a tensor."""
        shape, start = entry.shape, entry.start
        if flat:
            shape = (math.prod(shape[:-1]), *shape[-1:])
        if rows is None:
            return shape, start
        first, after = rows
        if not shape or not 0 <= first <= after <= shape[0]:
            raise self._refuse(f"{name}: rows {first} to {after}: its shape is {shape}")
        row_bytes = math.prod(shape[1:]) * np.dtype(STORED_AS[entry.dtype]).itemsize
        return (after - first, *shape[1:]), start + first * row_bytes

    def _find(self, name: str, dtypes: Mapping[str, str] | tuple[str, ...]) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None:
            raise self._refuse(f"has no tensor {name!r}")
        if entry.dtype not in dtypes:
            allowed = ", ".join(dtypes)
            raise CheckpointError(f"{name}: dtype {entry.dtype!r}: must be one of {allowed}")
        return entry

    def _widen(self, values: Array, dtype: str, start: int) -> None:
        """Fill `values` from the file; the only temporary is one chunk."""
        stored = np.dtype(STORED_AS[dtype])
        if stored == values.dtype:
            self._fill(values.view(np.uint8), start)
            return
        chunk = np.empty(_CHUNK_BYTES // stored.itemsize, stored)
        for at in range(0, len(values), len(chunk)):
            part = chunk[: len(values) - at]
            self._fill(part.view(np.uint8), start + at * stored.itemsize)
            wide = values[at : at + len(part)]
            if dtype == "BF16":
                bits = wide.view(np.uint32)
                bits[:] = part
                bits <<= 16
            else:
                wide[:] = part

    def _fill(self, buffer: Bytes, start: int) -> None:
        """Read into all of `buffer`; one call reads at most 2 GiB, or less after a signal."""
        view, done = buffer.data, 0
        while done < len(view):
            try:
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError("is truncated: the file became shorter while it was open")
            done += count

    def _read_header(self) -> Mapping[str, TensorEntry]:
        total = os.fstat(self._file.fileno()).st_size
        length = header_bytes(self._bytes(0, min(total, LENGTH_BYTES)), total)
        return parse_header(self._bytes(LENGTH_BYTES, length), total)

    def _bytes(self, start: int, nbytes: int) -> bytes:
        buffer = np.empty(nbytes, np.uint8)
        self._fill(buffer, start)
        return buffer.tobytes()

    def _refuse(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {problem}")
