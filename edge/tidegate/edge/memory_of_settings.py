"""The memory that a daemon's settings come to, known before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tidegate.edge.executors.choice import choose_target
from tidegate.edge.machine import read_machine
from tidegate.edge.memory import MemoryNeed, check_memory, check_model, memory_need
from tidegate.edge.prefix_store import MOST_QUEUED_BYTES
from tidegate.edge.settings import EdgeSettings
from tidegate.errors import BundleError
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import MAX_MANIFEST_BYTES, Manifest

_MIB: Final = 1 << 20


def check_settings(bundle: Bundle, settings: EdgeSettings) -> MemoryNeed:
    """What all parts will take.

    Raises:
        BundleError: a bundle beside the main one is none.
        ConfigError: it is more than the daemon, or its models, may have.
    """
    target = choose_target(bundle, settings.executor.runtime)
    queued = 0 if settings.prefix_cache is None else MOST_QUEUED_BYTES
    answers = (1 if settings.semantic_cache is None else 2) * settings.answer_cache_mib * _MIB
    beside = [settings.draft, settings.embedder, settings.classifier]
    need = memory_need(
        bundle.manifest,
        target,
        settings.executor,
        cache_bytes=queued + answers,
        others=tuple(_peek(folder) for folder in beside if folder is not None),
    )
    check_model(need, settings.max_model_mib)
    check_memory(
        bundle.manifest,
        target,
        settings.executor,
        need=need,
        budget_mib=settings.memory_mib,
        available_bytes=read_machine().available_bytes,
    )
    return need


def _peek(folder: Path) -> Manifest:
    """The manifest of a bundle that will be verified when it is opened."""
    try:
        with (folder / "manifest.json").open("rb") as file:
            return Manifest.from_bytes(file.read(MAX_MANIFEST_BYTES + 1))
    except OSError as error:
        raise BundleError(f"{folder}: is not a bundle: {error.strerror}") from error
