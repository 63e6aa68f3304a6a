"""The bundle: one folder that holds all a device needs, verified before anything parses it.

`Bundle.open` checks paths, sizes and digests of every listed file first; only then may a library
be given one. Who runs one target of two may leave the digests of the other unread: `target_folder`
checks what is left, so nothing is handed out unverified. `BundleWriter` builds in a folder beside
the target and renames at the end, so a failed conversion leaves nothing, and a running device never
sees half a bundle. Layout:

    manifest.json  tokenizer.json  chat_template.jinja  generation_config.json
    openvino/model.xml + model.bin      onnx/model.onnx + ...
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tidegate.errors import BundleError
from tidegate.model.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from tidegate.model.signature import check_signature

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest
    unread: frozenset[str] = frozenset()
    """Files whose digests were not compared yet; `target_folder` does, for its own."""

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        trusted: Collection[str] | None = None,
        every_target: bool = True,
    ) -> Self:
        """Open a bundle and verify its signature and every file it lists.

        Args:
            folder: the bundle.
            trusted: public keys of which one must have signed; None for any signer or none.
            every_target: read all files now. Otherwise those of a target are read when
                `target_folder` is asked for it: of two targets a device runs one, and reading a
                gigabyte takes most of a second.

        Raises:
            BundleError: there is no bundle, its signature is wrong or not trusted, or a file is
                missing, changed or leads outside; the message names the file.
        """
        path = folder / MANIFEST_FILE
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{folder}: is not a bundle: it has no {MANIFEST_FILE}")
        try:
            with path.open("rb") as file:
                manifest = Manifest.from_bytes(file.read(MAX_MANIFEST_BYTES + 1))
            check_signature(manifest, trusted)
            _check_listing(folder, manifest)
            later = frozenset() if every_target else _of_targets(manifest)
            for name, entry in manifest.files.items():
                _check_file(folder, name, entry)
                if name not in later:
                    _check_digest(folder, name, entry)
        except OSError as error:
            raise BundleError(f"{folder}: cannot be read: {error}") from error
        return cls(folder=folder, manifest=manifest, unread=later)

    def target_folder(self, target: str) -> Path:
        """The folder of a target's files, all of them verified.

        Raises:
            BundleError: the bundle was not converted for that target, or one of its files that
                `open` left unread was changed.
        """
        if target not in self.manifest.targets:
            made = ", ".join(self.manifest.targets)
            raise BundleError(f"{self.folder}: target {target!r}: the bundle holds {made}")
        for name in sorted(self.unread):
            if name.startswith(f"{target}/"):
                _check_file(self.folder, name, self.manifest.files[name])
                _check_digest(self.folder, name, self.manifest.files[name])
        return self.folder / target


def _of_targets(manifest: Manifest) -> frozenset[str]:
    """The files that lie in the folder of a target."""
    folders = tuple(f"{target}/" for target in manifest.targets)
    return frozenset(name for name in manifest.files if name.startswith(folders))


def _check_listing(folder: Path, manifest: Manifest) -> None:
    """Nothing may lie in the folder that the manifest does not vouch for, and vice versa."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        plain_folder = path.is_dir() and not path.is_symlink()
        if not plain_folder and name != MANIFEST_FILE and name not in manifest.files:
            raise BundleError(f"{name}: is not listed in {MANIFEST_FILE}")
    for target in manifest.targets:
        if not any(name.startswith(f"{target}/") for name in manifest.files):
            raise BundleError(f"{MANIFEST_FILE}: target {target!r} has no files")
    if "tokenizer.json" not in manifest.files:
        raise BundleError(f"{MANIFEST_FILE}: files: tokenizer.json is missing")


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    """A plain file of the size that the manifest says."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{name}: is a link: a bundle holds plain files only")
    if not path.is_file():
        raise BundleError(f"{name}: is missing")
    found = path.stat().st_size
    if found != entry.size_bytes:
        raise BundleError(f"{name}: {found} bytes: the manifest says {entry.size_bytes}")


def _check_digest(folder: Path, name: str, entry: FileEntry) -> None:
    try:
        digest = sha256_file(folder / name)
    except OSError as error:
        raise BundleError(f"{name}: cannot be read: {error.strerror}") from error
    if digest != entry.sha256:
        raise BundleError(f"{name}: was changed: its SHA-256 is not the manifest's")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BundleWriter:
    """Collects a bundle's files in a hidden folder beside `out`, then moves it into place.

    Leaving the `with` block by an error, or without `finish`, removes what was written. An
    existing bundle at `out` is replaced as a whole, and only by `finish`.
    """

    def __init__(self, out: Path) -> None:
        """Prepare to write a bundle to `out`.

        Raises:
            BundleError: `out` exists and is no bundle, or its parent cannot be written.
        """
        if out.exists() and not (out / MANIFEST_FILE).is_file() and _holds_anything(out):
            raise BundleError(f"{out}: exists and is not a bundle: it is not overwritten")
        self.out = out
        self.folder = out.parent / f".{out.name}.partial-{os.getpid()}"
        self._old = out.parent / f".{out.name}.old-{os.getpid()}"
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        _clean_up_after_the_dead(self.out)
        self._made = [parent for parent in self.out.parents if not parent.exists()]
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise BundleError(f"{self.out.parent}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:  # the nearest first; one that is in use stays
            with contextlib.suppress(OSError):
                parent.rmdir()

    def entries(self) -> Mapping[str, FileEntry]:
        """Digest and size of every file written so far, by path in the bundle."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {
            path.relative_to(self.folder).as_posix(): FileEntry(
                sha256=sha256_file(path), size_bytes=path.stat().st_size
            )
            for path in files
        }

    def finish(self, manifest: Manifest) -> Bundle:
        """Write the manifest, flush everything to disk and move the bundle into place."""
        (self.folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
        for path in (*self.folder.rglob("*"), self.folder):
            _flush(path)
        replaces = self.out.exists()
        if replaces:
            self.out.rename(self._old)
        try:
            self.folder.rename(self.out)
        except OSError:
            if replaces:
                self._old.rename(self.out)
            raise
        _flush(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)
        return Bundle(folder=self.out, manifest=manifest)


def replace_manifest(bundle: Bundle, manifest: Manifest) -> Bundle:
    """Exchange a bundle's manifest for one that lists the same files, in one step.

    For what is known later than the files: a signature, a quality report.
    """
    if manifest.files != bundle.manifest.files:
        raise BundleError("manifest.json: files: another manifest must list the same files")
    partial = bundle.folder.parent / f".{bundle.folder.name}.manifest-{os.getpid()}"
    try:
        partial.write_bytes(manifest.to_bytes())
        _flush(partial)
        partial.replace(bundle.folder / MANIFEST_FILE)
    finally:
        partial.unlink(missing_ok=True)
    _flush(bundle.folder)
    return Bundle(folder=bundle.folder, manifest=manifest)


def _clean_up_after_the_dead(out: Path) -> None:
    """Undo what a writer that was killed left beside `out`: put the old bundle back, drop halves.

    Between its two renames a writer has moved the old bundle away and the new one not yet in.
    """
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*-*")):
        kind, _, pid = path.name.removeprefix(f".{out.name}.").partition("-")
        # As many digits as a process id may have; anything else is not ours.
        ours = kind in ("partial", "old") and pid.isascii() and pid.isdigit() and len(pid) <= 10
        if not ours or _is_alive(int(pid)):
            continue
        if kind == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds_anything(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())
