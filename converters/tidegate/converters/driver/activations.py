"""What a block gives for the calibration text, kept in a file: float32 [tokens, width].

It is read and written batch by batch, so that memory does not grow with the text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tidegate.kernels.torch_ops import Tensor

_VALUE_BYTES = 4


def write_activations(path: Path, batches: Iterable[Tensor]) -> None:
    """Write batches of rows; the file is there whole or not at all.

    Raises:
        OSError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for batch in batches:
                file.write(batch.contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_activations(path: Path, rows: Sequence[int], width: int) -> Iterator[Tensor]:
    """The batches, of so many rows each."""
    start = 0
    with path.open("rb") as file:
        for count in rows:
            file.seek(start * width * _VALUE_BYTES)
            values = np.fromfile(file, np.float32, count * width)
            yield torch.from_numpy(values.reshape(count, width))
            start += count
