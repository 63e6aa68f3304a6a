"""`BlockStore`: the weights of a conversion on disk, one file per finished block.

A block is written under its name only when it is whole and flushed, so what is there can be used
by the next run after this one was killed. It is read back a role at a time.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidegate.errors import CheckpointError, ConversionError
from tidegate.model.blocks import block_names, block_of, block_roles
from tidegate.model.linear_file import (
    FLOAT,
    PackedForm,
    Plan,
    read_linear,
    stored_bytes,
    tensors_of,
)
from tidegate.model.packed import Array, Linear
from tidegate.model.registry import AnyArchitecture
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.safetensors_writer import Layout, SafetensorsWriter
from tidegate.model.strict_json import read

_INFO = ":block"
"""The tensor with what a block says about itself, as JSON."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pending:
    """A linear layer whose place in the file is known before it is made."""

    plan: Plan
    make: Callable[[], Linear]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockInfo:
    """What a block's file says about itself."""

    forms: Mapping[str, PackedForm]
    notes: Mapping[str, str] = field(default_factory=dict)
    """What passes could not do and why, by role."""


class BlockStore:
    """The blocks of a model in a folder."""

    def __init__(self, folder: Path, arch: AnyArchitecture) -> None:
        """Keep the blocks of a model of architecture `arch` in `folder`, which is made."""
        folder.mkdir(exist_ok=True)
        self.folder, self.arch = folder, arch

    def has(self, block: str) -> bool:
        """Whether a block is finished."""
        return self._path(block).is_file()

    def write(
        self,
        block: str,
        linears: Mapping[str, Pending],
        vectors: Mapping[str, Array],
        notes: Mapping[str, str],
    ) -> None:
        """Finish a block; linear layers are made, written and let go one after another.

        Raises:
            ConversionError: a vector or what a layer is made of is not finite; names the role.
            OSError: the file cannot be written.
        """
        layouts: dict[str, Layout] = {name: (FLOAT, of.shape) for name, of in vectors.items()}
        forms: dict[str, PackedForm] = {}
        for pending in linears.values():
            layouts |= pending.plan.layouts
            forms |= pending.plan.forms
        info = _info_bytes(BlockInfo(forms=forms, notes=notes))
        layouts[_INFO] = (info.dtype, info.shape)
        with SafetensorsWriter(self._path(block), layouts) as file:
            file.put(_INFO, info)
            for name, values in vectors.items():
                _check_finite(name, values)
                file.put(name, values)
            for role, pending in linears.items():
                for name, tensor in tensors_of(role, pending.make()).items():
                    _check_finite(role, tensor)
                    file.put(name, tensor)

    def open(self, block: str) -> tuple[SafetensorsFile, BlockInfo]:
        """Open a finished block's file, which the caller closes.

        Raises:
            CheckpointError: it is damaged.
        """
        file = SafetensorsFile(self._path(block))
        try:
            return file, _read_info(file)
        except CheckpointError:
            file.close()
            raise

    def notes(self) -> dict[str, str]:
        """What passes left in the finished blocks, by role."""
        found: dict[str, str] = {}
        for block in filter(self.has, block_names(self.arch)):
            file, info = self.open(block)
            file.close()
            found |= info.notes
        return found

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


class StoreWeights:
    """`tidegate.model.walk.Weights` over finished blocks, with one file open at a time.

    A role that is asked for again while its weight is still in use gives the same object: a
    lowering tells a tied table by that.
    """

    def __init__(self, store: BlockStore) -> None:
        """Read from `store`."""
        self._store = store
        self._open: tuple[str, SafetensorsFile, BlockInfo] | None = None
        self._in_use: weakref.WeakValueDictionary[str, Linear] = weakref.WeakValueDictionary()

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        found = self._in_use.get(role)
        if found is None:
            file, info = self._block(role)
            found = read_linear(file, role, info.forms)
            self._in_use[role] = found
        return found

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._block(role)[0].read(role)

    def close(self) -> None:
        """Close the file that is open; it is closed too when nobody uses this object any more."""
        if self._open is not None:
            self._close_file()
            self._open = None

    def bits_and_bytes(self) -> tuple[dict[str, int], int]:
        """Bits per weight of every linear layer by role, and the bytes of everything together.

        A low-rank layer has the bits of its widest part, a dense one 32.
        """
        bits: dict[str, int] = {}
        nbytes = 0
        for block in block_names(self._store.arch):
            file, info = self._store.open(block)
            file.close()
            nbytes += stored_bytes(file.entries, info.forms)
            for role, what in block_roles(self._store.arch, block).items():
                if what.is_linear:
                    parts = [form.bits for name, form in info.forms.items() if _is_in(name, role)]
                    bits[role] = max(parts, default=32)
        return bits, nbytes

    def _block(self, role: str) -> tuple[SafetensorsFile, BlockInfo]:
        block = block_of(role)
        if self._open is None or self._open[0] != block:
            self.close()
            file, info = self._store.open(block)
            self._close_file = weakref.finalize(self, file.close)
            self._open = (block, file, info)
        return self._open[1], self._open[2]


def _is_in(name: str, role: str) -> bool:
    return name.partition(":")[0] == role


def _info_bytes(info: BlockInfo) -> npt.NDArray[np.uint8]:
    text = json.dumps(asdict(info), sort_keys=True)
    return np.frombuffer(text.encode(), np.uint8)


def _read_info(file: SafetensorsFile) -> BlockInfo:
    text = file.read_raw(_INFO).tobytes()
    return read(BlockInfo, json.loads(text), file.path.name, CheckpointError)


def _check_finite(role: str, values: npt.NDArray[np.generic]) -> None:
    if values.dtype == FLOAT and not np.isfinite(values).all():
        raise ConversionError(f"{role}: holds numbers that are infinite or not a number")
