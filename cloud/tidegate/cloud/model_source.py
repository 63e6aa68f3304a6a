"""Where the cloud's models come from: a checkpoint's folder, or a bundle with the packed target.

A bundle is verified before anything of it is parsed, as on a device. Weights are read when they
are asked for, so the host never holds the model.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidegate.engine.text import TextModel
from tidegate.errors import BundleError, ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.bundle import MANIFEST_FILE, Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.manifest import DEVICE_TARGETS
from tidegate.model.packed_target import FORMAT, TARGET, PackedWeights
from tidegate.model.registry import Source, architecture_module
from tidegate.model.safetensors_file import FileIdentity, file_identity
from tidegate.model.text_files import write_text_files
from tidegate.model.walk import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What `open_source` was given, for other processes to open the same."""

    folder: Path
    digest: str
    """Of a bundle's manifest, or of a checkpoint's config.json and which files it has open: while a
    model is loaded its folder may be exchanged."""
    trusted: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ModelSource:
    """An open model; valid until its `open_source` is left."""

    origin: Origin
    arch: Architecture
    weights: Weights
    _files: Bundle | Checkpoint

    def text(self, *, context_tokens: int) -> TextModel:
        """Its tokenizer and template, for requests of so many tokens."""
        if isinstance(self._files, Bundle):
            return TextModel.load(self._files.folder, context_tokens=context_tokens)
        with tempfile.TemporaryDirectory(prefix="tidegate-text-") as folder:
            write_text_files(self._files, Path(folder))
            return TextModel.load(Path(folder), context_tokens=context_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """What the heads of a model's files say."""

    arch: Architecture
    packed_bytes: int | None
    """Of its weights' files, when they are quantised there; None for dense ones."""
    sources: Mapping[str, Source]
    """Where each role lies in the checkpoint that it is or was made of, for adapters."""


def source_facts(folder: Path, *, trusted: Collection[str] | None = None) -> SourceFacts:
    """Look at a model without reading its weights; raises what `open_source` does."""
    if (folder / MANIFEST_FILE).exists():
        bundle = Bundle.open(folder, trusted=trusted, every_target=False)
        arch = bundle.manifest.decoder
        _check_target(bundle)
        prefix = f"{TARGET}/"
        sizes = [
            one.size_bytes for name, one in bundle.manifest.files.items() if name.startswith(prefix)
        ]
        sources = architecture_module(arch.model_type).sources(arch, ())
        return SourceFacts(arch=arch, packed_bytes=sum(sizes), sources=sources)
    _check_unsigned(folder, trusted)
    with Checkpoint.open(folder) as checkpoint:
        packed = sum(file.path.stat().st_size for file in checkpoint.files)
        dense = not checkpoint.prequantised
        return SourceFacts(
            arch=checkpoint.decoder,
            packed_bytes=None if dense else packed,
            sources=checkpoint.sources,
        )


@contextmanager
def open_source(folder: Path, *, trusted: Collection[str] | None = None) -> Iterator[ModelSource]:
    """Open a checkpoint, or a bundle that was converted with `--target packed`.

    Args:
        folder: of either.
        trusted: public keys of which one must have signed the bundle; None for any or none.

    Raises:
        BundleError: the bundle is damaged, not signed by any of `trusted`, an encoder's, or was
            converted for devices only; the message names the file or the target.
        CheckpointError: the checkpoint is damaged, of an unknown kind, or an encoder's.
        ConfigError: a checkpoint was to be signed.
    """
    keys = None if trusted is None else frozenset(trusted)
    if (folder / MANIFEST_FILE).exists():
        bundle = Bundle.open(folder, trusted=trusted, every_target=False)
        arch = bundle.manifest.decoder
        _check_target(bundle)
        before = _identities(bundle.folder / TARGET)
        with closing(PackedWeights(bundle.target_folder(TARGET), arch)) as packed:
            _check_unchanged(before, packed.identities)
            digest = hashlib.sha256(bundle.manifest.to_bytes()).hexdigest()
            origin = Origin(folder=folder, digest=digest, trusted=keys)
            yield ModelSource(origin=origin, arch=arch, weights=packed, _files=bundle)
        return
    _check_unsigned(folder, trusted)
    with Checkpoint.open(folder) as checkpoint:
        arch, weights = checkpoint.decoder, checkpoint.weights()
        origin = Origin(folder=folder, digest=_digest(checkpoint), trusted=keys)
        yield ModelSource(origin=origin, arch=arch, weights=weights, _files=checkpoint)


@contextmanager
def open_again(origin: Origin) -> Iterator[ModelSource]:
    """Open what another process of this machine has open.

    Raises:
        ConfigError: the folder holds something else by now.
        BundleError, CheckpointError, ConfigError: as `open_source`.
    """
    with open_source(origin.folder, trusted=origin.trusted) as source:
        if source.origin.digest != origin.digest:
            allowed = (
                "left alone while it is loaded: it was exchanged since the first process began"
            )
            raise ConfigError("model", str(origin.folder), allowed)
        yield source


def _identities(folder: Path) -> dict[str, FileIdentity]:
    """Of a target's files."""
    try:
        return {path.name: file_identity(path.stat()) for path in folder.iterdir()}
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read: {error}") from error


def _check_unchanged(before: Mapping[str, FileIdentity], now: Mapping[str, FileIdentity]) -> None:
    """What is open is what was verified, though both went by its name."""
    for name, identity in now.items():
        if before.get(name) != identity:
            raise BundleError(f"{TARGET}/{name}: was exchanged while the bundle was opened")


def _digest(checkpoint: Checkpoint) -> str:
    # Headers would not do: those of two trainings of one model are equal.
    files = [(file.path.name, *file.identity) for file in checkpoint.files]
    told = json.dumps([checkpoint.config, files], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _check_unsigned(folder: Path, trusted: Collection[str] | None) -> None:
    if trusted is not None:
        raise ConfigError(
            "trust", str(folder), "left out with a checkpoint: only bundles are signed"
        )


def _check_target(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if TARGET not in manifest.targets:
        made = " and ".join(one for one in manifest.targets if one in DEVICE_TARGETS)
        raise BundleError(
            f"{bundle.folder}: holds {made}, for devices: the cloud runs what `tidegate convert "
            f"--target {TARGET}` makes, or a checkpoint"
        )
    written = manifest.toolchain.get(TARGET)
    if written != str(FORMAT):
        raise BundleError(
            f"manifest.json: toolchain.{TARGET} = {written!r}: this release reads {FORMAT}"
        )
