"""Encoders of checkpoints beside the language model: opened by name, batched by load, closed.

`peek_encoder` says what one will take before any of it is loaded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from tidegate.api.backend import ModelCard
from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoder_model import (
    ClassifyingModel,
    EmbeddingModel,
    EncoderModel,
    ServedAs,
    check_kind,
    longest_run_s,
    open_tokenizer,
)
from tidegate.api.encoders import Encoders
from tidegate.cloud.encoder import TorchEncoder, TorchEncoderSettings, encoder_memory
from tidegate.cloud.gpu_memory import MemorySum
from tidegate.cloud.model_settings import PoolSettings
from tidegate.engine.text_batches import BatchLimits
from tidegate.errors import CheckpointError, ConfigError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.encoder_use import EncoderUse, read_use
from tidegate.model.text_files import write_text_files

_Model = TypeVar("_Model", bound=EncoderModel)
_MIB: Final = 1 << 20
ATTENTION_PADDING: Final = 256
"""Torch pads for attention alone: at 256 tokens a ninth of all-MiniLM's work (S / 6 width)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedCheckpoint:
    """A model id, and the folder with config.json, tokenizer.json and safetensors."""

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodersSettings:
    """All encoders of a service.

    Raises:
        ConfigError: two have one name, or a value is out of range.
    """

    embedders: tuple[NamedCheckpoint, ...] = ()
    classifiers: tuple[NamedCheckpoint, ...] = ()
    encoder: TorchEncoderSettings = field(default_factory=TorchEncoderSettings)
    wait_s: float = 0.0
    """See `BatchLimits.wait_s`."""

    def __post_init__(self) -> None:
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("name", name, "a name that no other encoder has")
        self.limits()

    @property
    def names(self) -> list[str]:
        """Of all of them."""
        return [one.name for one in (*self.embedders, *self.classifiers)]

    def limits(self) -> BatchLimits:
        """Of each encoder's batches."""
        return BatchLimits(
            rows=self.encoder.batch_rows,
            tokens=self.encoder.batch_tokens,
            wait_s=self.wait_s,
            padding_tokens=ATTENTION_PADDING,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFacts:
    """What is known of an encoder before it is loaded."""

    card: ModelCard
    arch: EncoderArchitecture
    use: EncoderUse
    memory: MemorySum


def peek_encoder(source: NamedCheckpoint, settings: EncodersSettings) -> EncoderFacts:
    """Read the heads of a checkpoint's files, and none of its weights.

    Raises:
        CheckpointError: it is damaged, or no encoder.
    """
    with _opened(source) as (checkpoint, arch):
        return _facts(source, checkpoint, arch, settings)


def open_embedder(
    source: NamedCheckpoint, settings: EncodersSettings, metrics: EncoderMetrics | None = None
) -> EmbeddingModel:
    """Load an encoder that makes embeddings; the caller closes it.

    Raises:
        CheckpointError: it is damaged, no encoder, or a classifier.
        ConfigError: there is no such device.
    """
    return _open(source, settings, metrics, EmbeddingModel)


def open_classifier(
    source: NamedCheckpoint, settings: EncodersSettings, metrics: EncoderMetrics | None = None
) -> ClassifyingModel:
    """Load an encoder that makes labels; the caller closes it.

    Raises:
        CheckpointError: it is damaged, no encoder, or makes embeddings.
        ConfigError: there is no such device.
    """
    return _open(source, settings, metrics, ClassifyingModel)


def room_beside(models: PoolSettings, settings: EncodersSettings) -> PoolSettings:
    """The settings of the models beside encoders, which stay in memory and come out of the budget.

    Raises:
        CheckpointError: an encoder's checkpoint is damaged, or is none.
        ConfigError: a name is another model's, or the encoders leave nothing of the budget.
    """
    adapters = [adapter.name for model in models.models for adapter in model.adapters]
    taken = {*adapters, *(model.name for model in models.models)}
    for name in settings.names:
        if name in taken:
            raise ConfigError("name", name, "a name that no other model of the service has")
    if models.models_mib is None or not settings.names:
        return models
    sources = (*settings.embedders, *settings.classifiers)
    need_bytes = sum(peek_encoder(source, settings).memory.nbytes for source in sources)
    left_mib = models.models_mib - -(-need_bytes // _MIB)
    if left_mib < 1:
        allowed = f"more than the {models.models_mib - left_mib} of the encoders"
        raise ConfigError("models_mib", models.models_mib, allowed)
    return replace(models, models_mib=left_mib)


def open_encoders(settings: EncodersSettings, stack: AsyncExitStack) -> Encoders:
    """Load all of them; `stack` closes them.

    Raises:
        CheckpointError: one is damaged or of another kind.
        ConfigError: there is no such device.
    """
    metrics = EncoderMetrics()
    embedders, classifiers = [], []
    for source in settings.embedders:
        embedders.append(open_embedder(source, settings, metrics))
        stack.callback(embedders[-1].close)
    for source in settings.classifiers:
        classifiers.append(open_classifier(source, settings, metrics))
        stack.callback(classifiers[-1].close)
    return Encoders(
        embedders=embedders,
        classifiers=classifiers,
        route="cloud",
        metrics=metrics,
        busy_s=partial(longest_run_s, (*embedders, *classifiers)),
    )


def _open(
    source: NamedCheckpoint,
    settings: EncodersSettings,
    metrics: EncoderMetrics | None,
    kind: type[_Model],
) -> _Model:
    with _opened(source) as (checkpoint, arch):
        check_kind(source.name, arch, kind, CheckpointError)
        facts = _facts(source, checkpoint, arch, settings)
        with tempfile.TemporaryDirectory(prefix="tidegate-text-") as folder:
            write_text_files(checkpoint, Path(folder))
            tokenizer = open_tokenizer(Path(folder) / "tokenizer.json")
        encoder = TorchEncoder(arch, checkpoint.weights(), settings.encoder)
    served = ServedAs(
        model_id=source.name,
        created_s=facts.card.created_s,
        limits=settings.limits(),
        metrics=metrics,
    )
    return kind(encoder, tokenizer, facts.use, served)


@contextmanager
def _opened(source: NamedCheckpoint) -> Iterator[tuple[Checkpoint, EncoderArchitecture]]:
    with Checkpoint.open(source.path) as checkpoint:
        arch = checkpoint.architecture
        if not isinstance(arch, EncoderArchitecture):
            raise CheckpointError(
                f"{source.name}: config.json: model_type = {arch.model_type!r}: makes text, and "
                "neither embeddings nor labels"
            )
        yield checkpoint, arch


def _facts(
    source: NamedCheckpoint,
    checkpoint: Checkpoint,
    arch: EncoderArchitecture,
    settings: EncodersSettings,
) -> EncoderFacts:
    card = ModelCard(id=source.name, created_s=int(time.time()), context_tokens=arch.context)
    return EncoderFacts(
        card=card,
        arch=arch,
        use=read_use(checkpoint.config, arch),
        memory=encoder_memory(arch, settings.encoder),
    )
