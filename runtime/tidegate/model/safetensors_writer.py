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
        self._missing = set(self.names)
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
        start, _ = cast(list[int], entry["data_offsets"])
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        self._file.seek(LENGTH_BYTES + len(self._header) + start)
        self._file.write(little.reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    assert not self._missing, f"never written: {sorted(self._missing)}"
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
    # The bfloat16 of ml_dtypes, told by its name: this component does not depend on that package.
    return "BF16" if dtype.name == "bfloat16" else _DTYPES.get(dtype.newbyteorder("<"))
