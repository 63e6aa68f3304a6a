"""Opens the executor for a bundle: the one asked for, else the fastest that the bundle holds.

OpenVINO first: on x86-64 its paged graph prefills faster and gains more from several requests at
once (benchmarks/results/throughput.json; at one request a very small model is faster on ONNX
Runtime).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidegate.edge.executors.settings import check_counts
from tidegate.engine.executor import Executor
from tidegate.errors import BundleError, ConfigError
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import Target

Choice = Literal["auto", "onnx", "openvino"]
_PREFERENCE: tuple[Target, ...] = ("openvino", "onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorSettings:
    """Sizes that hold for either executor; all memory follows from them."""

    choice: Choice = "auto"
    context_tokens: int | None = None
    """Prompt plus answer of one request; the bundle's own limit when None."""
    rows: int = 4
    """Requests that run at once; each has room for a whole context."""
    step_tokens: int = 256
    threads: int | None = None
    exact: bool = False
    """Float activations and KV, for comparing; several times slower."""

    def __post_init__(self) -> None:
        check_counts(self, always=("rows", "step_tokens"), optional=("context_tokens", "threads"))


def open_executor(bundle: Bundle, settings: ExecutorSettings) -> Executor:
    """Load the bundle's model into the executor that was asked for.

    Raises:
        BundleError: the bundle was not converted for it.
        ConfigError: the context is longer than the bundle's.
    """
    context = settings.context_tokens or bundle.manifest.context_tokens
    if context > bundle.manifest.context_tokens:
        allowed = f"at most the bundle's {bundle.manifest.context_tokens}"
        raise ConfigError("context_tokens", context, allowed)
    try:
        return _open(bundle, choose_target(bundle, settings.choice), context, settings)
    except MemoryError as error:
        raise ConfigError("rows", settings.rows, "few enough for the KV to fit") from error


def _open(bundle: Bundle, target: Target, context: int, settings: ExecutorSettings) -> Executor:
    folder, arch = bundle.target_folder(target), bundle.manifest.decoder
    # Imported here: a device installs only the runtime it uses.
    if target == "openvino":
        from tidegate.edge.executors.openvino import OpenVinoExecutor, OpenVinoSettings

        return OpenVinoExecutor(
            folder,
            arch,
            OpenVinoSettings(
                kv_tokens=context * settings.rows,
                context_tokens=context,
                step_tokens=settings.step_tokens,
                step_rows=settings.rows,
                threads=settings.threads,
                exact=settings.exact,
            ),
        )
    from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings

    return OnnxExecutor(
        folder,
        arch,
        OnnxSettings(
            slots=settings.rows,
            context_tokens=context,
            step_tokens=settings.step_tokens,
            threads=settings.threads,
            exact=settings.exact,
        ),
    )


def choose_target(
    bundle: Bundle, choice: Choice, preference: tuple[Target, ...] = _PREFERENCE
) -> Target:
    """The target asked for, else the first of `preference` that the bundle holds."""
    if choice != "auto":
        return choice
    for target in preference:
        if target in bundle.manifest.targets:
            return target
    raise BundleError(f"{bundle.folder}: holds no target that a device can run")
