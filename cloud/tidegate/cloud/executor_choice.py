"""Opens the executor that the cloud runs on: the one asked for, else a GPU where there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

import torch

from tidegate.cloud.gpu_settings import ActivationType, GpuSettings
from tidegate.cloud.model_source import Origin
from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings
from tidegate.engine.executor import Executor
from tidegate.errors import ConfigError
from tidegate.kernels.paged_kv import KvPrecision
from tidegate.model.architecture import Architecture
from tidegate.model.walk import Weights

Choice = Literal["auto", "torch", "gpu"]

_GPU: Final = GpuSettings()
_TORCH: Final = TorchSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorSettings:
    """Sizes of either executor; None leaves one to the executor's own default."""

    choice: Choice = "auto"
    context_tokens: int | None = None
    """Prompt plus answer of one request; None for what the model can."""
    rows: int | None = None
    """Requests of one step."""
    threads: int | None = None
    """Torch alone."""
    step_tokens: int | None = None
    memory_mib: int | None = None
    """GPU alone, like all that follow; see `GpuSettings`."""
    kv_precision: KvPrecision | None = None
    activations: ActivationType | None = None
    int8_activations: bool | None = None
    deterministic: bool | None = None
    tensor_parallel: int | None = None
    """Processes that run the model together, each on a device of its own; see `tensor_parallel`."""

    def __post_init__(self) -> None:
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise ConfigError("tensor_parallel", self.tensor_parallel, "at least 1, or absent")
        if self.context_tokens is not None and self.context_tokens < 1:
            raise ConfigError("context_tokens", self.context_tokens, "at least 1, or absent")


@runtime_checkable
class Watched(Protocol):
    """What an `Executor` of several processes offers besides."""

    async def watch(self) -> None:
        """Until cancelled.

        Raises:
            TidegateError: it cannot go on, nor can the service.
        """


def open_executor(
    arch: Architecture,
    weights: Weights,
    settings: ExecutorSettings,
    *,
    origin: Origin | None = None,
) -> Executor:
    """Load the model into the executor that was asked for.

    Args:
        arch: the model.
        weights: may be closed afterwards.
        settings: which executor, and its sizes.
        origin: where they come from, for `tensor_parallel`; what comes back is `Watched` then.

    Raises:
        ConfigError: a size is wrong, the executor does not have a setting, or there is no GPU.
        UnavailableError: another process could not load its part of the model.
    """
    if settings.tensor_parallel not in (None, 1):
        if origin is None:
            allowed = "absent where the weights are no files that others could read"
            raise ConfigError("tensor_parallel", settings.tensor_parallel, allowed)
        from tidegate.cloud.tensor_parallel import open_team

        return open_team(arch, weights, settings, origin)
    if chosen(settings.choice) == "gpu":
        only_without(settings, "gpu", ("threads",))
        # Triton's default changes with 3.10, and 3.9 warns as long as nothing is said.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        # Imported here: a cloud on torch goes without Triton.
        from tidegate.cloud.gpu_executor import GpuExecutor

        return GpuExecutor(arch, weights, gpu_settings(settings))
    only_without(
        settings,
        "torch",
        ("memory_mib", "kv_precision", "activations", "int8_activations", "deterministic"),
    )
    return TorchExecutor(arch, weights, torch_settings(settings, arch))


def chosen(choice: Choice) -> Literal["torch", "gpu"]:
    """What runs here.

    Raises:
        ConfigError: a GPU was asked for and torch finds none.
    """
    found = torch.cuda.is_available()
    if choice == "gpu" and not found:
        raise ConfigError("executor", choice, "torch or auto where torch finds no CUDA device")
    return "gpu" if found and choice != "torch" else "torch"


def torch_settings(settings: ExecutorSettings, arch: Architecture) -> TorchSettings:
    """With the torch executor's own defaults for what is left open."""
    rows, step_tokens = settings.rows, settings.step_tokens
    return TorchSettings(
        slots=_TORCH.slots if rows is None else rows,
        context_tokens=settings.context_tokens or arch.context,
        step_tokens=_TORCH.step_tokens if step_tokens is None else step_tokens,
        threads=settings.threads,
    )


def gpu_settings(settings: ExecutorSettings) -> GpuSettings:
    """With the GPU executor's own defaults for what is left open."""
    rows, step_tokens = settings.rows, settings.step_tokens
    return GpuSettings(
        rows=_GPU.rows if rows is None else rows,
        context_tokens=settings.context_tokens,
        step_tokens=_GPU.step_tokens if step_tokens is None else step_tokens,
        memory_mib=settings.memory_mib,
        activations=settings.activations or _GPU.activations,
        kv_precision=settings.kv_precision or _GPU.kv_precision,
        int8_activations=bool(settings.int8_activations),
        deterministic=bool(settings.deterministic),
    )


def only_without(settings: ExecutorSettings, executor: str, names: tuple[str, ...]) -> None:
    """Refuse settings that `executor` does not have."""
    for name in names:
        if getattr(settings, name) is not None:
            raise ConfigError(name, getattr(settings, name), f"absent on executor {executor}")
