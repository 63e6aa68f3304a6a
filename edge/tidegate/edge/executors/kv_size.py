"""How much KV an executor gets: rows and context that fit into a budget, and their bytes.

OpenVINO pages its KV, so that a budget below rows times context only means that not all of them can
be long at once. ONNX Runtime gives every row a slot of a whole context, so there the budget takes
rows away. Only when not even one context fits is the context shortened, and only if nobody asked
for its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture
from tidegate.model.manifest import DeviceTarget, Manifest

if TYPE_CHECKING:
    from tidegate.edge.executors.choice import ExecutorSettings
    from tidegate.edge.executors.openvino_model import KvPrecision

_MIB: Final = 1 << 20
_BLOCK: Final = 32
"""Tokens of OpenVINO's blocks; contexts that a budget shortens end on one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvSize:
    """What an executor allocates."""

    rows: int
    context_tokens: int
    """Of one request."""
    kv_tokens: int
    """Of all requests together."""


def kv_size(manifest: Manifest, target: DeviceTarget, settings: ExecutorSettings) -> KvSize:
    """The rows, context and tokens that `settings` come to.

    Args:
        manifest: of a decoder.
        target: what runs it.
        settings: whose `kv_mib` is the budget; without one everything fits.

    Raises:
        ConfigError: the budget is too small for the context that was asked for, or for any.
    """
    rows, context = settings.rows, settings.context_tokens or manifest.context_tokens
    whole = KvSize(rows=rows, context_tokens=context, kv_tokens=rows * context)
    if settings.kv_mib is None:
        return whole
    precision = kv_precision(manifest.decoder, target, settings)
    each = kv_bytes_per_token(manifest.decoder, target, precision)
    fitting = int(settings.kv_mib * _MIB / each)
    if whole.kv_tokens <= fitting:
        return whole
    if fitting < context:
        short = fitting // _BLOCK * _BLOCK
        if settings.context_tokens is not None or not short:
            tokens = context if settings.context_tokens is not None else _BLOCK
            least = -(-int(tokens * each) // _MIB)
            allowed = f"at least {least}, for a context of {tokens} tokens in {precision}"
            raise ConfigError("kv_mib", settings.kv_mib, allowed)
        context = short
    if target == "onnx":
        rows = min(rows, max(1, fitting // context))
        return KvSize(rows=rows, context_tokens=context, kv_tokens=rows * context)
    pool = min(rows * context, fitting // _BLOCK * _BLOCK)
    return KvSize(rows=rows, context_tokens=min(context, pool), kv_tokens=pool)


def kv_precision(
    arch: Architecture, target: DeviceTarget, settings: ExecutorSettings
) -> KvPrecision:
    """The precision that an executor takes when the settings leave it open."""
    if settings.exact:
        return "f32"
    if settings.kv_precision is not None:
        return settings.kv_precision
    if target == "onnx":
        return "f16" if settings.accelerated else "f32"
    return "u8" if arch.attention_softcap is None else "f16"


def kv_bytes_per_token(arch: Architecture, target: DeviceTarget, precision: KvPrecision) -> float:
    """Bytes of one token's keys and values over all layers."""
    size = arch.head_size
    if target == "onnx":
        size = -(-size // 16) * 16  # as its attention operator keeps a head
    bits = {"f32": 32, "f16": 16, "u8": 8, "u4": 4}[precision]
    values = 2 * arch.layers * arch.kv_heads * size
    if target == "onnx" or precision in ("f32", "f16"):
        return values * bits / 8
    # Scale and zero-point, 8 bytes: of a channel's 32 tokens for keys, of a head for values.
    return values * bits / 8 + values / 2 * (8 / 32 + 8 / size)
