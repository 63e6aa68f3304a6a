"""`NativeLibrary`: the compiled linear layer of `tidegate-native`, found by file name and checked.

The distribution puts plain shared libraries into a folder `tidegate_native`, which holds no Python:
`tidegate_native` re-tiles weights through a C interface, `tidegate_openvino` is an operation for
OpenVINO and `tidegate_openvino.json` says which release it was built for. That is read before
anything is loaded, because a C++ class of another release would not fail but corrupt memory.
Whatever is missing or does not fit is a reason in words, and the runtime's own operators run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Native = Literal["auto", "on", "off"]
"""Use the native layer where it can run, insist on it, or never."""

LAYOUT_VERSION: Final = 1
"""Of the tiles that this module knows; `layout_version` in `packed_linear.h`."""

TILE_ALIGNMENT: Final = 64
"""Bytes that tiles are aligned to."""

Bytes = npt.NDArray[np.uint8]


class NativeUnavailable(Exception):  # noqa: N818 - a reason, not a failure
    """Why the native layer does not run here, in words that complete "it does not run: ..."."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileShape:
    """A packed weight, as `Shape` in `packed_linear.h`."""

    inputs: int
    outputs: int
    bits: int
    group: int
    """Inputs that share a scale."""
    zeros: bool
    """Has zero-points; without, they are the middle of the range."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class NativeLibrary:
    """A library that can run on this processor."""

    operation: Path
    """The extension file for OpenVINO."""
    path: str
    """The instruction set it uses, such as `avx512-vnni`."""
    library: ctypes.CDLL

    @property
    def fast(self) -> bool:
        """Whether it has a vector path for this processor; the portable one is for tests."""
        return self.path != "portable"

    def tiled_bytes(self, shape: TileShape) -> int:
        """Bytes that the tiles of such a weight take; 0 if the layer cannot run it."""
        return int(self.library.tidegate_native_tiled_bytes(*_numbers(shape)))

    def digest(self, data: Bytes) -> int:
        """Eight bytes that tell damaged tiles; as fast as memory is read.

        Args:
            data: a multiple of 64 bytes.
        """
        assert data.nbytes % TILE_ALIGNMENT == 0
        return int(self.library.tidegate_native_digest(data.ctypes.data, data.nbytes))

    def tile(
        self,
        shape: TileShape,
        values: Bytes,
        scales: npt.NDArray[np.float16],
        zeros: Bytes | None,
        out: Bytes,
    ) -> None:
        """Write the tiles of a weight to `out`.

        Args:
            shape: of the weight.
            values: [outputs, groups, group * bits / 8], low nibble first.
            scales: [outputs, groups].
            zeros: [outputs, ceil(groups * bits / 8)], low nibble first; None if it has none.
            out: `tiled_bytes(shape)` bytes, aligned to `TILE_ALIGNMENT`.
        """
        groups = shape.inputs // shape.group
        assert values.nbytes == shape.outputs * shape.inputs * shape.bits // 8
        assert scales.dtype == np.float16
        assert scales.size == shape.outputs * groups
        assert zeros is None or zeros.nbytes == shape.outputs * -(-groups * shape.bits // 8)
        assert out.nbytes == self.tiled_bytes(shape)
        assert out.ctypes.data % TILE_ALIGNMENT == 0
        parts = [np.ascontiguousarray(part) for part in (values, scales)]
        given = None if zeros is None else np.ascontiguousarray(zeros)
        pointers = [ctypes.c_void_p(part.ctypes.data) for part in parts]
        pointers.append(ctypes.c_void_p(None if given is None else given.ctypes.data))
        status = self.library.tidegate_native_tile(
            *_numbers(shape), *pointers, ctypes.c_void_p(out.ctypes.data)
        )
        assert status == 0, self.library.tidegate_native_error()


def find_native(openvino: str, folder: Path | None = None) -> NativeLibrary:
    """The native layer for a release of OpenVINO, such as `2026.4.1`.

    Args:
        openvino: the installed release.
        folder: where its files are; None for the installed package `tidegate_native`.

    Raises:
        NativeUnavailable: it is not installed, is damaged, was built for another release or
            layout, or the environment names a path that this processor cannot run.
    """
    folder = folder or _package_folder()
    operation, tiler = folder / _file("tidegate_openvino"), folder / _file("tidegate_native")
    for file in (operation, tiler):
        if not file.is_file():
            raise NativeUnavailable(f"{file} is missing")
    _check_built_for(folder / "tidegate_openvino.json", openvino)
    library = _load(tiler)
    return NativeLibrary(operation=operation, path=_path(library), library=library)


def _package_folder() -> Path:
    spec = importlib.util.find_spec("tidegate_native")
    places = [] if spec is None else [Path(one) for one in spec.submodule_search_locations or []]
    if not places:
        raise NativeUnavailable("tidegate-native is not installed")
    # A namespace has every folder of that name on the path, empty ones too.
    filled = [place for place in places if (place / _file("tidegate_native")).is_file()]
    return (filled or places)[0]


def _file(name: str) -> str:
    if sys.platform == "win32":
        return f"{name}.dll"
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def _check_built_for(note: Path, openvino: str) -> None:
    try:
        built = json.loads(note.read_text(encoding="utf-8"))
        release, layout = str(built["openvino"]), built["layout"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NativeUnavailable(f"{note} does not say what it was built for: {error!r}") from error
    if release != openvino:
        raise NativeUnavailable(f"it was built for OpenVINO {release}, not {openvino}")
    if layout != LAYOUT_VERSION:
        raise NativeUnavailable(f"its layout is {layout}, not {LAYOUT_VERSION}")


def _load(file: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(file))
        library.tidegate_native_tiled_bytes.restype = ctypes.c_uint64
        library.tidegate_native_digest.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        library.tidegate_native_digest.restype = ctypes.c_uint64
        for name in ("tidegate_native_error", "tidegate_native_path"):
            getattr(library, name).restype = ctypes.c_char_p
        layout = library.tidegate_native_version()
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{file} cannot be loaded: {error}") from error
    if layout != LAYOUT_VERSION:
        raise NativeUnavailable(f"{file} has layout {layout}, not {LAYOUT_VERSION}")
    return library


def _path(library: ctypes.CDLL) -> str:
    path = library.tidegate_native_path()
    if path is None:
        raise NativeUnavailable(library.tidegate_native_error().decode())
    return str(path.decode())


def _numbers(shape: TileShape) -> list[ctypes.c_int64 | ctypes.c_int32]:
    sizes = [ctypes.c_int64(shape.inputs), ctypes.c_int64(shape.outputs)]
    return [*sizes, *(ctypes.c_int32(n) for n in (shape.bits, shape.group, shape.zeros))]
