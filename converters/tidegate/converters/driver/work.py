"""The work folder: what a conversion has finished so far, kept beside its output.

It is named after everything that decides the result (the recipe, the checkpoint, the text, this
converter), so only the same conversion finds it again. One process at a time holds it. A
conversion that is killed, or that the machine stops, leaves it; one that succeeds removes it, and
so does a refusal, which would come again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tidegate.converters.passes.base import CalibrationText
from tidegate.errors import BundleError, ConversionError, TidegateError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.recipe import Recipe

_DIGEST_CHARS = 16
_DECIDING_PACKAGES = ("tidegate.converters", "tidegate.kernels", "tidegate.model")
_SAMPLE_BYTES = 4096
"""Read of every tensor: training changes them all, and a whole checkpoint takes minutes to read."""


class WorkFolder:
    """The folder of one conversion. Use it as a context manager."""

    def __init__(self, out: Path, key: str, *, restart: bool = False) -> None:
        """Find or name the folder of the conversion to `out` that `key` stands for.

        Args:
            out: where the bundle will be.
            key: see `conversion_key`.
            restart: begin anew, and drop what any conversion to `out` has left.
        """
        self.path = out.parent / f".{out.name}.work-{key}"
        self.keep_when_refused = False
        """Whether the work is worth keeping when the conversion ends with an error of ours."""
        self._out, self._restart = out, restart
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self._restart:
            for old in self._out.parent.glob(f".{self._out.name}.work-*"):
                _remove_unless_held(old)
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = (self.path / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(
                f"{self._out}: another process is making it from the same checkpoint and recipe"
            ) from error
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        refused = isinstance(error, TidegateError) and not self.keep_when_refused
        if error is None or refused:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()


def _remove_unless_held(folder: Path) -> None:
    try:
        with (folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def conversion_key(
    checkpoint: Checkpoint,
    recipe: Recipe,
    text: CalibrationText | None,
    settings: Mapping[str, object],
) -> str:
    """A digest of everything that decides what the blocks of a conversion hold."""
    parts = {
        "recipe": asdict(recipe),
        "architecture": asdict(checkpoint.architecture),
        "checkpoint": _fingerprint(checkpoint),
        "text": None if text is None else [text.sha256, text.sequences],
        "settings": dict(settings),
        "converter": _code_digest(),
    }
    encoded = json.dumps(parts, sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:_DIGEST_CHARS]


def _fingerprint(checkpoint: Checkpoint) -> list[list[object]]:
    """Name, size, time and a sample of every file with weights."""
    found: list[list[object]] = []
    for file in checkpoint.files:
        status = file.path.stat()
        digest = hashlib.sha256()
        with file.path.open("rb") as data:
            for name in sorted(file.entries):
                entry = file.entries[name]
                digest.update(f"{name} {entry}".encode())
                data.seek(entry.start)
                digest.update(data.read(min(_SAMPLE_BYTES, entry.stop - entry.start)))
        found.append([file.path.name, status.st_size, status.st_mtime_ns, digest.hexdigest()])
    return found


def _code_digest() -> str:
    """Of the sources that decide: what another version has begun must not be continued."""
    digest = hashlib.sha256()
    for package in _DECIDING_PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
