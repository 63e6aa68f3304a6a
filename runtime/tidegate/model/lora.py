"""LoRA adapters as PEFT writes them: a folder's config and matrices, checked against a model.

A LoRA (Hu et al. 2021, arXiv:2106.09685) keeps two thin matrices for a linear layer, and the layer
becomes `W + scale * B @ A` with `scale = alpha / r`, or `alpha / sqrt(r)` with `use_rslora`. The
folder holds `adapter_config.json` and `adapter_model.safetensors` with the names

    base_model.model.<path of the layer>.lora_A.weight    [r, in]
    base_model.model.<path of the layer>.lora_B.weight    [out, r]

and, when a head was trained, that layer's own weight again as `base_layer.weight`. What would be
left out is refused by name: other kinds of adapters, settings that are not known, and tensors that
belong to no layer of the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from tidegate.errors import CheckpointError
from tidegate.model.checkpoint import read_json_object
from tidegate.model.config import Config, flag, positive_float, positive_int
from tidegate.model.packed import Array
from tidegate.model.registry import Source
from tidegate.model.safetensors_file import SafetensorsFile

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

Number = TypeVar("Number", int, float)

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_BASE = ".base_layer.weight"

_UNDERSTOOD = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    ]
)
"""Where it was trained, and which layers: those are the ones that have tensors."""

_MUST_BE: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other ways of starting (pissa, olora, loftq, ...) change the base weights too.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The numbers of an adapter's config."""

    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    """By pattern over the paths of layers; the first that matches counts."""
    alphas: Mapping[str, float]

    def rank_of(self, path: str) -> int:
        """The rank of a layer."""
        return _by_pattern(self.ranks, path, self.rank)

    def scale(self, path: str) -> float:
        """The factor on `B @ A` of a layer."""
        rank = self.rank_of(path)
        alpha = _by_pattern(self.alphas, path, self.alpha)
        return alpha / (float(np.sqrt(rank)) if self.rank_stabilised else rank)


def read_lora_config(config: Config) -> LoraConfig:
    """Read a parsed `adapter_config.json`.

    Raises:
        CheckpointError: a setting is wrong, or one that changes the result is not known here;
            the message names it.
    """
    try:
        return _read(config)
    except CheckpointError as error:
        # The look-ups are made for config.json and begin with its name.
        raise CheckpointError(f"adapter_{error}") from error


