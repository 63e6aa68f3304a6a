"""`Machine`: what decides how fast a model runs here, read in about a second.

One token of one request reads every weight once, so the rate at which memory is read bounds its
speed; a processor without integer dot products bounds it elsewhere.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

FLAGS: Final = (
    *("avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm", "sve"),
)
"""Instruction sets that the runtimes or the native layer choose a path by, as Linux names them."""

_READ_BYTES: Final = 128 << 20
"""Per thread: several times what caches hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine, as this process may use it."""

    processor: str
    architecture: str
    cores: int
    flags: tuple[str, ...]
    """Those of `FLAGS` that it has; none where the system does not say."""
    memory_bytes: int
    available_bytes: int


def read_machine(proc: Path = Path("/proc")) -> Machine:
    """What the system says, from `proc` on Linux."""
    facts, memory = _fields(proc / "cpuinfo"), _fields(proc / "meminfo")
    total = _kib(memory, "MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    has = set(facts.get("flags", facts.get("Features", "")).split())
    return Machine(
        processor=facts.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=usable_cores(),
        flags=tuple(flag for flag in FLAGS if flag in has),
        memory_bytes=total,
        available_bytes=_kib(memory, "MemAvailable") or total,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_gb_per_s(threads: int) -> float:
    """The best of four rounds of reading memory once, in 10^9 bytes per second.

    Args:
        threads: how many read, each `_READ_BYTES` of its own.
    """
    parts = [np.ones(_READ_BYTES // 8, np.uint64) for _ in range(threads)]
    rounds = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for _ in range(4):
            began_s = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            rounds.append(time.perf_counter() - began_s)
    return threads * _READ_BYTES / min(rounds) / 1e9


def _fields(file: Path) -> Mapping[str, str]:
    """The first `name: value` of each name; empty where there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for name, colon, value in (line.partition(":") for line in lines):
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _kib(fields: Mapping[str, str], name: str) -> int:
    """Bytes of a field such as `123 kB`; 0 where it is absent."""
    return int(fields[name].split()[0]) * 1024 if name in fields else 0
