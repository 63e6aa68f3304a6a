"""`Manifest`: what a bundle says about itself, as `manifest.json`.

It is written as canonical JSON (sorted keys, no spaces, UTF-8), so that the same manifest is the
same bytes and can be signed. Reading is strict: an unknown key, a newer schema or a wrong type is
an error that names it, because a device acts on these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Literal, Self, get_args

from tidegate.errors import BundleError
from tidegate.model.architecture import Architecture
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.quality import EmbeddingQuality, Quality
from tidegate.model.recipe import Recipe
from tidegate.model.strict_json import read

SCHEMA_VERSION = 2
Target = Literal["onnx", "openvino", "packed"]
TARGETS: tuple[Target, ...] = get_args(Target)
DeviceTarget = Literal["onnx", "openvino"]
DEVICE_TARGETS: tuple[DeviceTarget, ...] = get_args(DeviceTarget)
"""What a device runs; `packed` is for who runs the walk itself, as the cloud does."""
MAX_MANIFEST_BYTES = 4_000_000
_MOST_LAYERS = 4096
"""As a config may have; see `llama_like`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the bundle: its SHA-256 in hex and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The text that data-aware passes looked at."""

    text: str
    """Its name."""
    text_sha256: str
    tokens: int
    """How many were used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """The arithmetic a device sizes itself by."""

    weight_bytes: int
    """Packed values, float16 scales, zero-points and norms."""
    kv_values_per_token: int
    """Key and value numbers per token over all layers; times the precision's bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """An Ed25519 signature (RFC 8032) of the manifest, which vouches for every file."""

    public_key: str
    """32 bytes in hex."""
    value: str
    """64 bytes in hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a device needs to know before it opens another file of the bundle."""

    model_id: str
    version: int
    """Grows with every conversion of the same model: a device never steps back unasked."""
    architecture: Architecture | EncoderArchitecture
    context_tokens: int
    recipe: Recipe
    calibration: Calibration | None = None
    """None when no pass looked at data."""
    tensor_bits: Mapping[str, int]
    """Bits per weight by role."""
    targets: tuple[Target, ...]
    toolchain: Mapping[str, str]
    """Versions of the libraries that wrote the targets; OpenVINO's minor version must match."""
    memory: MemoryNeed
    quality: Quality | EmbeddingQuality | None = None
    """None until it was evaluated."""
    files: Mapping[str, FileEntry]
    signature: Signature | None = None
    """Over the canonical JSON with this key null."""

    @property
    def decoder(self) -> Architecture:
        """The architecture of a bundle that generates text.

        Raises:
            BundleError: it is an encoder's.
        """
        if isinstance(self.architecture, EncoderArchitecture):
            raise BundleError(
                f"{self.model_id}: is an encoder ({self.architecture.model_type}): it makes "
                "embeddings and no text"
            )
        return self.architecture

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        body = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            BundleError: the bytes are not a manifest of this schema; names the wrong key.
        """
        body = _parse(data)
        version = body.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"manifest.json: schema_version = {version!r}: this release reads {SCHEMA_VERSION}"
            )
        manifest = read(cls, body, "manifest.json", BundleError)
        if not manifest.targets:
            raise BundleError(f"manifest.json: targets = []: must be some of {TARGETS}")
        for path in manifest.files:
            _check_path(path)
        _check_no_file_is_a_folder(manifest.files)
        _check_layers(manifest.architecture)
        return manifest


def _parse(data: bytes) -> dict[str, object]:
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest.json: is too long: must be at most {MAX_MANIFEST_BYTES} bytes")
    try:
        # Half a surrogate pair can be written in JSON, and cannot be signed or name a file.
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BundleError("manifest.json: is not JSON") from error
    if not isinstance(body, dict):
        raise BundleError("manifest.json: must hold an object")
    return body


def _check_path(path: str) -> None:
    """A relative path inside the bundle: no `..`, no absolute path, no backslash, no empty part."""
    parts = PurePosixPath(path).parts
    plain = "/".join(parts) == path and not path.startswith("/") and "\\" not in path
    if not plain or not parts or ".." in parts or "\0" in path or path == "manifest.json":
        raise BundleError(f"manifest.json: files: {path!r} is not a path inside the bundle")


def _check_no_file_is_a_folder(files: Collection[str]) -> None:
    for path in files:
        for parent in PurePosixPath(path).parents:
            if parent.as_posix() in files:
                raise BundleError(f"manifest.json: files: {str(parent)!r} is a folder of {path!r}")


def _check_layers(arch: Architecture | EncoderArchitecture) -> None:
    """Every layer must have a kind: `Architecture.kind` looks it up without asking."""
    if not 1 <= arch.layers <= _MOST_LAYERS:
        raise BundleError(
            f"manifest.json: architecture.layers = {arch.layers}: must be 1 to {_MOST_LAYERS}"
        )
    if isinstance(arch, EncoderArchitecture):
        return
    known = all(place < len(arch.kinds) for place in arch.pattern)
    if not arch.kinds or not known or len(arch.pattern) not in (0, arch.layers):
        raise BundleError(
            f"manifest.json: architecture.pattern = {arch.pattern!r:.80}: must name one of "
            f"{len(arch.kinds)} kinds for each of {arch.layers} layers"
        )
