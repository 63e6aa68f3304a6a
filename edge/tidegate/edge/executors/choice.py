"""Opens the executor for a bundle: the one asked for, else the fastest that the bundle holds.

OpenVINO first: on x86-64 its paged graph prefills faster and gains more from several requests at
once (benchmarks/results/throughput.json; at one request a very small model is faster on ONNX
Runtime).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

from tidegate.edge.executors.kv_size import KvSize, kv_size
from tidegate.edge.executors.native import LAYOUT_VERSION, Native
from tidegate.edge.executors.onnx_providers import ProviderName, Providers
from tidegate.edge.executors.onnx_session import KvPrecision as OnnxPrecision
from tidegate.edge.executors.openvino_model import KvPrecision
from tidegate.edge.executors.settings import check_counts
from tidegate.engine.executor import Executor
from tidegate.errors import BundleError, ConfigError
from tidegate.model.bundle import Bundle
from tidegate.model.manifest import DeviceTarget

_log = logging.getLogger(__name__)

Choice = Literal["auto", "onnx", "openvino"]
_PREFERENCE: tuple[DeviceTarget, ...] = ("openvino", "onnx")
_LIBRARIES: dict[DeviceTarget, str] = {"openvino": "openvino", "onnx": "onnxruntime"}


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
    kv_precision: KvPrecision | None = None
    """Bits of keys and values; None for each executor's own choice. u8 is int8 of fixed scale on
    ONNX Runtime, which has no u4."""
    native: Native = "auto"
    """Whether the native layer multiplies packed weights, which it can on OpenVINO."""
    cache_dir: Path | None = None
    """For what a later start can use again; None for nowhere."""
    providers: tuple[ProviderName, ...] = ("cpu",)
    """Execution providers by preference. All but the CPU's are ONNX Runtime's, which `auto` then
    chooses."""
    kv_mib: int | None = None
    """Most that keys and values may take; None for rows times context."""

    def __post_init__(self) -> None:
        optional = ("context_tokens", "threads", "kv_mib")
        check_counts(self, always=("rows", "step_tokens"), optional=optional)
        if Providers(names=self.providers).accelerated and self.choice == "openvino":
            raise ConfigError("providers", list(self.providers), "cpu alone on OpenVINO")

    @property
    def accelerated(self) -> bool:
        """Whether anything but the CPU may run the model."""
        return Providers(names=self.providers).accelerated

    @property
    def runtime(self) -> Choice:
        """`choice`, as far as the providers leave one."""
        return "onnx" if self.accelerated else self.choice


def open_executor(bundle: Bundle, settings: ExecutorSettings) -> Executor:
    """Load the bundle's model into the executor that was asked for.

    Raises:
        BundleError: the bundle was not converted for it.
        ConfigError: the context is longer than the bundle's, its KV does not fit into `kv_mib`, or
            the executor cannot run a setting.
    """
    context = settings.context_tokens or bundle.manifest.context_tokens
    if context > bundle.manifest.context_tokens:
        allowed = f"at most the bundle's {bundle.manifest.context_tokens}"
        raise ConfigError("context_tokens", context, allowed)
    try:
        target = choose_target(bundle, settings.runtime)
        size = kv_size(bundle.manifest, target, settings)
        if (size.rows, size.context_tokens) != (settings.rows, context):
            found = f"{size.rows} rows of {size.context_tokens} tokens"
            _log.warning("kv_mib = %s leaves room for %s", settings.kv_mib, found)
        return _open(bundle, target, size, settings)
    except MemoryError as error:
        raise ConfigError("rows", settings.rows, "few enough for the KV to fit") from error


def _open(
    bundle: Bundle, target: DeviceTarget, size: KvSize, settings: ExecutorSettings
) -> Executor:
    folder, arch = bundle.target_folder(target), bundle.manifest.decoder
    # Imported here: a device installs only the runtime it uses.
    if target == "openvino":
        from tidegate.edge.executors.openvino import OpenVinoExecutor, OpenVinoSettings

        return OpenVinoExecutor(
            folder,
            arch,
            OpenVinoSettings(
                kv_tokens=size.kv_tokens,
                context_tokens=size.context_tokens,
                step_tokens=settings.step_tokens,
                step_rows=size.rows,
                threads=settings.threads,
                exact=settings.exact,
                kv_precision=settings.kv_precision,
                native=settings.native,
                tile_file=_tile_file(bundle, settings.cache_dir),
            ),
        )
    from tidegate.edge.executors.onnx import OnnxExecutor, OnnxSettings

    if settings.native == "on":
        raise ConfigError("native", "on", "auto or off on ONNX Runtime")

    return OnnxExecutor(
        folder,
        arch,
        OnnxSettings(
            slots=size.rows,
            context_tokens=size.context_tokens,
            step_tokens=settings.step_tokens,
            threads=settings.threads,
            exact=settings.exact,
            kv_precision=_onnx_precision(settings.kv_precision),
            providers=Providers(names=settings.providers),
        ),
    )


def _onnx_precision(asked: KvPrecision | None) -> OnnxPrecision | None:
    match asked:
        case None:
            return None
        case "f32":
            return "float32"
        case "f16":
            return "float16"
        case "u8":
            return "int8"
        case "u4":
            raise ConfigError("kv_precision", asked, "u8, f16 or f32 on ONNX Runtime")
        case _:
            assert_never(asked)


def _tile_file(bundle: Bundle, cache_dir: Path | None) -> Path | None:
    """Named after all that tiles follow from: the graph, its weights and the layout."""
    if cache_dir is None:
        return None
    files = bundle.manifest.files
    digests = [
        entry.sha256 for name, entry in sorted(files.items()) if name.startswith("openvino/")
    ]
    key = " ".join([f"layout {LAYOUT_VERSION}", *digests])
    return cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.tiles"


def choose_target(
    bundle: Bundle, choice: Choice, preference: tuple[DeviceTarget, ...] = _PREFERENCE
) -> DeviceTarget:
    """The target asked for, else the first of `preference` that bundle and installation hold.

    Raises:
        BundleError: the bundle holds none of `preference`.
        ConfigError: the library that would run the target is not installed.
    """
    held = [target for target in preference if target in bundle.manifest.targets]
    if choice != "auto":
        held = [choice]
    if not held:
        raise BundleError(f"{bundle.folder}: holds no target that a device can run")
    for target in held:
        if importlib.util.find_spec(_LIBRARIES[target]) is not None:
            return target
    missing = " or ".join(_LIBRARIES[target] for target in held)
    raise ConfigError("executor", choice, f"one whose library is installed: {missing} is not")
