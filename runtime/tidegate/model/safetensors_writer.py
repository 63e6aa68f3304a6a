"""Writes safetensors files tensor by tensor, the same bytes every time.

Tensors lie by the size of their items, largest first, then by name, as the reference writer puts
them: so every one begins at a multiple of its own item size. The file appears under its name only
when it is whole and on the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from tidegate.model.safetensors_header import LENGTH_BYTES, STORED_AS

AnyArray = npt.NDArray[np.generic]

_DTYPES = {np.dtype(kind): name for name, kind in STORED_AS.items() if name != "BF16"}
_HEADER_ALIGNMENT_BYTES = 8

BFLOAT16: np.dtype[np.generic] = np.dtype([("bfloat16", "<u2")])
"""The bits of bfloat16 values, for which numpy has no type: an array's `view` is stored as BF16."""

Layout = tuple[np.dtype[np.generic], tuple[int, ...]]
"""Type and shape of a tensor, known before its values are."""


def write_safetensors(
    path: Path, tensors: Mapping[str, AnyArray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path`, replacing what is there.

    Args:
        path: the file; its folder must exist.
        tensors: by name, in any order. A lazy mapping is asked twice for each and must give the
            same shape and type; one tensor at a time is held.
        metadata: strings to keep in the header.

    Raises:
        ValueError: a tensor's type has no name in the format.
        OSError: the file cannot be written.
    """
    layouts = {name: _layout_of(tensors[name]) for name in sorted(tensors)}
    with SafetensorsWriter(path, layouts, metadata) as file:
        for name in file.names:
            file.put(name, tensors[name])


class SafetensorsWriter:
    """A file of known layout whose tensors may come in any order.

    Use it as a context manager: leaving it moves the whole file into place, leaving it by an
    error removes what was written.
    """

    def __init__(
        self,
        path: Path,
        layouts: Mapping[str, Layout],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Lay out the file.

        Raises:
            ValueError: a tensor's type has no name in the format.
        """
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._entries, self.names = _lay_out(layouts)
        self._missing = {name: _nbytes(entry) for name, entry in self._entries.items()}
        """Bytes that were not written yet, by name."""
        header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        encoded = json.dumps(header | self._entries, sort_keys=True, separators=(",", ":")).encode()
        self._header = encoded + b" " * (-len(encoded) % _HEADER_ALIGNMENT_BYTES)

    def __enter__(self) -> Self:
        self._file = self._partial.open("wb")
        self._file.write(len(self._header).to_bytes(LENGTH_BYTES, "little") + self._header)
        return self

    def put(self, name: str, values: AnyArray) -> None:
        """Write one tensor.

        Raises:
            ValueError: it is not of the type and shape that were laid out.
            OSError: the file cannot be written.
        """
        entry = self._entries[name]
        found = {"dtype": _dtype(values.dtype), "shape": list(values.shape)}
        if found != {key: entry[key] for key in found}:
            raise ValueError(f"{name}: became {found} after the header was written")
        self._write(name, 0, values)

    def put_rows(self, name: str, first: int, values: AnyArray) -> None:
        """Write some rows of a tensor, from row `first` on; each row once.

        Raises:
            ValueError: they are not of the type and shape that were laid out.
            OSError: the file cannot be written.
        """
        entry = self._entries[name]
        rows, *rest = cast(list[int], entry["shape"])
        fits = first + len(values) <= rows and [*values.shape[1:]] == rest
        if _dtype(values.dtype) != entry["dtype"] or not fits:
            raise ValueError(f"{name}: rows {first} on of {values.dtype} {values.shape}: {entry}")
        self._write(name, first * math.prod(rest) * values.dtype.itemsize, values)

    def _write(self, name: str, offset: int, values: AnyArray) -> None:
        start, _ = cast(list[int], self._entries[name]["data_offsets"])
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        self._file.seek(LENGTH_BYTES + len(self._header) + start + offset)
        self._file.write(little.reshape(-1).view(np.uint8).data)
        self._missing[name] -= little.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    missing = sorted(name for name, nbytes in self._missing.items() if nbytes)
                    assert not missing, f"never written: {missing}"
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)


def _lay_out(layouts: Mapping[str, Layout]) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The header's entries, and the names in the order of their bytes."""
    described = {name: _describe(name, layouts[name]) for name in sorted(layouts)}
    names = sorted(described, key=lambda name: -described[name][1])
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for name in names:
        entry, _, nbytes = described[name]
        entries[name] = entry | {"data_offsets": [end, end + nbytes]}
        end += nbytes
    return entries, names


def _nbytes(entry: Mapping[str, object]) -> int:
    start, end = cast(list[int], entry["data_offsets"])
    return end - start


def _layout_of(values: AnyArray) -> Layout:
    return values.dtype, values.shape


def _describe(name: str, layout: Layout) -> tuple[dict[str, object], int, int]:
    """The entry without its place, the bytes of an item and of all."""
    dtype, shape = layout
    stored = _dtype(dtype)
    if stored is None or name == "__metadata__":
        raise ValueError(f"{name}: {dtype} cannot be stored; must be of {[*STORED_AS]}")
    nbytes = math.prod(shape) * dtype.itemsize
    return {"dtype": stored, "shape": list(shape)}, dtype.itemsize, nbytes


def _dtype(dtype: np.dtype[np.generic]) -> str | None:
    # The bfloat16 of ml_dtypes is told by its name: this component does not depend on that package.
    if dtype == BFLOAT16 or dtype.name == "bfloat16":
        return "BF16"
    return _DTYPES.get(dtype.newbyteorder("<"))
