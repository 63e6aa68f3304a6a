"""A checkpoint as a replica needs it, whole, and as a front does, its text side alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tidegate.cloud.executor_choice import open_executor
from tidegate.cloud.ray.settings import RaySettings
from tidegate.engine.engine import Engine
from tidegate.engine.executor import Executor
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.text_files import write_text_files


def open_engine(settings: RaySettings) -> tuple[Engine, Executor]:
    """The engine of a replica, and its executor, which the caller closes.

    Raises:
        CheckpointError: the checkpoint is damaged or of an unknown kind.
        ConfigError: a size is out of range.
    """
    with Checkpoint.open(settings.checkpoint) as checkpoint:
        executor = open_executor(checkpoint.decoder, checkpoint.weights(), settings.executor)
    engine = Engine(
        executor,
        load_text(settings.checkpoint, executor.limits.context_tokens),
        model_id=settings.model_id,
        settings=EngineSettings(most_waiting=settings.most_ongoing, shared_guesses=False),
    )
    return engine, executor


def load_text(checkpoint: Path, context_tokens: int) -> TextModel:
    """The text side of a checkpoint, without its weights.

    Raises:
        CheckpointError: it is damaged or of an unknown kind.
    """
    with (
        Checkpoint.open(checkpoint) as opened,
        tempfile.TemporaryDirectory(prefix="tidegate-text-") as folder,
    ):
        write_text_files(opened, Path(folder))
        return TextModel.load(Path(folder), context_tokens=context_tokens)
