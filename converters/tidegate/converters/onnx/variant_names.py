"""Which further ONNX graphs a bundle may hold, and what their files are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

from tidegate.errors import ConfigError

Variant = Literal["int8kv", "fp16"]

FILES: Mapping[Variant, str] = {"int8kv": "model.int8kv.onnx", "fp16": "model.fp16.onnx"}


def parse_variants(names: str) -> tuple[Variant, ...]:
    """Variants by name, separated by commas, each once; `ConfigError` names an unknown one."""
    known = get_args(Variant)
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found or any(name not in known for name in found):
        raise ConfigError("graphs", names, " or ".join(known) + ", or both with a comma")
    return cast(tuple[Variant, ...], found)
