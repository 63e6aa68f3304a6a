"""What a daemon needs in memory, part by part, before anything is loaded. Pure arithmetic.

Weights and KV follow from the manifest. What the runtimes add was measured as anonymous and file
pages of the process with models of 0.002, 0.5 and 1.1 B weights on both of them (x86-64), and is
rounded up: the sum is a bound to be within, not a prediction to the mebibyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from tidegate.edge.executors.choice import ExecutorSettings
from tidegate.edge.executors.kv_size import KvSize, kv_bytes_per_token, kv_precision, kv_size
from tidegate.edge.executors.openvino_model import KvPrecision
from tidegate.edge.executors.settings import STEP_LOGITS
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.manifest import DeviceTarget, Manifest

_MIB: Final = 1 << 20

_BASE_BYTES: Final = {"openvino": 136 * _MIB, "onnx": 116 * _MIB}
"""Python, our code, the HTTP server and the library: 127 and 108 MiB."""
_VOCAB_BYTES: Final = 300
"""Of the tokenizer, per token: 44 MB for 152 000."""
_PACKED_PART: Final = 0.12
"""What a runtime's own form of the weights takes more than theirs, float32 scales for one."""
_ACTIVATION_FLOATS: Final = 3
"""Buffers alive at once, in widths of a layer: 0.28 MB for a token of 1.1 B weights."""
_KEPT_PRECISIONS: Final[tuple[KvPrecision, ...]] = ("f32", "f16", "u8", "u4")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One line of the sum."""

    key: str
    """Its name in JSON."""
    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """The sum, as people and `/status` see it."""

    parts: tuple[MemoryPart, ...]

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return sum(part.nbytes for part in self.parts)

    def lines(self) -> str:
        """One line per part and the sum last, in MiB."""
        rows = [*self.parts, MemoryPart(key="sum_bytes", name="sum", nbytes=self.nbytes)]
        width = max(len(row.name) for row in rows)
        return "\n".join(f"  {row.name:<{width}} {_mib(row.nbytes):>8,} MiB" for row in rows)

    def to_json(self) -> dict[str, int]:
        """Bytes by name, and their sum."""
        return {part.key: part.nbytes for part in self.parts} | {"sum_bytes": self.nbytes}


def memory_need(
    manifest: Manifest,
    target: DeviceTarget,
    settings: ExecutorSettings,
    *,
    cache_bytes: int = 0,
    others: tuple[Manifest, ...] = (),
) -> MemoryNeed:
    """What serving a bundle takes.

    Args:
        manifest: of a decoder.
        target: what runs it.
        settings: sizes of the executor.
        cache_bytes: of answers, and of prefixes on their way to the disk.
        others: bundles that are loaded beside it, by their weights.
    """
    arch, size = manifest.decoder, kv_size(manifest, target, settings)
    precision, context = kv_precision(arch, target, settings), size.context_tokens
    kv = int(size.kv_tokens * kv_bytes_per_token(arch, target, precision))
    parts = [
        *weights_need(manifest.memory.weight_bytes).parts,
        MemoryPart(key="kv_bytes", name=f"KV, {_shape(size)} tokens in {precision}", nbytes=kv),
        MemoryPart(
            key="step_bytes",
            name=f"steps of {settings.step_tokens} tokens",
            nbytes=_step_bytes(arch, context, settings),
        ),
        MemoryPart(key="cache_bytes", name="answers and prefixes kept", nbytes=cache_bytes),
        MemoryPart(
            key="runtime_bytes",
            name="runtime, tokenizer and server",
            nbytes=_BASE_BYTES[target] + _VOCAB_BYTES * arch.vocab,
        ),
    ]
    beside = sum(int(one.memory.weight_bytes * (1 + _PACKED_PART)) for one in others)
    if others:
        parts.insert(
            2, MemoryPart(key="beside_bytes", name="weights of other bundles", nbytes=beside)
        )
    return MemoryNeed(parts=tuple(parts))


def check_memory(
    manifest: Manifest,
    target: DeviceTarget,
    settings: ExecutorSettings,
    *,
    need: MemoryNeed,
    budget_mib: int | None,
    available_bytes: int,
) -> None:
    """Raise `ConfigError`, the sum written out, unless `need` fits; it says what would fit.

    Args:
        manifest: of the decoder that `need` is of.
        target: what runs it.
        settings: of its executor.
        need: the whole daemon's.
        budget_mib: what the daemon may take; None for what is available.
        available_bytes: in the system now.
    """
    limit = available_bytes if budget_mib is None else min(budget_mib * _MIB, available_bytes)
    if need.nbytes <= limit:
        return
    setting, value = "memory_mib", budget_mib
    if budget_mib is None or available_bytes < budget_mib * _MIB:
        setting, value = "MiB of memory available", available_bytes // _MIB
    beside = need.nbytes - memory_need(manifest, target, settings).nbytes
    fitting = _fitting(manifest, target, settings, limit - beside)
    advice = "nothing smaller would fit" if fitting is None else f"this would fit: {fitting}"
    raise ConfigError(
        setting, value, f"at least {_mib(need.nbytes)}, which is\n{need.lines()}\n{advice}"
    )


def check_model(need: MemoryNeed, max_model_mib: int | None) -> None:
    """Raise `ConfigError`, the sum written out, if all weights take more than `max_model_mib`."""
    keys = ("weight_bytes", "packing_bytes", "beside_bytes")
    weights = MemoryNeed(parts=tuple(part for part in need.parts if part.key in keys))
    if max_model_mib is not None and weights.nbytes > max_model_mib * _MIB:
        allowed = f"at least {_mib(weights.nbytes)}, which is\n{weights.lines()}"
        raise ConfigError("max_model_mib", max_model_mib, allowed)


def weights_need(weight_bytes: int) -> MemoryNeed:
    """What a device takes for a model's weights alone."""
    packing = MemoryPart(
        key="packing_bytes",
        name="weights, packed by the runtime",
        nbytes=int(weight_bytes * _PACKED_PART),
    )
    weights = MemoryPart(key="weight_bytes", name="weights", nbytes=weight_bytes)
    return MemoryNeed(parts=(weights, packing))


