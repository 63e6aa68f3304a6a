"""What of a model stays in memory: `ResidentExecutor` lets it go and brings it back.

The engine asks an executor for its geometry and limits once, so they are those of the first load,
and a later load must give the same. Loading happens in the thread of the steps, before the step
that needs it: whoever comes meanwhile waits in the engine's line, which is bounded. A load that
fails costs the requests that waited for it a retryable error; the next request tries again.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import threading
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Protocol

from tidegate.edge.energy.own_modes import LiveThreads
from tidegate.engine.executor import (
    Executor,
    ExecutorLimits,
    ExecutorStep,
    PagedGeometry,
    SlotGeometry,
    StepResult,
)
from tidegate.engine.facts import Described, ExecutorFacts
from tidegate.engine.spill import KvUnit, SpillingKv
from tidegate.errors import BundleError, TidegateError, UnavailableError, describe_defect
from tidegate.model.bundle import Bundle

_log = logging.getLogger(__name__)

_MADV_DONTNEED = 4
"""As in Linux's sys/mman.h."""


class DeviceExecutor(Executor, SpillingKv, Described, Protocol):
    """What both executors of a device are."""


class ResidentExecutor:
    """`Executor`, `SpillingKv` and `Unloadable` over an executor that is loaded when needed."""

    def __init__(self, first: DeviceExecutor, load: Callable[[], DeviceExecutor]) -> None:
        """Begin loaded.

        Args:
            first: is this one's to close from now on.
            load: gives one like it; raises what opening one raises.
        """
        self._load = load
        self._inner: DeviceExecutor | None = first
        self._closed = False
        # Threads are limited from another thread than that of the steps, which loads and unloads.
        self._change = threading.Lock()
        self._kv, self._limits = first.kv, first.limits
        self._layout, self._facts = first.kv_layout, first.facts
        self._unit_tokens, self._unit_bytes = first.unit_tokens, first.unit_bytes
        self._most_threads = first.most_threads if isinstance(first, LiveThreads) else None
        self._threads: int | None = None

    @property
    def kv(self) -> PagedGeometry | SlotGeometry:
        """See `Executor.kv`."""
        return self._kv

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor.limits`."""
        return self._limits

    @property
    def facts(self) -> ExecutorFacts:
        """See `Described.facts`; those of the last load."""
        return self._facts

    @property
    def kv_layout(self) -> str:
        """See `SpillingKv.kv_layout`."""
        return self._layout

    @property
    def unit_tokens(self) -> int:
        """See `SpillingKv.unit_tokens`."""
        return self._unit_tokens

    @property
    def unit_bytes(self) -> int:
        """See `SpillingKv.unit_bytes`."""
        return self._unit_bytes

    @property
    def loaded(self) -> bool:
        """See `Unloadable.loaded`."""
        return self._inner is not None

    @property
    def most_threads(self) -> int | None:
        """See `LiveThreads.most_threads`; those of the first load."""
        return self._most_threads

    def limit_threads(self, threads: int) -> None:
        """See `LiveThreads.limit_threads`; a model that is not here gets it when it comes back."""
        with self._change:
            if isinstance(self._inner, LiveThreads):
                self._inner.limit_threads(threads)
            self._threads = threads

    def execute(self, step: ExecutorStep) -> StepResult:
        """See `Executor.execute`.

        Raises:
            UnavailableError: the model could not be loaded again.
        """
        return self._resident().execute(step)

    def read_kv(self, unit: KvUnit) -> bytes:
        """See `SpillingKv.read_kv`."""
        return self._resident().read_kv(unit)

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        """See `SpillingKv.write_kv`."""
        self._resident().write_kv(unit, data)

    def unload(self) -> None:
        """See `Unloadable.unload`."""
        with self._change:
            inner, self._inner = self._inner, None
            if inner is not None:
                inner.close()
                del inner
                give_back_freed()

    def close(self) -> None:
        """See `Executor.close`."""
        self._closed = True
        self.unload()

    def _resident(self) -> DeviceExecutor:
        inner = self._inner
        if inner is not None:
            return inner  # a step does not wait for threads to be limited
        with self._change:
            if self._closed:
                raise UnavailableError("the executor is closed")
            if self._inner is None:
                self._inner = self._loaded_again()
            return self._inner

    def _loaded_again(self) -> DeviceExecutor:
        began_s = time.perf_counter()
        try:
            inner = self._load()
        except TidegateError as error:
            raise UnavailableError(f"the model cannot be loaded again: {error}") from error
        except Exception as error:  # the boundary to a library, or memory that is not there now
            _log.error("the model cannot be loaded again: %s", describe_defect(error))
            name = type(error).__name__
            raise UnavailableError(f"the model cannot be loaded again: {name}") from error
        found = (inner.kv, inner.limits, inner.kv_layout)
        if found != (self._kv, self._limits, self._layout):
            inner.close()
            raise UnavailableError("the model was replaced while it was unloaded: restart")
        self._facts = inner.facts
        if self._threads is not None and isinstance(inner, LiveThreads):
            inner.limit_threads(self._threads)
        _log.info("the model is loaded again after %.1f s", time.perf_counter() - began_s)
        return inner


def open_again(bundle: Bundle, trusted: Set[str] | None) -> Bundle:
    """Verify a bundle's folder once more.

    Raises:
        BundleError: it is damaged, or another bundle by now.
    """
    again = Bundle.open(bundle.folder, trusted=trusted, every_target=False)
    if again.manifest.to_bytes() != bundle.manifest.to_bytes():
        raise BundleError(f"{again.folder}: is another bundle now: restart to serve it")
    return again


def resident_bytes() -> int | None:
    """What the process has in memory now; None where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * mmap.PAGESIZE


def give_back_freed() -> None:
    """Return freed memory to the system; the allocator keeps much of what a model had."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def give_back_mapped(folder: Path) -> None:
    """Let go of the pages of files below `folder` that are mapped and only read.

    OpenVINO maps the weights, packs its own copy of them and keeps the mapping, which then counts
    as resident until memory is short. Whoever reads such a page again gets it from the file.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    below = f"{folder.resolve()}/"
    advise = ctypes.CDLL(None, use_errno=True).madvise
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        place, rights, *_, path = [*line.split(maxsplit=5), ""][:6]
        # A private page that was written is nowhere else.
        if path.startswith(below) and rights.startswith("r--"):
            begin, end = (int(part, 16) for part in place.split("-"))
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
