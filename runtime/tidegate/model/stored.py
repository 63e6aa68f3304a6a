"""`StoredLinear`: a dense weight of 16 bits, as the bits that lie in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from tidegate.model.cuts import WHOLE, Cut, Span, read_cut
from tidegate.model.packed import Array
from tidegate.model.safetensors_file import SafetensorsFile


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StoredLinear:
    """A dense weight of 16 bits as a file holds it; nobody has looked at its numbers."""

    values: npt.NDArray[np.uint16]
    """The bits, [out, in]."""
    bfloat: bool
    """bfloat16, else float16."""
    bias: Array | None


@runtime_checkable
class HasStored(Protocol):
    """`Weights` of which some lie in a file as rows of 16 bits."""

    def stored(self, role: str, cut: Cut = WHOLE) -> StoredLinear | None:
        """What `cut` keeps of such a weight; None for any other.

        For who has such numbers anyway, at a third of the memory traffic of `linear`. Whether they
        are finite is left to the reader.
        """


def read_stored(
    file: SafetensorsFile, tensor: str, rows: Span, cut: Cut, bias: Array | None
) -> StoredLinear:
    """What `cut` keeps of some rows of a tensor of 16 bits."""
    start = rows[0]

    def read(span: Span) -> npt.NDArray[np.uint16]:
        return file.read_raw(tensor, (start + span[0], start + span[1])).view(np.uint16)

    values = read_cut(read, rows[1] - start, cut)
    return StoredLinear(values=values, bfloat=file.entries[tensor].dtype == "BF16", bias=bias)


def is_finite(values: Array) -> bool:
    """Whether no number is NaN or infinite; squares are summed first, in a tenth of a read."""
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        sums = np.dot(flat, flat)
    return bool(np.isfinite(sums) or np.isfinite(flat).all())
