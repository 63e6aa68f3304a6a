"""Encoder bundles behind `/v1/embeddings` and `/classify`, served by `api.encoder_model`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoder_model import (
    ClassifyingModel,
    EmbeddingModel,
    EncoderModel,
    ServedAs,
    check_kind,
    open_tokenizer,
)
from tidegate.edge.executors.encoder import EncoderSettings, open_encoder
from tidegate.engine.text_batches import BatchLimits
from tidegate.errors import BundleError, CheckpointError, TidegateError
from tidegate.model.bundle import Bundle
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.encoder_use import USE_FILE, EncoderUse, kept_use, usual_use

_Model = TypeVar("_Model", bound=EncoderModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderDoor:
    """How an encoder bundle is opened and served."""

    settings: EncoderSettings
    created_s: int
    wait_s: float = 0.0
    """See `BatchLimits.wait_s`."""
    trusted: frozenset[str] | None = None
    """Public keys of which one must have signed the bundle; None accepts any, or none."""
    metrics: EncoderMetrics | None = None


def open_embedder(folder: Path, door: EncoderDoor) -> EmbeddingModel:
    """Verify and load an encoder bundle.

    Raises:
        BundleError: it is damaged, is no encoder's, or makes labels and no embeddings.
        ConfigError: a setting is out of range.
    """
    return _open(folder, door, EmbeddingModel)


def open_classifier(folder: Path, door: EncoderDoor) -> ClassifyingModel:
    """Verify and load a classifier's bundle.

    Raises:
        BundleError: it is damaged, is no encoder's, or makes embeddings and no labels.
        ConfigError: a setting is out of range.
    """
    return _open(folder, door, ClassifyingModel)


def _open(folder: Path, door: EncoderDoor, kind: type[_Model]) -> _Model:
    bundle = Bundle.open(folder, trusted=door.trusted, every_target=False)
    encoder = open_encoder(bundle, door.settings)
    try:
        check_kind(bundle.manifest.model_id, encoder.arch, kind, BundleError)
        tokenizer = open_tokenizer(bundle.folder / "tokenizer.json")
        use = _use(bundle, encoder.arch)
    except TidegateError:
        encoder.close()
        raise
    served = ServedAs(
        model_id=bundle.manifest.model_id,
        created_s=door.created_s,
        limits=BatchLimits(
            rows=door.settings.batch_rows, tokens=door.settings.batch_tokens, wait_s=door.wait_s
        ),
        metrics=door.metrics,
    )
    return kind(encoder, tokenizer, use, served)


def _use(bundle: Bundle, arch: EncoderArchitecture) -> EncoderUse:
    """How its outputs are to be read; a file that no manifest vouches for says nothing."""
    if USE_FILE not in bundle.manifest.files:
        return usual_use(arch)
    try:
        return kept_use(bundle.folder, arch)
    except CheckpointError as error:
        raise BundleError(str(error)) from error
