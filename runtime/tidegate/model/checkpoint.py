"""A Hugging Face checkpoint folder: config, sharded weights read lazily, tokenizer files.

Nothing is held but open files: `CheckpointWeights` reads a tensor when the walk asks for it.
Names in the shard index are taken as plain file names, so an index cannot point outside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture
from tidegate.model.cuts import WHOLE, Cut, read_cut
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array, DenseLinear, Linear
from tidegate.model.prequantised import PrequantisedTensor, find_prequantised
from tidegate.model.registry import AnyArchitecture, Source, architecture_module, describe
from tidegate.model.roles import roles
from tidegate.model.safetensors_file import SafetensorsFile
from tidegate.model.stored import StoredLinear, is_finite, read_stored

_ROWS = 4096
"""Rows of a table compared at a time: tens of MB of a large one."""
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
    """An open checkpoint. Use it as a context manager: it holds open files."""

    folder: Path
    config: Mapping[str, object]
    architecture: AnyArchitecture
    files: tuple[SafetensorsFile, ...]
    where: Mapping[str, SafetensorsFile]
    """The file of every tensor."""
    sources: Mapping[str, Source]
    """Where each role's numbers lie."""
    prequantised: Mapping[str, PrequantisedTensor]
    """Weights that are quantised already, by the name of a source's tensor."""

    @classmethod
    def open(cls, folder: Path, *, context: int | None = None) -> Self:
        """Open a folder and check that every tensor of its architecture is there.

        Args:
            folder: holds config.json and safetensors.
            context: positions to serve, None for what the model was trained for.

        Raises:
            CheckpointError: a file is missing or damaged, the architecture is unknown, or a
                tensor is missing or of the wrong shape; the message names it.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder with a checkpoint")
        config = read_json_object(folder / "config.json")
        pooling = _sentence_transformers(folder)
        if pooling:
            config["sentence_transformers"] = pooling
        architecture = describe(config, context)
        files = _open_files(folder)
        try:
            where = _where(files)
            module = architecture_module(architecture.model_type)
            prequantised = find_prequantised(config, where)
            sources = module.sources(architecture, where.keys() | prequantised.keys())
            _check_sources(architecture, sources, where, prequantised)
            _check_nothing_is_left(architecture, sources, where, prequantised)
        except BaseException:
            for file in files:
                file.close()
            raise
        return cls(
            folder=folder,
            config=config,
            architecture=architecture,
            files=files,
            where=where,
            sources=sources,
            prequantised=prequantised,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    @property
    def decoder(self) -> Architecture:
        """The architecture of a checkpoint that generates text.

        Raises:
            CheckpointError: it is an encoder.
        """
        if isinstance(self.architecture, EncoderArchitecture):
            raise CheckpointError(
                f"config.json: model_type = {self.architecture.model_type!r}: is an encoder, which "
                "makes no text"
            )
        return self.architecture

    def weights(self) -> CheckpointWeights:
        """The weights by role, as they are in the checkpoint."""
        return CheckpointWeights(self)


class CheckpointWeights:
    """`tidegate.model.walk.Weights` read from a checkpoint, one tensor at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read from `checkpoint`, which must stay open."""
        self._where = checkpoint.where
        self._sources = checkpoint.sources
        self._prequantised = checkpoint.prequantised

    def linear(self, role: str) -> Linear:
        """See `tidegate.model.walk.Weights`."""
        source = self._sources[role]
        bias = self._bias(source)
        if source.tensor in self._prequantised:
            return self._prequantised[source.tensor].read(source.rows, bias)
        return DenseLinear(weight=self._weight(source), bias=bias)

    def vector(self, role: str) -> Array:
        """See `tidegate.model.walk.Weights`."""
        source = self._sources[role]
        values = self._read(source.tensor)
        return values + np.float32(source.plus) if source.plus else values

    def part(self, role: str, cut: Cut) -> Linear | None:
        """See `CutWeights`; None for a weight that is quantised already."""
        by_rows = self.by_rows(role)
        if by_rows is None:
            return None
        read, bias = by_rows
        weight = read_cut(lambda span: read(*span), self._rows(self._sources[role]), cut)
        if bias is not None and cut.rows is not None:
            bias = bias[slice(*cut.rows)]
        return DenseLinear(weight=weight, bias=bias)

    def stored(self, role: str, cut: Cut = WHOLE) -> StoredLinear | None:
        """See `HasStored`; None for a weight that is quantised, or stacked with others."""
        source = self._sources[role]
        if source.tensor in self._prequantised or source.index is not None:
            return None
        file = self._where[source.tensor]
        kind = file.entries[source.tensor].dtype
        if kind not in ("BF16", "F16"):
            return None
        bias = self._bias(source)
        if bias is not None and cut.rows is not None:
            bias = bias[slice(*cut.rows)]
        rows = source.rows or (0, self._rows(source))
        return read_stored(file, source.tensor, rows, cut, bias)

    def by_rows(self, role: str) -> tuple[Callable[[int, int], Array], Array | None] | None:
        """How to read some rows of a weight, first up to last, and its bias.

        None when the weight does not lie in the checkpoint as rows, and must be read whole.
        """
        source = self._sources[role]
        if source.tensor in self._prequantised:
            return None
        start = 0 if source.rows is None else source.rows[0]
        if source.index is not None:
            start += source.index * self._where[source.tensor].entries[source.tensor].shape[1]

        def read(first: int, after: int) -> Array:
            rows = (start + first, start + after)
            return self._read(source.tensor, rows, flat=True)

        return read, self._bias(source)

    def _rows(self, source: Source) -> int:
        """Rows of what a source takes of its tensor."""
        if source.rows is not None:
            return source.rows[1] - source.rows[0]
        shape = self._where[source.tensor].entries[source.tensor].shape
        return shape[0 if source.index is None else 1]

    def _bias(self, source: Source) -> Array | None:
        if source.bias is None:
            return None
        bias = self._read(source.bias)
        return bias if source.rows is None else bias[slice(*source.rows)]

    def _weight(self, source: Source) -> Array:
        if source.index is None:
            return self._read(source.tensor, source.rows)
        weight: Array = self._read(source.tensor, (source.index, source.index + 1))[0]
        return weight if source.rows is None else weight[slice(*source.rows)]

    def _read(self, name: str, rows: tuple[int, int] | None = None, *, flat: bool = False) -> Array:
        values = self._where[name].read(name, rows, flat=flat)
        if not is_finite(values):
            raise CheckpointError(f"{name}: holds numbers that are not finite")
        return values


_MODULE = ("type", "path")
_TEXT_MODULES = ("Transformer", "Pooling", "Normalize")
"""Kinds of `modules.json`, by the last word of their name, that an encoder can hold."""


def _sentence_transformers(folder: Path) -> dict[str, object]:
    """How token vectors become one, from the files that sentence-transformers keeps beside."""
    if not (folder / "modules.json").is_file():
        return {}
    found: dict[str, object] = {"normalize": False}
    for kind, path in _modules(folder / "modules.json"):
        if kind not in _TEXT_MODULES:
            allowed = ", ".join(_TEXT_MODULES)
            raise CheckpointError(f"modules.json: type = {kind!r}: must be one of {allowed}")
        if kind == "Pooling":
            found |= read_json_object(folder / path / "config.json")
        elif kind == "Normalize":
            # The list and not the folder decides: that is empty, and gets lost in an archive.
            found["normalize"] = True
    return found


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order; a folder is a plain name, or empty."""
    try:
        listed = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: is not JSON") from error
    found: list[tuple[str, str]] = []
    for module in listed if isinstance(listed, list) else [listed]:
        kind, place = (module.get(key) if isinstance(module, dict) else None for key in _MODULE)
        if (
            not isinstance(kind, str)
            or not isinstance(place, str)
            or Path(place).name != place
            or place == ".."
        ):
            raise CheckpointError(f"{path.name}: {module!r:.80}: must have a type and a path")
        found.append((kind.rpartition(".")[2], place))
    return found


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


