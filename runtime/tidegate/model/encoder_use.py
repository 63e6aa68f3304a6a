"""How an encoder's outputs are to be read: what its classes' numbers mean, where vectors may end.

Both are facts of a checkpoint's config that the walk does not need. A bundle keeps those keys in a
file of its own, which is absent where the config says nothing. Trained with Matryoshka
representation learning (Kusupati et al. 2022, arXiv:2205.13147), a model's first values are a
smaller embedding; of any other model they are noise.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from tidegate.errors import CheckpointError
from tidegate.model.config import Config, flag
from tidegate.model.encoder import EncoderArchitecture

Scoring = Literal["softmax", "sigmoid", "none"]
"""One class of several, each class for itself, or numbers that are no probabilities."""

USE_FILE: Final = "encoder.json"
_KEYS: Final = ("problem_type", "is_matryoshka", "matryoshka_dimensions")
_PROBLEMS: dict[str, Scoring] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderUse:
    """See the module."""

    scoring: Scoring
    smaller_dimensions: Collection[int] = ()
    """Lengths below the model's own that its embeddings may be cut to."""


def usual_use(arch: EncoderArchitecture) -> EncoderUse:
    """Where a config says nothing: one label is a yes or no, several exclude each other."""
    return EncoderUse(scoring="sigmoid" if len(arch.labels) == 1 else "softmax")


def read_use(config: Config, arch: EncoderArchitecture) -> EncoderUse:
    """What a checkpoint's config says of it.

    Raises:
        CheckpointError: `problem_type` is unknown, or a Matryoshka dimension is none of the model.
    """
    problem = config.get("problem_type")
    scoring = usual_use(arch).scoring
    if arch.labels and problem is not None:
        if not isinstance(problem, str) or problem not in _PROBLEMS:
            allowed = ", ".join(_PROBLEMS)
            raise CheckpointError(
                f"config.json: problem_type = {problem!r:.80}: must be one of {allowed}"
            )
        scoring = _PROBLEMS[problem]
        if scoring == "softmax" and len(arch.labels) == 1:
            scoring = "sigmoid"  # of one class the softmax would always be 1
    assert scoring in get_args(Scoring)
    return EncoderUse(scoring=scoring, smaller_dimensions=_smaller(config, arch))


def _smaller(config: Config, arch: EncoderArchitecture) -> Collection[int]:
    """The keys are those that vLLM reads: `is_matryoshka`, or `matryoshka_dimensions`."""
    listed = config.get("matryoshka_dimensions")
    if listed is None:
        return range(1, arch.width) if flag(config, "is_matryoshka", False) else ()
    whole = listed if isinstance(listed, list) else [listed]
    fitting = [one for one in whole if type(one) is int and 1 <= one <= arch.width]
    if not fitting or len(fitting) < len(whole):
        raise CheckpointError(
            f"config.json: matryoshka_dimensions = {listed!r:.80}: must be from 1 to {arch.width}"
        )
    return tuple(sorted({one for one in fitting if one < arch.width}))


def write_use(config: Config, arch: EncoderArchitecture, folder: Path) -> None:
    """Keep what a config says of it in `folder`, if that is anything.

    Raises:
        CheckpointError: see `read_use`.
    """
    read_use(config, arch)
    found = {key: config[key] for key in _KEYS if config.get(key) is not None}
    if found:
        (folder / USE_FILE).write_text(json.dumps(found, sort_keys=True), encoding="utf-8")


def kept_use(folder: Path, arch: EncoderArchitecture) -> EncoderUse:
    """What `write_use` kept in `folder`, where it kept anything.

    Raises:
        CheckpointError: it is not what `write_use` writes.
    """
    try:
        kept = json.loads((folder / USE_FILE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{USE_FILE}: is not JSON") from error
    if not isinstance(kept, dict) or not set(kept) <= set(_KEYS):
        raise CheckpointError(f"{USE_FILE}: must be an object with some of {', '.join(_KEYS)}")
    return read_use(kept, arch)