def _shape(size: KvSize) -> str:
    whole = size.rows * size.context_tokens
    shape = f"{size.rows} x {size.context_tokens}"
    return shape if size.kv_tokens == whole else f"{size.kv_tokens} for {shape}"


def _step_bytes(arch: Architecture, context: int, settings: ExecutorSettings) -> int:
    chosen = [kind.experts.chosen * kind.experts.inner for kind in arch.kinds if kind.experts]
    widths = 2 * max([arch.inner, *chosen]) + 6 * arch.width
    activations = 4 * _ACTIVATION_FLOATS * settings.step_tokens * widths
    logits = 2 * 4 * max(settings.rows, STEP_LOGITS) * arch.vocab
    # A graph that caps scores holds those of a whole step.
    scores = 4 * settings.step_tokens * context * arch.heads if arch.attention_softcap else 0
    return activations + logits + scores


def _fitting(
    manifest: Manifest, target: DeviceTarget, settings: ExecutorSettings, limit: int
) -> str | None:
    """Flags of the nearest sizes that fit: the first of `_smaller` within the limit."""
    for smaller in _smaller(manifest, target, settings):
        try:
            need = memory_need(manifest, target, smaller)
        except ConfigError:
            continue  # such a context is more than the budget for KV
        if need.nbytes <= limit:
            flags = [f"--context {smaller.context_tokens}", f"--rows {smaller.rows}"]
            precision = kv_precision(manifest.decoder, target, smaller)
            if precision != kv_precision(manifest.decoder, target, settings):
                flags.append(f"--kv-precision {precision}")
            return " ".join(flags)
    return None


def _smaller(
    manifest: Manifest, target: DeviceTarget, settings: ExecutorSettings
) -> Iterator[ExecutorSettings]:
    """Smaller sizes, the most useful first: coarser KV, then fewer rows, then less context."""
    context = settings.context_tokens or manifest.context_tokens
    precision = kv_precision(manifest.decoder, target, settings)
    choices = [precision]
    if not settings.exact and manifest.decoder.attention_softcap is None:
        lower = _KEPT_PRECISIONS[_KEPT_PRECISIONS.index(precision) + 1 :]
        if target == "openvino":
            choices += lower
    while context >= 64:
        rows = settings.rows
        while rows >= 1:
            for one in choices:
                asked = settings.kv_precision if one == precision else one
                yield replace(settings, context_tokens=context, rows=rows, kv_precision=asked)
            rows //= 2
        context //= 2


def _mib(nbytes: int) -> int:
    return -(-nbytes // _MIB)
