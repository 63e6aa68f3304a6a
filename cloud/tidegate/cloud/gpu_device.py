"""What the GPU executor makes once: the device's weights and workspaces, layers, worst cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch

from tidegate.cloud.gpu_memory import LEFT_ALONE
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.sharding import ShardedWeights, head_of_table, shard
from tidegate.cloud.team import Team
from tidegate.engine.executor import Row
from tidegate.errors import ConfigError
from tidegate.kernels.attention import workspace_floats
from tidegate.kernels.device_weights import DeviceWeights
from tidegate.kernels.kernel_set import Kernels
from tidegate.kernels.kv_write.rope_tables import RopeTables
from tidegate.kernels.linear.workspace import LinearWorkspace
from tidegate.kernels.moe import MoeWorkspace
from tidegate.kernels.paged_kv import KvLayer
from tidegate.kernels.paged_ops import Device
from tidegate.kernels.scratch import Scratch
from tidegate.kernels.weight_loading import load_weights
from tidegate.model.architecture import Architecture
from tidegate.model.rope import Rope
from tidegate.model.walk import Weights


@contextmanager
def running(at: torch.device) -> Iterator[None]:
    """Without gradients, and with `at` as the thread's own device.

    Triton, events and recordings take the thread's device, wherever the tensors lie.
    """
    with torch.inference_mode(), torch.cuda.device(at) if at.type == "cuda" else nullcontext():
        yield


def wait_for(at: torch.device) -> None:
    """Until the device has done all that it was given; a CPU has."""
    if at.type == "cuda":
        torch.cuda.synchronize(at)


def part_of(arch: Architecture, team: Team | None) -> Architecture:
    """The model as this process sees it."""
    return arch if team is None else shard(arch, team.part.world)


def open_device(
    whole: Architecture,
    weights: Weights,
    settings: GpuSettings,
    *,
    context_tokens: int,
    kernels: Kernels,
    team: Team | None,
) -> Device:
    """Load the weights, or this process's part of them, and make all workspaces.

    Every layer of it has the same small cache, for worst cases.

    Raises:
        ConfigError: a deterministic team of more than two.
    """
    if settings.deterministic and team is not None and team.part.world > 2:
        allowed = "off for more than two devices, whose sums have no order of their own"
        raise ConfigError("deterministic", True, allowed)
    arch, at, dtype = part_of(whole, team), torch.device(settings.device), settings.dtype
    head_part = None
    if team is not None:
        team.reserve(settings.step_logits, dtype)
        weights = ShardedWeights(weights, whole, team.part)
        head_part = partial(head_of_table, vocab=whole.vocab, part=team.part)
    probe = new_layer(arch, settings, probe_blocks(settings, context_tokens))
    loaded = load_weights(
        arch,
        weights,
        dtype=dtype,
        device=at,
        head_part=head_part,
        int8_activations=settings.int8_activations,
    )
    return Device(
        kernels=kernels,
        weights=loaded,
        layers=(probe,) * arch.layers,
        scratch=Scratch(at),
        ropes=_rope_tables(arch, context_tokens, at),
        workspace_floats=workspace_floats(
            arch.heads,
            probe,
            dtype=dtype,
            most_requests=settings.rows,
            most_length=context_tokens,
            deterministic=settings.deterministic,
        ),
        linear_workspace=LinearWorkspace.of(
            loaded.products(),
            most_tokens=settings.step_tokens,
            dtype=dtype,
            device=at,
            deterministic=settings.deterministic,
        ),
        moe_workspace=_moe_workspace(arch, loaded, settings),
        deterministic=settings.deterministic,
        group=team,
    )


def new_layer(arch: Architecture, settings: GpuSettings, blocks: int) -> KvLayer:
    """The cache of one layer."""
    return KvLayer.allocate(
        blocks=blocks,
        block_tokens=settings.block_tokens,
        kv_heads=arch.kv_heads,
        head_size=arch.head_size,
        dtype=settings.dtype,
        precision=settings.kv_precision,
        device=settings.device,
    )


def probe_blocks(settings: GpuSettings, context_tokens: int) -> int:
    """Blocks of the cache that worst cases write to: one row of the largest step, and nobody's."""
    longest = min(-(-settings.step_tokens // settings.rows), context_tokens)
    return -(-longest // settings.block_tokens) + 1


def worst_cases(settings: GpuSettings, context_tokens: int) -> tuple[list[Row], list[Row]]:
    """The step of the most tokens and logits, and the one of the longest requests.

    All rows write to one request's blocks, and what they compute means nothing.
    """
    tokens = _shared(settings.step_tokens, settings.rows)
    logits = _shared(settings.step_logits, settings.rows)
    blocks = np.arange(probe_blocks(settings, context_tokens) - 1, dtype=np.int32)
    prompts = [
        Row(
            tokens=np.zeros(min(some, context_tokens), np.int64),
            past=0,
            blocks=blocks,
            logits=min(wanted, context_tokens),
        )
        for some, wanted in zip(tokens, logits, strict=True)
    ]
    first = np.zeros(-(-context_tokens // settings.block_tokens), np.int32)
    answer = Row(tokens=np.zeros(1, np.int64), past=context_tokens - 1, blocks=first)
    return prompts, [answer] * settings.rows


def _shared(whole: int, parts: int) -> list[int]:
    """`whole` in `parts` nearly equal parts, the larger ones first."""
    each, more = divmod(whole, parts)
    return [each + (place < more) for place in range(parts)]


def context_of(arch: Architecture, settings: GpuSettings) -> int:
    """Tokens of one request, prompt and answer together."""
    if settings.context_tokens is None:
        return arch.context
    if settings.context_tokens > arch.context:
        raise ConfigError("context_tokens", settings.context_tokens, f"at most {arch.context}")
    return settings.context_tokens


def memory_limit(settings: GpuSettings, at: torch.device) -> int | None:
    """What the executor may take, in bytes; None on a CPU that was not told."""
    if at.type != "cuda":
        return None if settings.memory_mib is None else settings.memory_mib << 20
    free = int(torch.cuda.mem_get_info(at)[0] * (1 - LEFT_ALONE))
    return free if settings.memory_mib is None else min(free, settings.memory_mib << 20)


def _rope_tables(
    arch: Architecture, context_tokens: int, at: torch.device
) -> dict[Rope, RopeTables]:
    ropes = {kind.rope for kind in arch.kinds if kind.rope is not None}
    return {rope: RopeTables.from_rope(rope, context_tokens, at) for rope in ropes}


def _moe_workspace(
    arch: Architecture, weights: DeviceWeights, settings: GpuSettings
) -> MoeWorkspace | None:
    some, kinds = weights.some_experts(), [kind.experts for kind in arch.kinds]
    if some is None:
        return None
    return MoeWorkspace.of(
        some,
        most_tokens=settings.step_tokens,
        chosen=max(one.chosen for one in kinds if one is not None),
        dtype=settings.dtype,
        device=settings.device,
    )


def device_name(at: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(at) if at.type == "cuda" else at.type
