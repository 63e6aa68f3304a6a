"""Execution providers of ONNX Runtime as settings: names in order of preference, typed options.

Only the CPU's runs in this project's tests. CUDA and TensorRT are chosen by the same list on boards
whose ONNX Runtime has them: they get the float16 graph, and what they cannot run falls to the next
of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tidegate.errors import ConfigError

ProviderName = Literal["cpu", "cuda", "tensorrt"]

_LIBRARY_NAMES: dict[ProviderName, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def installed_providers() -> tuple[ProviderName, ...]:
    """Those of our names that the installed ONNX Runtime has; none where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    available = onnxruntime.get_available_providers()
    return tuple(name for name, library in _LIBRARY_NAMES.items() if library in available)


SessionProvider = str | tuple[str, dict[str, str]]
"""As `onnxruntime.InferenceSession` takes one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Providers:
    """Which providers run the graph, the first that can, and how."""

    names: tuple[ProviderName, ...] = ("cpu",)
    device: int = 0
    """Which GPU, for CUDA and TensorRT."""
    tensorrt_fp16: bool = True
    """Let TensorRT choose float16 kernels."""
    tensorrt_cache: Path | None = None
    """An existing folder for built engines, which take minutes; None builds them at each start."""

    def __post_init__(self) -> None:
        known = get_args(ProviderName)
        if not self.names or any(name not in known for name in self.names):
            raise ConfigError("providers", list(self.names), "some of " + ", ".join(known))
        if len(set(self.names)) < len(self.names):
            raise ConfigError("providers", list(self.names), "a list that names each once")
        if self.device < 0:
            raise ConfigError("providers.device", self.device, "at least 0")
        if self.tensorrt_cache is not None and not self.tensorrt_cache.is_dir():
            cache = str(self.tensorrt_cache)
            raise ConfigError("providers.tensorrt_cache", cache, "an existing folder")

    @property
    def accelerated(self) -> bool:
        """Whether anything but the CPU may run the graph."""
        return self.names != ("cpu",)

    def for_session(self, available: Sequence[str]) -> list[SessionProvider]:
        """The providers with their options, as a session takes them.

        Args:
            available: what this build of ONNX Runtime has, by its names.

        Raises:
            ConfigError: one is not available; the library itself would leave it out.
        """
        for name in self.names:
            if _LIBRARY_NAMES[name] not in available:
                there = [one for one, library in _LIBRARY_NAMES.items() if library in available]
                raise ConfigError("providers", name, "one of " + ", ".join(there))
        return [self._with_options(name) for name in self.names]

    def _with_options(self, name: ProviderName) -> SessionProvider:
        library, options = _LIBRARY_NAMES[name], {"device_id": str(self.device)}
        if name == "cpu":
            return library
        if name == "tensorrt":
            options["trt_fp16_enable"] = str(self.tensorrt_fp16)
            if self.tensorrt_cache is not None:
                options["trt_engine_cache_enable"] = "True"
                options["trt_engine_cache_path"] = str(self.tensorrt_cache)
        return library, options
