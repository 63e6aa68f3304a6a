"""What the GPU executor needs of the device's memory, part by part. Pure arithmetic.

Weights and KV follow from the architecture; buffers of steps are measured by the executor, which
runs the worst one at start. What is left becomes KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.sharding import padded_head
from tidegate.errors import ConfigError
from tidegate.model.architecture import Architecture

_MIB: Final = 1 << 20
_SCALE_BYTES: Final = 4
LEFT_ALONE: Final = 0.1
"""Share of the free memory that is not taken: the driver, libraries' workspaces, recordings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """One line of the sum."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySum:
    """All parts, as people see them."""

    parts: tuple[MemoryPart, ...]

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return sum(part.nbytes for part in self.parts)

    def lines(self) -> str:
        """One line per part and the sum last, in MiB."""
        rows = [*self.parts, MemoryPart(name="sum", nbytes=self.nbytes)]
        width = max(len(row.name) for row in rows)
        return "\n".join(f"  {row.name:<{width}} {_mib(row.nbytes):>9,} MiB" for row in rows)


def kv_bytes_per_token(arch: Architecture, settings: GpuSettings) -> int:
    """Keys and values of one token over all layers, and their scales if they have any."""
    if settings.kv_precision == "same":
        return arch.kv_values_per_token * settings.dtype.itemsize
    scales = 2 * arch.layers * arch.kv_heads * _SCALE_BYTES
    return arch.kv_values_per_token + scales


def block_bytes(arch: Architecture, settings: GpuSettings) -> int:
    """One block of the cache over all layers."""
    return kv_bytes_per_token(arch, settings) * settings.block_tokens


def least_blocks(context_tokens: int, settings: GpuSettings) -> int:
    """Blocks that one request of the whole context needs, and nobody's block."""
    return -(-context_tokens // settings.block_tokens) + 1


def weight_bytes(
    arch: Architecture, settings: GpuSettings, *, packed_bits: int | None, world: int = 1
) -> int:
    """Of the weights at least, on each of `world` devices: what to expect before all were read."""
    return held_weights(arch, world) * (packed_bits or 8 * settings.dtype.itemsize) // 8


def held_weights(arch: Architecture, world: int) -> int:
    """Weights of one device of `world`, of its part `arch` of the model.

    Only the head is split by tokens: each has the whole table, to look up in, and a part of the
    head, be it tied or not.
    """
    if world == 1:
        return arch.parameters
    tables = arch.vocab * arch.width
    head = padded_head(arch.vocab, world) * arch.width
    return arch.parameters + head - (0 if arch.tied_head else tables)


def kv_blocks(
    arch: Architecture,
    settings: GpuSettings,
    *,
    context_tokens: int,
    used: MemorySum,
    limit_bytes: int | None,
) -> int:
    """Blocks of the KV cache, nobody's among them.

    Args:
        arch: the model.
        settings: of the executor.
        context_tokens: of one request.
        used: by all else.
        limit_bytes: what the executor may take; None where it has to say how many tokens it keeps.

    Raises:
        ConfigError: not even one request would fit; the sum is written out.
    """
    least, each = least_blocks(context_tokens, settings), block_bytes(arch, settings)
    asked = None if settings.kv_tokens is None else -(-settings.kv_tokens // settings.block_tokens)
    if asked is not None and asked + 1 < least:
        allowed = f"at least {context_tokens}, the context of one request"
        raise ConfigError("kv_tokens", settings.kv_tokens, allowed)
    if limit_bytes is None:
        if asked is None:
            raise ConfigError("kv_tokens", None, "given where the memory has no limit of its own")
        return asked + 1
    fitting = (limit_bytes - used.nbytes) // each
    blocks = fitting if asked is None else asked + 1
    if blocks < least or blocks > fitting:
        wanted = max(least, 0 if asked is None else asked + 1)
        whole = with_kv(used, arch, settings, wanted)
        setting = "memory_mib" if settings.memory_mib is not None else "MiB of memory available"
        raise ConfigError(
            setting,
            limit_bytes // _MIB,
            f"at least {_mib(whole.nbytes)}, which is\n{whole.lines()}",
        )
    return blocks


def with_kv(used: MemorySum, arch: Architecture, settings: GpuSettings, blocks: int) -> MemorySum:
    """The sum with a KV cache of so many blocks, nobody's among them."""
    tokens = (blocks - 1) * settings.block_tokens
    kv = MemoryPart(
        name=f"KV, {tokens} tokens in {precision_name(settings)}",
        nbytes=blocks * block_bytes(arch, settings),
    )
    return MemorySum(parts=(*used.parts, kv))


def check_weights(
    arch: Architecture,
    settings: GpuSettings,
    limit_bytes: int | None,
    *,
    packed_bits: int | None = None,
    world: int = 1,
) -> None:
    """Refuse a model whose weights alone are too many, before an hour of reading them.

    Args:
        arch: the model.
        settings: of the executor.
        limit_bytes: what it may take; None for no limit.
        packed_bits: of the first layer's weights, if they are packed.
        world: devices that the model is split over; `arch` is one's part.

    Raises:
        ConfigError: with the arithmetic.
    """
    nbytes = weight_bytes(arch, settings, packed_bits=packed_bits, world=world)
    if limit_bytes is not None and nbytes > limit_bytes:
        raise ConfigError(
            "MiB of memory available",
            limit_bytes // _MIB,
            f"at least {_mib(nbytes)}, the weights alone: {held_weights(arch, world):,} in "
            f"{settings.activations if packed_bits is None else f'{packed_bits} bits'}",
        )


def precision_name(settings: GpuSettings) -> str:
    """What keys and values are kept in, for people."""
    return settings.activations if settings.kv_precision == "same" else settings.kv_precision


def _mib(nbytes: int) -> int:
    return -(-nbytes // _MIB)
