"""A bundle as one file: `.tar.zst`, the manifest first, the files in its order after it.

The manifest comes first so that a reader knows sizes and digests, and who signed, before it writes
anything. The same bundle gives the same bytes: times and owners are left out. Unpacking takes
nothing that the manifest does not list, and a file that does not match leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

from tidegate.errors import BundleError
from tidegate.model.bundle import MANIFEST_FILE, Bundle, BundleWriter
from tidegate.model.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from tidegate.model.signature import check_signature

Progress = Callable[[str, int, int], None]

_LEVEL = 10
"""Of zstd. Packed weights are nearly random: beyond it only the time grows."""
_PIECE_BYTES = 1 << 20
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_HEADER_BYTES, _MAX_HEADERS = 1 << 16, 4
"""Of one extended header, and of those before one entry; `pack` writes one of a path's length."""


def pack(bundle: Bundle, out: Path, progress: Progress | None = None) -> None:
    """Write a bundle to the file `out`, which appears when it is whole.

    Raises:
        OSError: `out` cannot be written.
    """
    import zstandard

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    names = sorted(bundle.manifest.files)
    try:
        with (
            partial.open("wb") as file,
            zstandard.ZstdCompressor(level=_LEVEL).stream_writer(file, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            manifest = bundle.manifest.to_bytes()
            tar.addfile(_member(MANIFEST_FILE, len(manifest)), io.BytesIO(manifest))
            for done, name in enumerate(names):
                with (bundle.folder / name).open("rb") as source:
                    tar.addfile(_member(name, bundle.manifest.files[name].size_bytes), source)
                if progress is not None:
                    progress("pack", done + 1, len(names))
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    """An entry that says nothing but its name and size."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size_bytes, 0o644
    return member


def unpack(
    archive: Path,
    out: Path,
    *,
    trusted: Collection[str] | None = None,
    allow_older: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Unpack an archive to the folder `out`, which appears when every file was verified.

    Args:
        archive: what `pack` wrote.
        out: a new folder, or one with a bundle that is replaced.
        trusted: see `check_signature`.
        allow_older: replace a bundle of the same model whose version is higher. An old archive
            is as well signed as a new one, so who can offer it could bring back its faults.
        progress: told (what, done, total).

    Raises:
        BundleError: the archive is damaged, holds something else than its manifest says, is not
            signed by a trusted key, or is older than what it would replace.
    """
    import zstandard

    try:
        with (
            archive.open("rb") as file,
            zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file) as packed,
            tarfile.open(fileobj=packed, mode="r|", tarinfo=_Entry) as tar,
            BundleWriter(out) as writer,
        ):
            manifest = _read_manifest(tar)
            check_signature(manifest, trusted)
            _check_room(manifest, writer.folder)
            if not allow_older:
                _check_not_older(manifest, out)
            for done, name in enumerate(sorted(manifest.files)):
                _unpack_file(_next(tar, name), tar, writer.folder / name, manifest.files[name])
                if progress is not None:
                    progress("unpack", done + 1, len(manifest.files))
            if tar.next() is not None:
                raise BundleError(f"{archive.name}: holds more than its manifest lists")
            return writer.finish(manifest)
    except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError) as error:
        raise BundleError(f"{archive.name}: is damaged or no bundle: {error}") from error
    except FileNotFoundError as error:
        raise BundleError(f"{archive}: is missing") from error
    except OSError as error:
        raise BundleError(f"{archive.name}: cannot be unpacked: {error}") from error


def _check_not_older(manifest: Manifest, out: Path) -> None:
    """Compare with the bundle at `out`; one that cannot be read has no version to keep."""
    try:
        with (out / MANIFEST_FILE).open("rb") as file:
            installed = Manifest.from_bytes(file.read(MAX_MANIFEST_BYTES + 1))
    except (OSError, BundleError):
        return
    if installed.model_id == manifest.model_id and installed.version > manifest.version:
        raise BundleError(
            f"{MANIFEST_FILE}: version = {manifest.version}: must be at least {installed.version}, "
            f"the version of {manifest.model_id} that is there, unless older ones are allowed"
        )


class _Entry(tarfile.TarInfo):
    """An entry of an archive that nobody has vouched for yet.

    Extended headers hold names that are too long for a plain one. The library reads each into
    memory, whatever size it claims, and one behind another by recursion. Maps of sparse files it
    reads without an end, and `pack` writes none.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("it holds a sparse file")
        if self.type in _EXTENDED:
            if self.size > _MAX_HEADER_BYTES or getattr(tar, "extended", 0) >= _MAX_HEADERS:
                raise tarfile.ReadError("its extended headers are too long or too many")
            tar.extended = getattr(tar, "extended", 0) + 1  # type: ignore[attr-defined]
        else:
            tar.extended = 0  # type: ignore[attr-defined]
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("it holds a sparse file")


def _read_manifest(tar: tarfile.TarFile) -> Manifest:
    member = _next(tar, MANIFEST_FILE)
    if member.size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST_FILE}: {member.size} bytes: must be at most 4 MB")
    return Manifest.from_bytes(_content(tar, member).read())


def _check_room(manifest: Manifest, folder: Path) -> None:
    """Refuse what cannot fit before any of it fills the disk."""
    needed = sum(entry.size_bytes for entry in manifest.files.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BundleError(f"the bundle needs {needed} bytes: {free} are free on the disk")


def _next(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    """The next entry, which must be the plain file `name`."""
    member = tar.next()
    if member is None or member.name != name or not member.isreg():
        found = "nothing" if member is None else repr(member.name[:80])
        raise BundleError(f"{name}: is missing from the archive: {found} lies in its place")
    return member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None  # it is a plain file
    return content


def _unpack_file(
    member: tarfile.TarInfo, tar: tarfile.TarFile, path: Path, entry: FileEntry
) -> None:
    """Copy one file, and compare its size before and its digest after."""
    if member.size != entry.size_bytes:
        raise BundleError(
            f"{member.name}: {member.size} bytes: the manifest says {entry.size_bytes}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    content = _content(tar, member)
    with path.open("xb") as file:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{member.name}: was changed: its SHA-256 is not the manifest's")