def _read(config: Config) -> LoraConfig:
    for key, value in {"peft_type": None, **config}.items():
        if key in _MUST_BE:
            if value not in _MUST_BE[key]:
                raise _refuse(key, value, " or ".join(map(repr, _MUST_BE[key])))
        elif key not in _UNDERSTOOD and key not in _WITHOUT_EFFECT and value:
            raise _refuse(key, value, "absent: what it does cannot be merged")
    return LoraConfig(
        rank=positive_int(config, "r"),
        alpha=positive_float(config, "lora_alpha"),
        rank_stabilised=flag(config, "use_rslora", False),
        ranks={key: positive_int(found, key) for key, found in _patterns(config, "rank_pattern")},
        alphas={
            key: positive_float(found, key) for key, found in _patterns(config, "alpha_pattern")
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDelta:
    """What an adapter adds to one role: names of its matrices, and its rows of a fused layer."""

    a: str
    b: str
    base: str | None
    """What they are added to, where the adapter brings it; otherwise the model's weight."""
    scale: float
    rows: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LowRank:
    """What one layer adds to its output: `b @ (a @ x)`; a [r, in], b [out, r] with the scale."""

    a: Array
    b: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """An open adapter. Use it as a context manager: it holds an open file."""

    folder: Path
    config: LoraConfig
    file: SafetensorsFile
    sha256: str
    """Of both files, one after the other."""

    @classmethod
    def open(cls, folder: Path, *, sha256: str | None = None) -> Self:
        """Open an adapter folder.

        Args:
            folder: as PEFT writes it.
            sha256: that its two files must have, one after the other; compared before anything of
                them is parsed. None for any.

        Raises:
            CheckpointError: a file is missing or damaged or not the one that was meant, or the
                adapter is of a kind that cannot be used; the message names the file or setting.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is not a folder with an adapter")
        found = _digest(folder)
        if sha256 is not None and found != sha256:
            raise CheckpointError(f"{folder}: its files have the digest {found}: must be {sha256}")
        config = read_lora_config(read_json_object(folder / CONFIG_FILE))
        file = SafetensorsFile(folder / WEIGHTS_FILE)
        return cls(folder=folder.resolve(), config=config, file=file, sha256=found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def deltas(self, sources: Mapping[str, Source]) -> dict[str, LayerDelta]:
        """Which role of a model each pair of matrices is for.

        Args:
            sources: where each role lies in the checkpoint that the adapter was trained for.

        Raises:
            CheckpointError: a tensor belongs to no layer, or has a wrong shape.
        """
        left = dict(self.file.entries)
        found: dict[str, LayerDelta] = {}
        for role, source in sources.items():
            path = source.tensor.removesuffix(".weight")
            names = (_PREFIX + path + _A, _PREFIX + path + _B)
            if source.index is not None or not set(names) <= self.file.entries.keys():
                continue
            base = _PREFIX + path + _BASE
            for name in (*names, base):
                left.pop(name, None)
            rank = self.config.rank_of(path)
            for name, place in zip(names, (0, 1), strict=True):
                shape = self.file.entries[name].shape
                if len(shape) != 2 or shape[place] != rank:
                    raise CheckpointError(f"{name}: shape {shape}: must have rank {rank}")
            found[role] = LayerDelta(
                a=names[0],
                b=names[1],
                base=base if base in self.file.entries else None,
                scale=self.config.scale(path),
                rows=source.rows,
            )
        if left or not found:
            named = ", ".join(sorted(left)[:4]) + (" and more" if len(left) > 4 else "")
            raise CheckpointError(
                f"{WEIGHTS_FILE}: belongs to no linear layer of the model: {named or 'no tensor'}"
            )
        return found

    def checked(
        self, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, LayerDelta]:
        """As `deltas`, for adding to what layers give while the model runs.

        Args:
            sources: as for `deltas`.
            shapes: [out, in] of each role's weight.

        Raises:
            CheckpointError: as for `deltas`, and for what can only be merged: a whole weight of its
                own, the embedding, experts.
        """
        found = self.deltas(sources)
        for role, delta in found.items():
            if delta.base is not None:
                raise CheckpointError(f"{delta.base}: replaces a weight: must be merged")
            if role == "embed" or ".experts." in role:
                raise CheckpointError(f"{delta.a}: is for {role}: must be merged")
            rows = None if delta.rows is None else delta.rows[1]
            outputs = self.file.entries[delta.b].shape[0]
            fits = outputs == shapes[role][0] if rows is None else outputs >= rows
            inputs = self.file.entries[delta.a].shape[1]
            if not fits or inputs != shapes[role][1]:
                raise CheckpointError(
                    f"{delta.b}: is for a weight {(outputs, inputs)}: {role} is {shapes[role]}"
                )
        return found

    def low_ranks(self, deltas: Mapping[str, LayerDelta]) -> dict[str, LowRank]:
        """The matrices of every role, the scale in `b`.

        Raises:
            CheckpointError: one holds numbers that are not finite.
        """
        found = {}
        for role, delta in deltas.items():
            a, b = self.file.read(delta.a), self.file.read(delta.b, delta.rows)
            for name, values in ((delta.a, a), (delta.b, b)):
                if not np.isfinite(values).all():
                    raise CheckpointError(f"{name}: holds numbers that are not finite")
            found[role] = LowRank(a=a, b=b * np.float32(delta.scale))
        return found


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with (folder / name).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            reason = error.strerror or "cannot be read"
            raise CheckpointError(f"{name}: {reason} (looked in {folder})") from error
    return digest.hexdigest()


def _patterns(config: Config, key: str) -> Iterator[tuple[str, Config]]:
    """The patterns at `key`, each with the object that it is a key of."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise _refuse(key, found, "an object")
    for pattern in found:
        try:
            re.compile(_at_the_end(pattern))
        except re.error as error:
            raise _refuse(key, pattern, "regular expressions") from error
        yield pattern, found


def _by_pattern(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    """The number of the first pattern that matches the end of a path, from a whole name on."""
    for pattern, value in patterns.items():
        if re.match(_at_the_end(pattern), path):
            return value
    return default


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _refuse(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} = {value!r:.80}: must be {allowed}")
