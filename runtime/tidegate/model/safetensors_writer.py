"""Writes safetensors files tensor by tensor, the same bytes every time.

Tensors lie by the size of their items, largest first, then by name, as the reference writer puts
them: so every one begins at a multiple of its own item size. The file appears under its name only
when it is whole and on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from tidegate.model.safetensors_header import LENGTH_BYTES, STORED_AS

AnyArray = npt.NDArray[np.generic]

_DTYPES = {np.dtype(kind): name for name, kind in STORED_AS.items() if name != "BF16"}
_HEADER_ALIGNMENT_BYTES = 8


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
    entries, names = _layout(tensors)
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    encoded = json.dumps(header | entries, sort_keys=True, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT_BYTES)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)
            for name in names:
                _write(file, name, tensors[name], entries[name])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _layout(tensors: Mapping[str, AnyArray]) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The header's entries, and the names in the order of their bytes."""
    described = {name: _describe(name, tensors[name]) for name in sorted(tensors)}
    names = sorted(described, key=lambda name: -described[name][1])
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for name in names:
        entry, _, nbytes = described[name]
        entries[name] = entry | {"data_offsets": [end, end + nbytes]}
        end += nbytes
    return entries, names


def _describe(name: str, values: AnyArray) -> tuple[dict[str, object], int, int]:
    """The entry without its place, the bytes of an item and of all."""
    dtype = _dtype(values.dtype)
    if dtype is None or name == "__metadata__":
        raise ValueError(f"{name}: {values.dtype} cannot be stored; must be of {[*STORED_AS]}")
    return {"dtype": dtype, "shape": list(values.shape)}, values.itemsize, values.nbytes


def _dtype(dtype: np.dtype[np.generic]) -> str | None:
    # The bfloat16 of ml_dtypes, told by its name: this component does not depend on that package.
    return "BF16" if dtype.name == "bfloat16" else _DTYPES.get(dtype.newbyteorder("<"))


def _write(file: IO[bytes], name: str, values: AnyArray, entry: Mapping[str, object]) -> None:
    found = {"dtype": _dtype(values.dtype), "shape": list(values.shape)}
    if found != {key: entry[key] for key in found}:
        raise ValueError(f"{name}: became {found} after the header was written")
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    file.write(little.reshape(-1).view(np.uint8).data)
