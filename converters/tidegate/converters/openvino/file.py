"""The two files of an OpenVINO graph, with constants that OpenVINO itself never held.

`openvino.save_model` reads every constant it writes, so a model would have to be in memory or
mapped, as large as it is. Here the graph is given placeholders and written as a draft; then the
draft's XML is pointed at the bytes that were streamed to the weight file beforehand. Constants
that OpenVINO holds itself, which are small, are copied from the draft's weight file.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import openvino as ov

from tidegate.converters.openvino.graph import Node

ALIGNMENT_BYTES = 64

_CONSTANT = re.compile(
    r'(<layer id="\d+" name="([^"]*)" type="Const"[^>]*>\s*<data [^>]*?)'
    r'offset="(\d+)" size="(\d+)"'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a constant's bytes are in the weight file."""

    offset: int
    nbytes: int


def align(file: BinaryIO) -> int:
    """Pad the file to where a constant may begin, and return that offset."""
    file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
    return file.tell()


def write_graph(model: Node, path: Path, weights: BinaryIO, places: Mapping[str, Place]) -> None:
    """Write the graph to `path`; its constants are in `weights`, where the others are appended.

    Args:
        model: an `openvino.Model`.
        path: the XML; a folder for the draft is made beside it and removed.
        weights: the weight file, at its end.
        places: the constants that are there already, by friendly name.

    Raises:
        OSError: a file cannot be written.
        RuntimeError: OpenVINO cannot write the draft.
    """
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=path.parent) as folder:
        draft = Path(folder) / "draft.xml"
        ov.save_model(model, draft, compress_to_fp16=False)
        text = draft.read_text(encoding="utf-8")
        with draft.with_suffix(".bin").open("rb") as small:
            text = _Relocation(weights, places, small).apply(text)
    path.write_text(text, encoding="utf-8")


class _Relocation:
    """Points every constant of a draft to its place in the weight file."""

    def __init__(self, weights: BinaryIO, places: Mapping[str, Place], draft: BinaryIO) -> None:
        self._weights, self._places, self._draft = weights, places, draft
        self._copied: dict[bytes, Place] = {}

    def apply(self, text: str) -> str:
        relocated, count = _CONSTANT.subn(self._point, text)
        assert count == text.count('type="Const"'), "OpenVINO writes constants in another way now"
        return relocated

    def _point(self, found: re.Match[str]) -> str:
        head, name, offset, size = found.groups()
        place = self._places.get(name) or self._copy(int(offset), int(size))
        assert place.nbytes == int(size), f"{name}: {place.nbytes} bytes were written, not {size}"
        return f'{head}offset="{place.offset}" size="{place.nbytes}"'

    def _copy(self, offset: int, nbytes: int) -> Place:
        """Append what OpenVINO wrote itself; equal bytes, such as shapes, once."""
        self._draft.seek(offset)
        data = self._draft.read(nbytes)
        if data not in self._copied:
            self._copied[data] = Place(offset=align(self._weights), nbytes=nbytes)
            self._weights.write(data)
        return self._copied[data]
