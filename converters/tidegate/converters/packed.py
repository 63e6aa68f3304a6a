"""Writes the `packed` target: a conversion's blocks by role, as `packed_target` reads them.

Tensors go from file to file a few rows at a time, so no layer is ever in memory, whatever its size.
Numbers that were widened on the way are stored as narrow as loses nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidegate.converters.driver.store import BlockStore
from tidegate.model.blocks import block_names
from tidegate.model.linear_file import FLOAT, PackedForm
from tidegate.model.packed import Array, pack_nibbles
from tidegate.model.packed_target import FORMAT, FORMS, FileForms
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_writer import BFLOAT16, Layout, SafetensorsWriter

Progress = Callable[[str, int, int], None]
AnyArray = npt.NDArray[np.generic]

_HALF: np.dtype[np.generic] = np.dtype(np.float16)
_PIECE_BYTES = 1 << 22
"""Read and written at a time."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Tensor:
    """One tensor of the target: where it comes from, and what becomes of its rows."""

    source: str
    layout: Layout
    change: Callable[[AnyArray], AnyArray]


def export_packed(store: BlockStore, folder: Path, progress: Progress | None = None) -> None:
    """Write a file per block of `store` to `folder`.

    Raises:
        CheckpointError: a block is damaged.
        OSError: a file cannot be written.
    """
    blocks = block_names(store.arch)
    for done, block in enumerate(blocks):
        source, info = store.open(block)
        with source:
            _write(source, info.forms, folder / f"{block}.safetensors")
        if progress is not None:
            progress("blocks", done + 1, len(blocks))


def _write(source: SafetensorsFile, forms: Mapping[str, PackedForm], path: Path) -> None:
    tensors = dict(_tensors(source, forms))
    text = json.dumps(asdict(FileForms(format=FORMAT, forms=forms)), sort_keys=True)
    said = np.frombuffer(text.encode(), np.uint8)
    layouts = {name: tensor.layout for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layouts | {FORMS: (said.dtype, said.shape)}) as file:
        file.put(FORMS, said)
        for name, tensor in tensors.items():
            first = 0
            for piece in _pieces(source, tensor.source):
                file.put_rows(name, first, tensor.change(piece))
                first += len(piece)


def _tensors(
    source: SafetensorsFile, forms: Mapping[str, PackedForm]
) -> Iterator[tuple[str, _Tensor]]:
    for name, entry in source.entries.items():
        base, _, part = name.rpartition(":")
        if not base and part != name:
            continue  # what the block says about itself
        dtype, shape = source.dtype(name), entry.shape
        if part == "zeros" and forms[base].bits == 4:
            rows, groups = shape
            layout = (dtype, (rows, -(-groups // 2)))
            yield f"{base}:zeros4", _Tensor(source=name, layout=layout, change=_packed)
        elif part in ("scales", "weight") and dtype == FLOAT:
            narrow = _narrowest(source, name, (_HALF,) if part == "scales" else (BFLOAT16, _HALF))
            change = {BFLOAT16: _brain, _HALF: _half}.get(narrow, _same)
            yield name, _Tensor(source=name, layout=(narrow, shape), change=change)
        else:
            yield name, _Tensor(source=name, layout=(dtype, shape), change=_same)


def _narrowest(
    source: SafetensorsFile, name: str, kinds: tuple[np.dtype[np.generic], ...]
) -> np.dtype[np.generic]:
    """The first of `kinds` that holds every number of a tensor as it is; else float32."""
    left = list(kinds)
    for piece in _pieces(source, name):
        values = piece.astype(np.float32, copy=False)
        left = [kind for kind in left if _HOLDS[kind](values)]
        if not left:
            return FLOAT
    return left[0]


def _pieces(source: SafetensorsFile, name: str) -> Iterator[AnyArray]:
    """The rows of a tensor, a few at a time."""
    rows, *rest = source.entries[name].shape
    row_bytes = math.prod(rest) * source.dtype(name).itemsize
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for first in range(0, rows, step):
        yield source.read_raw(name, (first, min(first + step, rows)))


def _holds_half(values: Array) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _holds_brain(values: Array) -> bool:
    return not (values.view(np.uint32) & 0xFFFF).any()


_HOLDS = {_HALF: _holds_half, BFLOAT16: _holds_brain}


def _same(rows: AnyArray) -> AnyArray:
    return rows


def _half(rows: AnyArray) -> AnyArray:
    return rows.astype(np.float16)


def _brain(rows: AnyArray) -> AnyArray:
    return (rows.view(np.uint32) >> 16).astype("<u2").view(BFLOAT16)


def _packed(rows: AnyArray) -> AnyArray:
    return pack_nibbles(rows.astype(np.uint8, copy=False))
