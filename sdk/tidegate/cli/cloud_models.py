"""Which models `tidegate cloud` serves: those of its flags and of its file's `[[model]]` tables."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidegate.cli.executor_flags import read_executor
from tidegate.cli.settings_file import Options, check_keys, shown
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.model_settings import AdapterSettings, ModelSettings, PoolSettings

EXECUTOR_KEYS: Final = (
    "context",
    "executor",
    "rows",
    "threads",
    "step-tokens",
    "memory-mib",
    "kv-precision",
    "activations",
    "int8-activations",
    "deterministic",
    "tensor-parallel",
)
_TEXTS: Final = ("name", "path", "load")
_NUMBERS: Final = ("queue-limit", "most-adapters")
MODEL_KEYS: Final = (*_TEXTS, *_NUMBERS, "adapter", *EXECUTOR_KEYS)
ADAPTER_KEYS: Final = ("name", "path", "sha256")


def add_models(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="MODEL",
        help="folder with config.json and safetensors, or a bundle of `convert --target packed`",
    )
    parser.add_argument("--name", help="model id to serve it under (default: the folder's name)")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a further model, loaded when it is first asked for; may be given several times",
    )
    parser.add_argument(
        "--models-mib",
        type=int,
        help="what several models may take together; idle ones make room (default: nine tenths of"
        " what is available at start)",
    )
    parser.add_argument(
        "--load-wait",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long a call may wait for a model to be loaded (default 120)",
    )
    parser.add_argument(
        "--load-queue",
        type=int,
        default=64,
        metavar="N",
        help="how many calls may wait for one model to be loaded (default 64)",
    )
    parser.add_argument(
        "--update",
        choices=("beside", "drain-first"),
        default="beside",
        help="how SIGHUP replaces models that changed: the new version loaded beside the old one,"
        " or after it has gone (default beside)",
    )


def read_models(
    args: argparse.Namespace,
    tables: object,
    options: Options,
    folder: Path,
) -> PoolSettings:
    """All models, those of the command line first.

    Args:
        args: as resolved; flags of the executor are the defaults of every model.
        tables: what the file has under `model`; None for nothing.
        options: reads values of a model's own.
        folder: that the file's paths are relative to.

    Raises:
        ConfigError: a key is unknown, a value not allowed, or there is no model.
    """
    from tidegate.cloud.model_settings import ModelSettings, PoolSettings

    named: list[tuple[str, Path]] = []
    if args.checkpoint is not None:
        named.append((args.name or args.checkpoint.resolve().name, args.checkpoint))
    elif args.name is not None:
        raise ConfigError("name", args.name, "absent without MODEL; others are named with theirs")
    named += [_named(one) for one in args.model]
    models = [
        ModelSettings(
            name=name, path=path, executor=read_executor(args), load=_load(None, first=not place)
        )
        for place, (name, path) in enumerate(named)
    ]
    for table in _tables("model", tables):
        models.append(_model(table, args, options, folder, first=not models))
    if not models:
        raise ConfigError("model", None, "a MODEL, --model NAME=PATH, or [[model]] in --config")
    return PoolSettings(
        models=tuple(models),
        models_mib=args.models_mib,
        most_waiting=args.load_queue,
        load_wait_s=args.load_wait,
        drain_s=max(1.0, args.drain),
    )


def model_lines(models: Sequence[ModelSettings]) -> Iterator[str]:
    """The models as TOML, with what holds for each."""
    for model in models:
        yield "\n[[model]]"
        values: dict[str, object] = {
            "name": model.name,
            "path": model.path,
            "load": model.load,
            "queue-limit": model.queue_limit,
            "most-adapters": model.most_adapters,
            "executor": model.executor.choice,
            "context": model.executor.context_tokens,
        }
        for key in EXECUTOR_KEYS[2:]:
            values[key] = getattr(model.executor, key.replace("-", "_"))
        yield from (f"{key} = {shown(one)}" for key, one in values.items() if one is not None)
        for adapter in model.adapters:
            yield "\n[[model.adapter]]"
            yield from (
                f"{key} = {shown(getattr(adapter, key))}"
                for key in ADAPTER_KEYS
                if getattr(adapter, key) is not None
            )


def _model(
    table: Mapping[str, Any],
    args: argparse.Namespace,
    options: Options,
    folder: Path,
    *,
    first: bool,
) -> ModelSettings:
    from tidegate.cloud.model_settings import ModelSettings

    check_keys(table, MODEL_KEYS, "a [[model]]'s")
    own = copy.copy(args)
    for key in EXECUTOR_KEYS:
        if key in table:
            setattr(own, options.dest(key), options.read(key, table[key], folder))
    for key in _NUMBERS:
        if key in table and type(table[key]) is not int:
            raise ConfigError(key, table[key], "a whole number")
    numbers = {key.replace("-", "_"): table[key] for key in _NUMBERS if key in table}
    return ModelSettings(
        name=_text(table, "name", "[[model]]"),
        path=folder / _text(table, "path", "[[model]]"),
        executor=read_executor(own),
        load=_load(table.get("load"), first=first),
        adapters=tuple(_adapter(one, folder) for one in _tables("adapter", table.get("adapter"))),
        **numbers,
    )


def _adapter(table: Mapping[str, Any], folder: Path) -> AdapterSettings:
    from tidegate.cloud.model_settings import AdapterSettings

    check_keys(table, ADAPTER_KEYS, "a [[model.adapter]]'s")
    where = "[[model.adapter]]"
    return AdapterSettings(
        name=_text(table, "name", where),
        path=folder / _text(table, "path", where),
        sha256=_text(table, "sha256", where) if "sha256" in table else None,
    )


def _load(value: Any, *, first: bool) -> Any:
    """The first model is there from the start, and others when they are asked for."""
    return value or ("start" if first else "first-use")


def _tables(key: str, value: object) -> list[Mapping[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ConfigError(key, value, f"tables, [[{key}]]")
    return value


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{where} {key}", value, "a text")
    return value


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ConfigError("model", text, "NAME=PATH")
    return name, Path(path)
