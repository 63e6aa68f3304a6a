"""What mixture-of-experts decoders share: the keys of their configs, the two layouts of experts.

The Hub keeps one tensor per expert and matrix. transformers 5 can also save all experts of a layer
together: `gate_up_proj` [E, 2 * inner, width], the gate's rows above the up's, and `down_proj`
[E, width, inner]. Which of the two a checkpoint has shows in the names of its tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tidegate.errors import CheckpointError
from tidegate.model.architecture import Architecture, Experts
from tidegate.model.config import Config, positive_int
from tidegate.model.llama_like import linear
from tidegate.model.registry import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """How a checkpoint with one tensor per expert names them, within a layer."""

    block: str
    """What router and experts are below, such as `mlp`."""
    parts: Mapping[str, str]
    """The tensor of an expert for each of gate, up and down."""


PROJECTIONS = ExpertNames(
    block="mlp", parts={role: f"{role}_proj" for role in ("gate", "up", "down")}
)
"""The names that most models have."""

_STACKED_BLOCK = "mlp"
"""The block's name when experts are saved together, whatever the model."""

# Far above any model (512 so far), far below what fills a memory with names.
_MOST_EXPERTS, _MOST_EXPERTS_OF_ALL = 4096, 1 << 17

_COUNTS = ("num_experts", "num_local_experts")
"""Either spelling, whichever model: transformers 5 writes one where the Hub has the other."""


def read_experts(config: Config, *, inner: int, normalised: bool) -> Experts:
    """The experts that a config describes, each of width `inner`.

    Raises:
        CheckpointError: their number is missing or given twice, or a token chooses more of them
            than there are.
    """
    given = [key for key in _COUNTS if config.get(key) is not None]
    found = {key: positive_int(config, key, most=_MOST_EXPERTS) for key in given}
    if len(set(found.values())) != 1:
        raise CheckpointError(f"config.json: num_experts = {found}: must be one number")
    count = next(iter(found.values()))
    layers = positive_int(config, "num_hidden_layers")
    if layers * count > _MOST_EXPERTS_OF_ALL:
        raise CheckpointError(
            f"config.json: num_experts = {count} in each of num_hidden_layers = {layers}: must be "
            f"at most {_MOST_EXPERTS_OF_ALL} together"
        )
    chosen = positive_int(config, "num_experts_per_tok")
    if chosen > count:
        raise CheckpointError(
            f"config.json: num_experts_per_tok = {chosen}: must be at most num_experts = {count}"
        )
    return Experts(count=count, chosen=chosen, inner=inner, normalised=normalised)


def expert_sources(
    arch: Architecture, names: ExpertNames, present: Collection[str]
) -> dict[str, Source]:
    """Sources of router and experts of every layer that has them, in whichever layout."""
    found: dict[str, Source] = {}
    for layer in range(arch.layers):
        experts = arch.kind(layer).experts
        if experts is None:
            continue
        role, prefix = f"layers.{layer}.", f"model.layers.{layer}."
        stacked = f"{prefix}{_STACKED_BLOCK}.experts.gate_up_proj" in present
        block = prefix + (_STACKED_BLOCK if stacked else names.block)
        found[role + "router"] = linear(f"{block}.gate", present)
        for number in range(experts.count):
            for part, name in names.parts.items():
                full = f"{block}.experts.{number}.{name}"
                found[f"{role}experts.{number}.{part}"] = (
                    _stacked(f"{block}.experts", part, number, experts.inner)
                    if stacked
                    else linear(full, present)
                )
    return found


def _stacked(experts: str, part: str, number: int, inner: int) -> Source:
    if part == "down":
        return Source(tensor=f"{experts}.down_proj", index=number)
    rows = (0, inner) if part == "gate" else (inner, 2 * inner)
    return Source(tensor=f"{experts}.gate_up_proj", rows=rows, index=number)
