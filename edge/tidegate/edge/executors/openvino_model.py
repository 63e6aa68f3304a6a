"""Reading and compiling a bundle's OpenVINO graph, and allocating its KV blocks.

The graph stands on an operation that is internal to OpenVINO, so it runs on the minor version that
wrote it and no other. Three things must be done after reading that nothing in the file says: the
CPU plugin is loaded first, because it registers the operation; the head counts are set again on
every attention, because they are not serialised; and the cache inputs get the shape and type that
the plugin chose when it compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tidegate.edge.executors.native import Native, NativeUnavailable, find_native
from tidegate.edge.executors.openvino_native import Swapped, swap_products
from tidegate.edge.executors.settings import check_counts
from tidegate.errors import BundleError, ConfigError
from tidegate.model.architecture import Architecture

OPENVINO = "2026.4"
"""The one minor version whose internal paged attention this code was tested with."""

BLOCK_TOKENS = 32
"""Fixed by the CPU plugin."""

_KEY_CACHE_INPUT = 3
"""Of `PagedAttentionExtension`; query, key and value come before."""

Library: TypeAlias = Any
"""An object of `openvino`, whose types mypy does not follow."""

_KERNEL_CACHE_ENTRIES = 256
"""Kernels kept for step shapes met before. Each new number of tokens makes about ten (0.6 MiB);
the default of 5000 grows for as long as new numbers come, and a miss costs 2 ms."""

_KEY_GROUP = 32
"""Values of a key that share a scale: some channels of keys are far larger than others."""

KvPrecision = Literal["u8", "u4", "f16", "f32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVinoSettings:
    """How an `OpenVinoExecutor` runs. Memory is fixed by the first four."""

    kv_tokens: int
    """Tokens of all requests that have KV at the same time, rounded up to blocks of 32."""
    context_tokens: int
    """Prompt plus answer of one request; at most the model's context."""
    step_tokens: int
    """Tokens of all rows of one step."""
    step_rows: int
    """Rows of one step."""
    threads: int | None = None
    """None leaves the number to OpenVINO, which takes the physical cores."""
    kv_precision: KvPrecision | None = None
    """u8 and u4 are scaled dynamically: keys per 32 values of a token, values per token. None for
    the smallest that loses little: u8, or f16 if the model caps attention scores, where the graph
    reads the cache itself and can read no other than f16 and f32."""
    exact: bool = False
    """Float32 activations and KV, whatever `kv_precision`: slower, and equal to the reference."""
    native: Native = "auto"
    """Whether the native layer multiplies the packed weights; never where `exact` is set."""
    native_folder: Path | None = None
    """Where its files are; None for the installed package."""
    tile_file: Path | None = None
    """Where the tiles of the native layer are kept, see `native_tiles`; the name must follow from
    the model's bytes. None for memory. There is no cache of compiled graphs: OpenVINO's holds all
    weights again, takes twice the time of compiling to read (1.1 B weights: 3.7 s of CPU against
    1.8), and weights are repacked in the first step with it as without."""


def check_settings(settings: OpenVinoSettings, arch: Architecture) -> None:
    """Raise `ConfigError` naming the first setting that is out of range."""
    check_counts(settings, always=("kv_tokens", "step_tokens", "step_rows"), optional=("threads",))
    if not 1 <= settings.context_tokens <= arch.context:
        allowed = f"from 1 to the model's context of {arch.context}"
        raise ConfigError("context_tokens", settings.context_tokens, allowed)
    if arch.attention_softcap is not None and settings.kv_precision in ("u8", "u4"):
        allowed = "f16 or f32 for a model that caps attention scores"
        raise ConfigError("kv_precision", settings.kv_precision, allowed)
    if settings.exact and settings.native == "on":
        raise ConfigError("native", "on", "auto or off with exact arithmetic")


def check_library(version: str) -> None:
    """Raise `ConfigError` unless `version` is one that can run the graphs, such as `2026.4.1`."""
    if _minor(version) != OPENVINO:
        raise ConfigError("openvino", version, f"version {OPENVINO}.*")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Graph:
    """A compiled graph and what it stands on."""

    compiled: Library
    linear: str
    """See `ExecutorFacts.linear`."""
    swapped: Swapped | None
    """The native layer if it runs; its tiles must outlive `compiled`."""
    again: Callable[[int], Library]
    """Compiles the same graph for so many threads."""


def compile_graph(path: Path, arch: Architecture, settings: OpenVinoSettings) -> Graph:
    """Read `model.xml` and compile it for the CPU.

    Raises:
        ConfigError: another minor version of OpenVINO is installed, or the native layer is asked
            for and cannot run.
        BundleError: the graph cannot be read or compiled, was written by another minor version,
            or is not of this architecture.
    """
    import openvino

    check_library(str(openvino.__version__))
    core = openvino.Core()
    core.get_versions("CPU")
    try:
        model = core.read_model(path)
    except Exception as error:
        raise BundleError(f"{path}: OpenVINO cannot read it: {error}") from error
    _check_writer(path, model)
    _check_signature(path, model, arch)
    try:
        _set_head_counts(model, arch)
        linear, swapped = _choose_linear(model, core, settings)
        properties = _properties(model, arch, settings)
        compiled = core.compile_model(model, "CPU", properties)
    except ConfigError:
        raise
    except Exception as error:
        raise BundleError(f"{path}: OpenVINO cannot compile it: {error}") from error

    def again(threads: int) -> Library:
        return core.compile_model(model, "CPU", properties | {"INFERENCE_NUM_THREADS": threads})

    return Graph(compiled=compiled, linear=linear, swapped=swapped, again=again)


