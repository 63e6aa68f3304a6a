"""Which weights of a block decide what enters one of its linear layers.

An MLP's input does not depend on the MLP; an expert's does not on the other experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.registry import AnyArchitecture

_QKV = ("q", "k", "v")

_DECODER_DEPTHS = {
    "attention_norm": 0,
    **dict.fromkeys(_QKV, 1),
    "q_norm": 2,
    "k_norm": 2,
    "o": 3,
    "attention_after_norm": 4,
    "mlp_norm": 5,
    "router": 6,
    "gate": 7,
    "up": 7,
    "down": 8,
    "mlp_after_norm": 9,
    "final_norm": 0,
    "head": 1,
}
_ENCODER_DEPTHS = {
    **dict.fromkeys(_QKV, 1),
    "o": 3,
    "attention_norm": 4,
    "up": 5,
    "down": 6,
    "mlp_norm": 7,
    "pooler": 1,
    "classifier": 2,
}
"""The order of the walk within a layer; norms come after what they normalise here."""


def input_of(role: str, present: Mapping[str, object]) -> str:
    """The first of the linear layers that share their input with this one."""
    prefix, _, part = role.rpartition(".")
    leader = {"k": "q", "v": "q", "up": "gate"}.get(part)
    if leader is None or f"{prefix}.{leader}" not in present:
        return role
    return f"{prefix}.{leader}"


def depth_of(name: str, arch: AnyArchitecture) -> int:
    """How late in the walk through its block a weight is used."""
    depths = _ENCODER_DEPTHS if isinstance(arch, EncoderArchitecture) else _DECODER_DEPTHS
    return depths[name.removesuffix(".bias").rpartition(".")[2]]


def upstream(role: str, names: Collection[str], arch: AnyArchitecture) -> list[str]:
    """Those of `names`, all of one block, that what enters `role` depends on."""
    depth, expert = depth_of(role, arch), _expert(role)
    return [
        name for name in names if depth_of(name, arch) < depth and _expert(name) in (None, expert)
    ]


def _expert(name: str) -> str | None:
    parts = name.split(".")
    return parts[3] if "experts" in parts else None
