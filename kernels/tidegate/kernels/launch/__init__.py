"""`launch_for`: block sizes, warps and stages of a kernel, from a table; nothing is tuned serving.

Each folder of kernels has a table, `<folder>.json`: a list of rows per kernel, of which the first
that fits is taken, so rows of a GPU come before those of any. A row has

    gpu      a part of the GPU's name, as "H200", or "*" for all
    at_most  bounds of sizes; a row without one fits every size
    values   what the kernel is launched with, `num_warps` and `num_stages` among them
    source   "rule, not measured", or the date and the file of results that it comes from
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import torch

_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What launch parameters depend on. Without a GPU: the interpreter's stand-in."""

    name: str
    processors: int
    """Streaming multiprocessors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A row of a table."""

    values: Mapping[str, int]
    source: str

    def __getitem__(self, name: str) -> int:
        return self.values[name]


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a device is; on the CPU kernels are interpreted, one program after another."""
    if device.type != "cuda":
        return Gpu(name="interpreted", processors=_INTERPRETED_PROCESSORS)
    found = torch.cuda.get_device_properties(device)
    return Gpu(name=found.name, processors=found.multi_processor_count)


def launch_for(folder: str, kernel: str, gpu: Gpu, **sizes: int) -> Launch:
    """The launch parameters of a kernel for some sizes.

    Args:
        folder: whose table, such as "pointwise".
        kernel: its name in the table.
        gpu: see `gpu_of`.
        sizes: by the names that `at_most` uses.

    Raises:
        LookupError: no row fits; a table ends with a row for any GPU and any size.
    """
    return _found(folder, kernel, gpu.name, tuple(sorted(sizes.items())))


@lru_cache(maxsize=4096)
def _found(folder: str, kernel: str, gpu: str, sizes: tuple[tuple[str, int], ...]) -> Launch:
    known = dict(sizes)
    for row in _table(folder).get(kernel, []):
        of_this = row.gpu == "*" or row.gpu in gpu
        if of_this and all(known[name] <= bound for name, bound in row.at_most.items()):
            return row.launch
    raise LookupError(f"no launch parameters for {folder}.{kernel} on {gpu} with {known}")


def tables() -> list[str]:
    """The folders that have a table."""
    names = (file.name for file in resources.files(__name__).iterdir())
    return sorted(os.path.splitext(name)[0] for name in names if name.endswith(".json"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    gpu: str
    at_most: Mapping[str, int]
    launch: Launch


@cache
def _table(folder: str) -> dict[str, list[_Row]]:
    text = resources.files(__name__).joinpath(f"{folder}.json").read_text(encoding="utf-8")
    return {kernel: [_row(one) for one in rows] for kernel, rows in json.loads(text).items()}


def _row(row: Mapping[str, Any]) -> _Row:
    launch = Launch(values=row["values"], source=row["source"])
    return _Row(gpu=row["gpu"], at_most=row.get("at_most", {}), launch=launch)