def _where(files: Sequence[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """The file of every tensor, which must be in one only: two could differ."""
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in where:
                raise CheckpointError(f"{name}: is in {where[name].path.name} and {file.path.name}")
            where[name] = file
    return where


def _check_sources(
    arch: AnyArchitecture,
    sources: Mapping[str, Source],
    where: Mapping[str, SafetensorsFile],
    prequantised: Mapping[str, PrequantisedTensor],
) -> None:
    """Every role has a source, and every tensor the shape that its roles make up."""
    rows: dict[str, int] = {}
    stacked: dict[str, int] = {}
    takers = Counter(source.tensor for source in sources.values() if source.rows is not None)
    for source in sources.values():
        if source.rows is not None:
            rows[source.tensor] = max(rows.get(source.tensor, 0), source.rows[1])
        if source.index is not None:
            stacked[source.tensor] = max(stacked.get(source.tensor, 0), source.index + 1)
    for name, role in roles(arch).items():
        source = sources[name]
        expected = (rows.get(source.tensor, role.shape[0]), *role.shape[1:])
        if source.tensor in prequantised:
            _check_prequantised(prequantised[source.tensor], source, expected)
        else:
            whole = expected if source.index is None else (stacked[source.tensor], *expected)
            _check_shape(where, source.tensor, whole, may_have_more=takers[source.tensor] == 1)
        if source.bias is not None:
            # Quantisers write a bias of zeros to every layer, whatever the config says.
            if not role.bias and source.tensor not in prequantised:
                raise CheckpointError(f"{source.bias}: config.json says that there is no such bias")
            _check_shape(where, source.bias, expected[:1])
        elif role.bias:
            bias = source.tensor.removesuffix(".weight") + ".bias"
            raise CheckpointError(f"the checkpoint has no tensor {bias!r}: config.json asks for it")


def _check_nothing_is_left(
    arch: AnyArchitecture,
    sources: Mapping[str, Source],
    where: Mapping[str, SafetensorsFile],
    prequantised: Mapping[str, PrequantisedTensor],
) -> None:
    """Every tensor of the model is read by some role; one that is not would change its answers."""
    read = {source.tensor for source in sources.values()}
    read |= {source.bias for source in sources.values() if source.bias is not None}
    for name in where.keys() - read:
        beside = name.rpartition(".")[0] + ".weight" in prequantised
        if _matters(arch, name) and not beside:
            raise CheckpointError(f"{name}: is no part of a {arch.model_type} of this config.json")
    tied = isinstance(arch, Architecture) and arch.tied_head
    if tied and "lm_head.weight" in where:
        _check_head_is_tied(sources["embed"].tensor, where)


def _matters(arch: AnyArchitecture, name: str) -> bool:
    """Whether a tensor that no role reads would have a part in the answers."""
    if isinstance(arch, EncoderArchitecture):
        # Outside the layers lie heads for other tasks, and poolers that embeddings go without.
        return ".layer." in name
    # Early Llamas keep the frequencies that their config stands for.
    inside = name.startswith("model.") and not name.endswith("rotary_emb.inv_freq")
    return inside or name == "lm_head.bias"


def _check_head_is_tied(embed: str, where: Mapping[str, SafetensorsFile]) -> None:
    """A head that is saved although it is tied must be the embedding table."""
    head, rows = "lm_head.weight", where[embed].entries[embed].shape[0]
    _check_shape(where, head, where[embed].entries[embed].shape)
    for start in range(0, rows, _ROWS):
        part = (start, min(start + _ROWS, rows))
        if not np.array_equal(where[head].read(head, part), where[embed].read(embed, part)):
            raise CheckpointError(
                f"{head}: differs from {embed}, but config.json says tie_word_embeddings"
            )


def _check_prequantised(
    tensor: PrequantisedTensor, source: Source, expected: tuple[int, ...]
) -> None:
    if source.index is not None or tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.base}.qweight: stands for a weight {tensor.shape}: config.json asks for "
            f"{'all experts in one' if source.index is not None else expected}"
        )


def _check_shape(
    where: Mapping[str, SafetensorsFile],
    tensor: str,
    expected: tuple[int, ...],
    *,
    may_have_more: bool = False,
) -> None:
    """Compare a tensor's shape; with `may_have_more`, its rows may go on."""
    if tensor not in where:
        raise CheckpointError(f"the checkpoint has no tensor {tensor!r}")
    found = where[tensor].entries[tensor].shape
    more = may_have_more and found[1:] == expected[1:] and found[:1] > expected[:1]
    if found != expected and not more:
        raise CheckpointError(f"{tensor}: shape {found}: config.json asks for {expected}")
