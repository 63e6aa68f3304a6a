"""A Hugging Face checkpoint folder: config, sharded weights read lazily, tokenizer files.

Nothing is held but memory maps: `CheckpointWeights` reads a tensor when the walk asks for it.
Names in the shard index are taken as plain file names, so an index cannot point outside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture, architecture_module, describe
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.safetensors_file import SafetensorsFile

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def read_json_object(path: Path) -> dict[str, object]:
    """Parse a JSON file that must hold an object; `CheckpointError` names the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise CheckpointError(f"{path.name}: {reason} (looked in {path.parent})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: must hold a JSON object")
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An open checkpoint. Use it as a context manager: it holds memory maps."""

    folder: Path
    config: Mapping[str, object]
    architecture: Architecture
    files: tuple[SafetensorsFile, ...]
    where: Mapping[str, SafetensorsFile]
    """The file of every tensor."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder and check that every tensor of its architecture is there.

        Raises:
            CheckpointError: a file is missing or damaged, the architecture is unknown, or a
                tensor is missing or of the wrong shape; the message names it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder with a checkpoint")
        config = read_json_object(folder / "config.json")
        architecture = describe(config)
        files = _open_files(folder)
        try:
            where = {name: file for file in files for name in file.entries}
            _check_shapes(architecture, where)
        except CheckpointError:
            for file in files:
                file.close()
            raise
        return cls(
            folder=folder, config=config, architecture=architecture, files=files, where=where
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def weights(self) -> CheckpointWeights:
        """The weights by role, as they are in the checkpoint."""
        return CheckpointWeights(self)


class CheckpointWeights:
    """`tidegate.model.walk.Weights` read from a checkpoint, one tensor at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read from `checkpoint`, which must stay open."""
        arch = checkpoint.architecture
        self._where = checkpoint.where
        self._names = architecture_module(arch.model_type).tensor_names(arch)

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        name = self._names[role]
        bias = f"{name}.bias"
        return DenseLinear(
            weight=self._read(f"{name}.weight"),
            bias=self._read(bias) if bias in self._where else None,
        )

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        return self._read(f"{self._names[role]}.weight")

    def _read(self, name: str) -> Array:
        return self._where[name].read(name)


def _open_files(folder: Path) -> tuple[SafetensorsFile, ...]:
    """Open the single file, or every shard that the index names."""
    if not (folder / INDEX_FILE).exists():
        return (SafetensorsFile(folder / SINGLE_FILE),)
    index = read_json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{INDEX_FILE}: weight_map must map tensor names to file names")
    files: list[SafetensorsFile] = []
    try:
        for name in sorted(set(index.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{INDEX_FILE}: {name!r} is not a plain file name")
            files.append(SafetensorsFile(folder / name))
    except CheckpointError:
        for file in files:
            file.close()
        raise
    return tuple(files)


def _check_shapes(arch: Architecture, where: Mapping[str, SafetensorsFile]) -> None:
    for role, name in architecture_module(arch.model_type).tensor_names(arch).items():
        tensor = f"{name}.weight"
        if tensor not in where:
            raise CheckpointError(f"the checkpoint has no tensor {tensor!r}")
        expected = _shape(arch, role)
        _check_shape(where, tensor, expected)
        bias = f"{name}.bias"
        if bias in where:
            _check_shape(where, bias, expected[:1])
        elif _has_bias(arch, role):
            raise CheckpointError(f"the checkpoint has no tensor {bias!r}: config.json asks for it")


def _check_shape(
    where: Mapping[str, SafetensorsFile], tensor: str, expected: tuple[int, ...]
) -> None:
    found = where[tensor].entries[tensor].shape
    if found != expected:
        raise CheckpointError(f"{tensor}: shape {found}: config.json asks for {expected}")


def _has_bias(arch: Architecture, role: str) -> bool:
    kind = role.rsplit(".", 1)[-1]
    attention = arch.attention_bias and kind in ("q", "k", "v", "o")
    return attention or (arch.mlp_bias and kind in ("gate", "up", "down"))


def _shape(arch: Architecture, role: str) -> tuple[int, ...]:
    attended, kv = arch.heads * arch.head_size, arch.kv_heads * arch.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (arch.vocab, arch.width),
        "head": (arch.vocab, arch.width),
        "q": (attended, arch.width),
        "k": (kv, arch.width),
        "v": (kv, arch.width),
        "o": (arch.width, attended),
        "gate": (arch.inner, arch.width),
        "up": (arch.inner, arch.width),
        "down": (arch.width, arch.inner),
    }
    return shapes.get(role.rsplit(".", 1)[-1], (arch.width,))
