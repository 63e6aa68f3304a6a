"""`Manifest`: what a bundle says about itself, as `manifest.json`.

It is written as canonical JSON (sorted keys, no spaces, UTF-8), so that the same manifest is the
same bytes and can be signed. Reading is strict: an unknown key, a newer schema or a wrong type is
an error that names it, because a device acts on these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Literal, Self, TypeVar, get_args

from tidegate.errors import BundleError
from tidegate.model.architecture import Activation, Architecture, Rope

SCHEMA_VERSION = 1
Target = Literal["onnx", "openvino"]
TARGETS: tuple[Target, ...] = get_args(Target)
_MAX_MANIFEST_BYTES = 4_000_000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the bundle: its SHA-256 in hex and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the weights were compressed. `group_size` is for the 4-bit ones."""

    method: str
    bits: int
    group_size: int
    symmetric: bool
    table_bits: int
    """Bits of the embedding table and the head, in the same groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """The arithmetic a device sizes itself by."""

    weight_bytes: int
    """Packed values, float16 scales, zero-points and norms."""
    kv_values_per_token: int
    """Key and value numbers per token over all layers; times the precision's bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a device needs to know before it opens another file of the bundle."""

    model_id: str
    version: int
    """Grows with every conversion of the same model: a device never steps back unasked."""
    architecture: Architecture
    context_tokens: int
    recipe: Recipe
    tensor_bits: Mapping[str, int]
    """Bits per weight by role."""
    targets: tuple[Target, ...]
    toolchain: Mapping[str, str]
    """Versions of the libraries that wrote the targets; OpenVINO's minor version must match."""
    memory: MemoryNeed
    files: Mapping[str, FileEntry]

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
        _check_keys(cls, body, "manifest.json")
        files, bits = _mapping(body, "files"), _mapping(body, "tensor_bits")
        toolchain = _mapping(body, "toolchain")
        return cls(
            model_id=_typed(body, "model_id", str),
            version=_typed(body, "version", int),
            architecture=_architecture(_mapping(body, "architecture")),
            context_tokens=_typed(body, "context_tokens", int),
            recipe=_flat(Recipe, _mapping(body, "recipe"), "recipe"),
            tensor_bits={role: _typed(bits, role, int) for role in bits},
            targets=_targets(body.get("targets")),
            toolchain={name: _typed(toolchain, name, str) for name in toolchain},
            memory=_flat(MemoryNeed, _mapping(body, "memory"), "memory"),
            files={
                _safe_path(path): _flat(FileEntry, _mapping(files, path), path) for path in files
            },
        )


def _parse(data: bytes) -> dict[str, object]:
    if len(data) > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"manifest.json: {len(data)} bytes: must be at most {_MAX_MANIFEST_BYTES}"
        )
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError("manifest.json: is not JSON") from error
    if not isinstance(body, dict):
        raise BundleError("manifest.json: must hold an object")
    return body


def _safe_path(path: str) -> str:
    """A relative path inside the bundle: no `..`, no absolute path, no backslash, no empty part."""
    parts = PurePosixPath(path).parts
    plain = "/".join(parts) == path and not path.startswith("/") and "\\" not in path
    if not plain or not parts or ".." in parts or "\0" in path or path == "manifest.json":
        raise BundleError(f"manifest.json: files: {path!r} is not a path inside the bundle")
    return path


def _targets(value: object) -> tuple[Target, ...]:
    if not isinstance(value, list) or not value or not all(item in TARGETS for item in value):
        raise BundleError(f"manifest.json: targets = {value!r}: must be some of {TARGETS}")
    return tuple(value)


def _architecture(body: Mapping[str, object]) -> Architecture:
    rope = _flat(Rope, _mapping(body, "rope"), "architecture.rope")
    return _flat(Architecture, {**body, "rope": rope}, "architecture")


_PRIMITIVES = {"int": int, "str": str, "bool": bool, "float": float}


def _flat(kind: type[T], body: Mapping[str, object], where: str) -> T:
    """Build a dataclass of plain values, each checked against its annotation."""
    _check_keys(kind, body, where)
    values: dict[str, object] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        expected = _PRIMITIVES.get(str(field.type))
        if expected is not None:
            values[field.name] = _typed(body, field.name, expected)
        elif str(field.type) == "Activation" and body[field.name] not in get_args(Activation):
            raise BundleError(f"manifest.json: {where}.{field.name} = {body[field.name]!r}")
        else:
            values[field.name] = body[field.name]
    return kind(**values)


def _check_keys(kind: type, body: Mapping[str, object], where: str) -> None:
    expected = {field.name for field in fields(kind)}
    if set(body) != expected:
        missing, unknown = sorted(expected - set(body)), sorted(set(body) - expected)
        raise BundleError(f"manifest.json: {where}: missing keys {missing}, unknown keys {unknown}")


def _typed(body: Mapping[str, object], key: str, kind: type[T]) -> T:
    """The value at `key`, of exactly this type; whole numbers must not be negative."""
    value = body.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise BundleError(f"manifest.json: {key} = {value!r}: must be a {kind.__name__}")
    return value


def _mapping(body: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = body.get(key)
    if not isinstance(value, dict):
        raise BundleError(f"manifest.json: {key} must be an object")
    return value
