"""A model as a replica needs it, whole, and as a front does, its text side alone."""

from __future__ import annotations

from tidegate.cloud.executor_choice import open_executor
from tidegate.cloud.model_source import open_source
from tidegate.cloud.ray.settings import RaySettings
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel


def open_engine(settings: RaySettings) -> tuple[Engine, Executor]:
    """The engine of a replica, and its executor, which the caller closes.

    Raises:
        BundleError: the bundle is damaged, not trusted, or was converted for devices only.
        CheckpointError: the checkpoint is damaged or of an unknown kind.
        ConfigError: a size is out of range.
    """
    with open_source(settings.model, trusted=settings.trusted) as source:
        executor = open_executor(source.arch, source.weights, settings.executor)
        text = source.text(context_tokens=executor.limits.context_tokens)
    engine = Engine(
        executor,
        text,
        model_id=settings.model_id,
        settings=EngineSettings(most_waiting=settings.most_ongoing, shared_guesses=False),
    )
    return engine, executor


def load_text(settings: RaySettings, context_tokens: int) -> TextModel:
    """The text side of the same model.

    Raises:
        BundleError: as for `open_engine`.
        CheckpointError: as for `open_engine`.
    """
    with open_source(settings.model, trusted=settings.trusted) as source:
        return source.text(context_tokens=context_tokens)
