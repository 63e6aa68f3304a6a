"""Quantised weights as plain numbers, and as GPTQ and AWQ lay them out, one number at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoints import checkpoint_tensors, write_checkpoint
from tinymodel import RandomWeights, tiny_architecture

from tidegate.model.safetensors_writer import write_safetensors

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A quantised weight as numbers: integers [out, in], zeros and scales [out, groups]."""

    integers: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_size: int

    def weight(self) -> np.ndarray:
        """Each weight by the formula, in float64 and without any layout."""
        group = np.arange(self.integers.shape[1]) // self.group_size
        offset = self.integers.astype(np.float64) - self.zeros[:, group]
        weight: np.ndarray = offset * self.scales[:, group]
        return weight


def known(
    outputs: int, inputs: int, *, bits: int, group_size: int, seed: int = 0, middle: bool = False
) -> Known:
    rng = np.random.default_rng(seed)
    groups, top = -(-inputs // group_size), 1 << bits
    zeros = rng.integers(1, top, (outputs, groups))
    return Known(
        integers=rng.integers(0, top, (outputs, inputs)),
        zeros=np.full_like(zeros, top // 2) if middle else zeros,
        scales=rng.uniform(0.001, 0.02, (outputs, groups)).astype(np.float16),
        group_size=group_size,
    )


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """The last axis in int32 words, one number at a time; `order` says who lies in which place."""
    count = 32 // bits
    order = order or tuple(range(count))
    split = values.reshape(*values.shape[:-1], -1, count).astype(np.uint32)
    packed = np.zeros(split.shape[:-1], np.uint32)
    for place, number in enumerate(order):
        packed |= split[..., number] << np.uint32(place * bits)
    return packed.view(np.int32)


def gptq(weight: Known, bits: int, *, offset: int = 1) -> Tensors:
    inputs = weight.integers.shape[1]
    return {
        "qweight": np.ascontiguousarray(words(weight.integers, bits).T),
        "qzeros": words(weight.zeros.T - offset, bits),
        "scales": np.ascontiguousarray(weight.scales.T),
        "g_idx": (np.arange(inputs) // weight.group_size).astype(np.int32),
    }


def awq(weight: Known) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(weight.integers.T, 4, order),
        "qzeros": words(weight.zeros.T, 4, order),
        "scales": np.ascontiguousarray(weight.scales.T),
    }


def gptq_config(bits: int, group_size: int, **more: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **more}


def awq_config(group_size: int, **more: object) -> dict[str, object]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", **more}


def write_quantised_checkpoint(
    folder: Path, method: str, *, bits: int = 4, group_size: int = 32, **config: object
) -> dict[str, Known]:
    """A tiny Llama whose layers' linear weights are quantised; table and norms are as they were.

    Args:
        folder: where to write it.
        method: `awq` or `gptq`.
        bits: 4, or 8 with `gptq`.
        group_size: inputs of a group, -1 for a row.
        config: keys of config.json; `quantization_config` is what the method says if left out.

    Returns:
        The weights by the name of their tensors, without `.weight`.
    """
    arch = tiny_architecture()
    dense = RandomWeights(arch)
    write_checkpoint(folder, arch, dense)
    found: dict[str, Known] = {}
    tensors: Tensors = {}
    for name, values in checkpoint_tensors(arch, dense).items():
        if not name.endswith("proj.weight"):
            tensors[name] = values
            continue
        base, size = (
            name.removesuffix(".weight"),
            values.shape[1] if group_size == -1 else group_size,
        )
        weight = found[base] = known(*values.shape, bits=bits, group_size=size, seed=len(tensors))
        parts = awq(weight) if method == "awq" else gptq(weight, bits)
        tensors |= {f"{base}.{part}": one for part, one in parts.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    said = awq_config(group_size) if method == "awq" else gptq_config(bits, group_size)
    body = json.loads((folder / "config.json").read_text()) | {"quantization_config": said} | config
    (folder / "config.json").write_text(json.dumps(body))
    return found