def _choose_linear(
    model: Library, core: Library, settings: OpenVinoSettings
) -> tuple[str, Swapped | None]:
    """Swap the native layer in if it can run; which path the products take, and why."""
    if settings.exact or settings.native == "off":
        asked = "exact arithmetic" if settings.exact else "it"
        return f"openvino, because {asked} was asked for", None
    try:
        native = find_native(openvino_release(), settings.native_folder)
        if settings.native == "auto" and not native.fast:
            raise NativeUnavailable("it has no fast path for this processor")
        swapped = swap_products(model, core, native, settings.tile_file)
    except NativeUnavailable as why:
        if settings.native == "on":
            raise ConfigError("native", "on", f"auto or off here: {why}") from why
        return f"openvino; the native layer does not run: {why}", None
    rest = "" if swapped.native == swapped.products else ", openvino for the others"
    share = f"{swapped.native} of {swapped.products} products"
    return f"native {native.path}, {share}{rest}", swapped


def openvino_release() -> str:
    """The installed OpenVINO, such as `2026.4.1`."""
    import openvino

    return str(openvino.__version__).partition("-")[0]


def allocate_kv(compiled: Library, blocks: int) -> dict[str, Library]:
    """Zeroed tensors [blocks, ...] for the graph's cache inputs, by name."""
    import openvino

    tensors: dict[str, Library] = {}
    for item in compiled.inputs:
        name = item.get_any_name()
        if name.startswith(("key_cache.", "value_cache.")):
            block_shape = [size.get_length() for size in list(item.get_partial_shape())[1:]]
            shape = openvino.Shape([blocks, *block_shape])
            tensors[name] = openvino.Tensor(item.get_element_type(), shape)
            # Writing touches the pages: memory that is not there shows now and not in a request.
            tensors[name].data[...] = 0
    return tensors


def kv_precision(arch: Architecture, settings: OpenVinoSettings) -> KvPrecision:
    """The precision that the settings come down to."""
    if settings.exact:
        return "f32"
    default: KvPrecision = "u8" if arch.attention_softcap is None else "f16"
    return settings.kv_precision or default


def _properties(
    model: Library, arch: Architecture, settings: OpenVinoSettings
) -> dict[str, object]:
    properties = cpu_properties(model, threads=settings.threads, exact=settings.exact)
    properties["KV_CACHE_PRECISION"] = kv_precision(arch, settings)
    # Keys in groups of one token, like values. By default they are scaled per channel of a block,
    # again with every token that joins it: answers then change with how their prompt was cut, and
    # a draft that is taken back leaves its mark.
    properties["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
    if arch.head_size % _KEY_GROUP == 0:
        properties["KEY_CACHE_GROUP_SIZE"] = _KEY_GROUP
    return properties


def cpu_properties(model: Library, *, threads: int | None, exact: bool) -> dict[str, object]:
    """How to compile any of our graphs; arguments as in `OpenVinoSettings`."""
    properties: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        # A pinned thread waits for its core when the device is busy with something else: median
        # decode step 21 ms instead of 13 on a machine with other work.
        "ENABLE_CPU_PINNING": False,
        # Otherwise bfloat16 where the CPU has it, and the tokens would depend on the machine; a
        # decode step takes the same time, a prefill up to 15 % more (Zen 4, two threads).
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if exact else _activation_group(model),
        "CPU_RUNTIME_CACHE_CAPACITY": _KERNEL_CACHE_ENTRIES,
    }
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    return properties


def _activation_group(model: Library) -> int:
    """Activations that share a scale: 64 is fastest, and must not exceed the weights' group.

    With weights in groups of 32 and 64 here, the plugin silently multiplies floats (measured:
    the time of group size 0).
    """
    smallest = int(_fact(model, "smallest_group") or 0)
    return 64 if smallest % 64 == 0 else 32


def _check_writer(path: Path, model: Library) -> None:
    writer = _fact(model, "openvino")
    if writer is None or _minor(writer) != OPENVINO:
        raise BundleError(
            f"{path}: written by OpenVINO {writer or 'of unknown version'}: must be {OPENVINO}.*"
        )


def _fact(model: Library, name: str) -> str | None:
    """What the exporter noted in the graph under `tidegate/name`."""
    where = ["tidegate", name]
    return str(model.get_rt_info(where).astype(str)) if model.has_rt_info(where) else None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _attentions(model: Library) -> dict[int, Library]:
    """The attention node of every layer, which its key cache is named after."""
    return {
        int(node.input_value(_KEY_CACHE_INPUT).get_any_name().rpartition(".")[2]): node
        for node in model.get_ops()
        if node.get_type_name() == "PagedAttentionExtension"
    }


def _set_head_counts(model: Library, arch: Architecture) -> None:
    for layer, node in _attentions(model).items():
        spec, facts = arch.attention(layer), node.get_rt_info()
        facts["num_k_heads"] = facts["num_v_heads"] = spec.kv_heads
        facts["k_head_size"] = facts["v_head_size"] = spec.head_size


def _check_signature(path: Path, model: Library, arch: Architecture) -> None:
    """The plugin trusts the head counts it is told, so compare them with the graph first."""
    found = {
        layer: [node.get_input_partial_shape(place)[1].get_length() for place in range(3)]
        for layer, node in _attentions(model).items()
    }
    expected = {
        spec.layer: [heads * spec.head_size for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        for spec in map(arch.attention, range(arch.layers))
    }
    vocab = model.output("logits").get_partial_shape()[1].get_length()
    if found != expected or vocab != arch.vocab:
        raise BundleError(f"{path}: it is not a graph of the manifest's architecture")
