"""What the encoders of the BERT family share: tasks, labels, pooling, and how weights are named.

Whether a checkpoint makes embeddings or classifies shows in its config's `architectures`. How
token vectors become one is not in the config at all: sentence-transformers keeps it in files
beside, which `Checkpoint.open` puts into `config["sentence_transformers"]`. Without them it is the
mean, which that library too takes for a bare checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tidegate.errors import CheckpointError
from tidegate.model import llama_like
from tidegate.model.config import Config, flag, positive_int
from tidegate.model.encoder import EncoderArchitecture, Pooling
from tidegate.model.registry import Source

_HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")
"""Classes that hold an encoder for embeddings; a head that guesses words is not part of it."""

_CLASSIFIER = "ForSequenceClassification"

# Far above any model, far below what fills a memory.
MOST_LAYERS, _MOST_LABELS = 4096, 1 << 20

_POOLINGS: dict[str, Pooling] = {"mean": "mean", "cls": "cls"}

_OLD_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""The spelling of pooling before sentence-transformers had one key for it."""


def read_labels(config: Config, family: str) -> tuple[str, ...]:
    """Names of the classes in order; empty for an encoder that makes embeddings.

    Args:
        config: its `architectures` decide, and `id2label` has the names.
        family: how the names of its classes begin, such as `Bert`.

    Raises:
        CheckpointError: the checkpoint is of another task, or labels are missing.
    """
    listed = config.get("architectures") or [family + "Model"]
    tasks = [f"{family}{task}" for task in (*_HEADLESS, _CLASSIFIER)]
    if not isinstance(listed, list) or len(listed) != 1 or listed[0] not in tasks:
        raise CheckpointError(
            f"config.json: architectures = {listed!r:.80}: must be one of {', '.join(tasks)}"
        )
    if listed[0] != family + _CLASSIFIER:
        return ()
    names = config.get("id2label")
    if names is None:
        count = positive_int(config, "num_labels", 2, most=_MOST_LABELS)
        return tuple(f"LABEL_{label}" for label in range(count))
    found = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else []
    labels = tuple(name for name in found if isinstance(name, str))
    if not labels or len(labels) != len(found):
        raise CheckpointError(
            f"config.json: id2label = {names!r:.80}: must have a name for each of 0, 1, 2, ..."
        )
    return labels


def read_pooling(config: Config, labels: Collection[str]) -> tuple[Pooling, bool]:
    """How token vectors become one, and whether that is scaled to length 1.

    Raises:
        CheckpointError: pooling is neither the mean nor the first token.
    """
    if labels:
        return "cls", False
    found = config.get("sentence_transformers", {})
    if not isinstance(found, Mapping):
        raise CheckpointError(f"sentence_transformers = {found!r:.80}: must be an object")
    normalised = flag(found, "normalize", False)
    if not flag(found, "include_prompt", True):
        raise CheckpointError("1_Pooling/config.json: include_prompt = False: must be true")
    modes = [key for key, value in found.items() if key.startswith("pooling_mode_") and value]
    named = found.get("pooling_mode", [])
    modes += [str(mode) for mode in (named if isinstance(named, list) else [named])]
    pooling = [_POOLINGS.get(_OLD_FLAGS.get(mode, mode)) for mode in modes or ["mean"]]
    if len(set(pooling)) != 1 or pooling[0] is None:
        allowed = ", ".join([*_POOLINGS, *_OLD_FLAGS])
        raise CheckpointError(f"1_Pooling/config.json: {modes}: must be one of {allowed}")
    return pooling[0], normalised


def served_context(config: Config, context: int | None) -> int:
    """The context to serve: the wanted one, or all of the learned positions."""
    longest = positive_int(config, "max_position_embeddings", 512)
    if context is not None and not 1 <= context <= longest:
        raise CheckpointError(f"context = {context}: must be from 1 to the model's {longest}")
    return context or longest


def check_heads(arch: EncoderArchitecture) -> EncoderArchitecture:
    """The architecture; raise `CheckpointError` unless its heads divide its width."""
    if arch.width % arch.heads:
        raise CheckpointError(
            f"config.json: {arch.heads} attention heads: must divide the width {arch.width}"
        )
    return arch


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderNames:
    """How the checkpoints of a family name their tensors, by role."""

    prefix: str
    """What a checkpoint with a head puts before the encoder's names, such as `bert.`."""
    once: Mapping[str, str]
    """Of the encoder: tables and the norm behind them."""
    layer: str
    """Before the number of a layer, such as `encoder.layer`."""
    parts: Mapping[str, str]
    """Of a layer."""


def encoder_sources(
    arch: EncoderArchitecture,
    names: EncoderNames,
    heads: Mapping[str, str],
    present: Collection[str],
) -> dict[str, Source]:
    """Sources of an encoder, whose names may have the prefix, and of `heads`, which never have."""
    start = names.prefix if any(name.startswith(names.prefix) for name in present) else ""
    full = {role: start + name for role, name in names.once.items()}
    for number in range(arch.layers):
        for role, name in names.parts.items():
            full[f"layers.{number}.{role}"] = f"{start}{names.layer}.{number}.{name}"
    found: dict[str, Source] = {}
    for role, name in (full | dict(heads)).items():
        if role.endswith("norm"):
            weight, bias = _norm_names(name, present)
            found |= {role: Source(tensor=weight), f"{role}.bias": Source(tensor=bias)}
        else:
            rows = (0, arch.context) if role == "positions" else None
            found[role] = llama_like.linear(name, present, rows=rows)
    return found


def _norm_names(name: str, present: Collection[str]) -> tuple[str, str]:
    """Scale and shift of a layer norm; checkpoints converted from TensorFlow say gamma and beta."""
    if f"{name}.gamma" in present:
        return f"{name}.gamma", f"{name}.beta"
    return f"{name}.weight", f"{name}.bias"
