"""What a service is told of the models that it serves: names, places, sizes, when to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tidegate.api.schema import MODEL_CHARS
from tidegate.cloud.executor_choice import ExecutorSettings
from tidegate.errors import ConfigError

Load = Literal["start", "first-use"]
"""When a model is loaded first."""
Kind = Literal["text", "vectors", "labels"]
"""What a model makes; the latter two are encoders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSettings:
    """A LoRA adapter, served under a name of its own."""

    name: str
    path: Path
    """A folder as PEFT writes it."""
    sha256: str | None = None
    """Of its two files, one after the other; None takes the files as they are."""

    def __post_init__(self) -> None:
        check_name(self.name)
        digest = self.sha256
        if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise ConfigError("sha256", digest, "64 lower-case hex digits, or absent")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """One model.

    Raises:
        ConfigError: a name or a size is out of range.
    """

    name: str
    path: Path
    """A checkpoint's folder, or a bundle's with the packed target."""
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)
    kind: Kind = "text"
    load: Load = "start"
    queue_limit: int = 256
    """Requests that may wait for the engine, once it is loaded."""
    adapters: tuple[AdapterSettings, ...] = ()
    most_adapters: int = 4
    """Adapters in memory at once; of more, the least recently used one makes room."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.load not in get_args(Load):
            raise ConfigError("load", self.load, f"one of {', '.join(get_args(Load))}")
        for name in ("queue_limit", "most_adapters"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSettings:
    """All models of a service, and what they share.

    Raises:
        ConfigError: there is no model, or two have one name.
    """

    models: tuple[ModelSettings, ...]
    """The first one answers calls that name none."""
    models_mib: int | None = None
    """Memory that they may take together. None: unbounded for one model, and for several nine
    tenths of what is available at start."""
    most_waiting: int = 64
    """Calls that may wait for one model to be loaded."""
    load_wait_s: float = 120.0
    """A call waits so long for a model at most, half of it for others to become idle."""
    drain_s: float = 30.0
    """Calls to a version that was replaced may go on for so long."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models", "none", "at least one")
        check_names(self.models)
        for name in ("most_waiting", "load_wait_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "more than 0")
        if self.models_mib is not None and self.models_mib < 1:
            raise ConfigError("models_mib", self.models_mib, "at least 1, or absent")


def check_name(name: str) -> None:
    """Refuse what could not be named in a call, or shown in a line."""
    if not 0 < len(name) <= MODEL_CHARS or not name.isprintable():
        raise ConfigError("name", name, f"1 to {MODEL_CHARS} printable characters")


def check_names(models: Sequence[ModelSettings]) -> None:
    """Refuse a name that two have, models and adapters together.

    Raises:
        ConfigError: names it.
    """
    seen = set[str]()
    names = [model.name for model in models]
    names += [adapter.name for model in models for adapter in model.adapters]
    for name in names:
        if name in seen:
            raise ConfigError("name", name, "one that no other model or adapter has")
        seen.add(name)
