"""Encoders of checkpoints beside the language model: opened by name, batched by load, closed.

`EncoderModels` makes them for a pool. `peek_encoder` says what one will take before it is loaded.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoder_model import (
    ClassifyingModel,
    EmbeddingModel,
    EncoderModel,
    ServedAs,
    check_kind,
    open_tokenizer,
)
from tidegate.cloud.encoder import (
    TorchEncoder,
    TorchEncoderSettings,
    chosen_device,
    encoder_memory,
)
from tidegate.cloud.gpu_memory import MemorySum
from tidegate.cloud.language_model import version_of
from tidegate.cloud.model_settings import Kind, ModelSettings
from tidegate.cloud.pooled_model import ModelFacts
from tidegate.engine.text_batches import BatchLimits
from tidegate.errors import CheckpointError, ConfigError
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.encoder_use import EncoderUse, read_use
from tidegate.model.text_files import write_text_files

_Model = TypeVar("_Model", bound=EncoderModel)
_LOOK_S: Final = 0.02
_KINDS: Final[Mapping[Kind, type[EncoderModel]]] = {
    "vectors": EmbeddingModel,
    "labels": ClassifyingModel,
}
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

    arch: EncoderArchitecture
    use: EncoderUse
    memory: MemorySum


def peek_encoder(source: NamedCheckpoint, settings: EncodersSettings) -> EncoderFacts:
    """Read the heads of a checkpoint's files, and none of its weights.

    Raises:
        CheckpointError: it is damaged, or no encoder.
    """
    with _opened(source) as (checkpoint, arch):
        return _facts(checkpoint, arch, settings)


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


class EncoderInMemory:
    """`tidegate.cloud.pooled_model.PooledModel`: an encoder that was opened."""

    def __init__(self, model: EncoderModel) -> None:
        """Keep `model`, which is this object's from now on."""
        self.model = model

    async def run(self) -> None:
        """See `PooledModel.run`: it works when it is asked."""
        await asyncio.Event().wait()

    async def probe(self) -> None:
        """See `PooledModel.probe`: one token."""
        await self.model.outputs(((0,),))

    async def drain(self, timeout_s: float) -> bool:
        """See `PooledModel.drain`; who still waits when it is closed is told to ask again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.model.batcher.idle:
                    await asyncio.sleep(_LOOK_S)
        return self.model.batcher.idle

    def close(self) -> None:
        """See `PooledModel.close`."""
        self.model.close()


class EncoderModels:
    """`tidegate.cloud.pooled_model.Maker` of checkpoints of encoders."""

    def __init__(self, settings: EncodersSettings, metrics: EncoderMetrics | None = None) -> None:
        """Make encoders as `settings` say, counted in `metrics`."""
        self._settings, self._metrics = settings, metrics

    def describe(self, settings: ModelSettings) -> ModelFacts:
        """See `Maker.describe`.

        Raises:
            CheckpointError: it is damaged, no encoder, or one of the other kind.
            ConfigError: there is no such device.
        """
        source = NamedCheckpoint(name=settings.name, path=settings.path)
        facts = peek_encoder(source, self._settings)
        check_kind(source.name, facts.arch, _KINDS[settings.kind], CheckpointError)
        on_gpu = chosen_device(self._settings.encoder.device).type == "cuda"
        return ModelFacts(
            context_tokens=facts.arch.context,
            place="gpu" if on_gpu else "host",
            memory=facts.memory,
            version=version_of(settings.path, settings.kind, self._settings.encoder),
            encoder=facts,
        )

    def load(self, settings: ModelSettings, facts: ModelFacts) -> EncoderInMemory:
        """See `Maker.load`; raises what `describe` does."""
        source = NamedCheckpoint(name=settings.name, path=settings.path)
        kind = _KINDS[settings.kind]
        return EncoderInMemory(_open(source, self._settings, self._metrics, kind))


def _open(
    source: NamedCheckpoint,
    settings: EncodersSettings,
    metrics: EncoderMetrics | None,
    kind: type[_Model],
) -> _Model:
    with _opened(source) as (checkpoint, arch):
        check_kind(source.name, arch, kind, CheckpointError)
        use = read_use(checkpoint.config, arch)
        with tempfile.TemporaryDirectory(prefix="tidegate-text-") as folder:
            write_text_files(checkpoint, Path(folder))
            tokenizer = open_tokenizer(Path(folder) / "tokenizer.json")
        encoder = TorchEncoder(arch, checkpoint.weights(), settings.encoder)
    served = ServedAs(
        model_id=source.name,
        created_s=int(time.time()),
        limits=settings.limits(),
        metrics=metrics,
    )
    return kind(encoder, tokenizer, use, served)


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
    checkpoint: Checkpoint,
    arch: EncoderArchitecture,
    settings: EncodersSettings,
) -> EncoderFacts:
    return EncoderFacts(
        arch=arch,
        use=read_use(checkpoint.config, arch),
        memory=encoder_memory(arch, settings.encoder),
    )
