"""All models of a service in one pool: those that make text, and the encoders beside them."""

from __future__ import annotations

from dataclasses import replace

from tidegate.cloud.encoder import chosen_device
from tidegate.cloud.encoders import (
    EncoderInMemory,
    EncoderModels,
    EncodersSettings,
    NamedCheckpoint,
)
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.model_pool import ModelPool
from tidegate.cloud.model_settings import Kind, ModelSettings, PoolSettings
from tidegate.cloud.pooled_model import Maker, ModelFacts

Served = LanguageModel | EncoderInMemory
Models = ModelPool[Served]


class ServedModels:
    """`tidegate.cloud.pooled_model.Maker` of both."""

    def __init__(self, text: Maker[LanguageModel], encoders: EncoderModels) -> None:
        """Make each kind as its own maker does."""
        self._text, self._encoders = text, encoders

    def describe(self, settings: ModelSettings) -> ModelFacts:
        """See `Maker.describe`."""
        maker: Maker[Served] = self._text if settings.kind == "text" else self._encoders
        return maker.describe(settings)

    def load(self, settings: ModelSettings, facts: ModelFacts) -> Served:
        """See `Maker.load`."""
        maker: Maker[Served] = self._text if settings.kind == "text" else self._encoders
        return maker.load(settings, facts)


def with_encoders(models: PoolSettings, settings: EncodersSettings) -> PoolSettings:
    """The settings of one pool of both; models that make text come first.

    Encoders are loaded by the first call that names them. On a CUDA device they are loaded at
    start: an executor that was given no size takes nine tenths of what it finds free there.

    Raises:
        ConfigError: a name is another model's, or there is no such device.
    """
    if not settings.names:
        return models
    at_start = chosen_device(settings.encoder.device).type == "cuda"
    kinds: tuple[tuple[Kind, tuple[NamedCheckpoint, ...]], ...] = (
        ("vectors", settings.embedders),
        ("labels", settings.classifiers),
    )
    encoders = [
        ModelSettings(
            name=source.name, path=source.path, kind=kind, load="start" if at_start else "first-use"
        )
        for kind, sources in kinds
        for source in sources
    ]
    return replace(models, models=(*models.models, *encoders))
