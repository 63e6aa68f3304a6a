"""`GpuSettings`: the sizes that the GPU executor fixes at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from tidegate.errors import ConfigError
from tidegate.kernels.paged_kv import KvPrecision

ActivationType = Literal["bf16", "fp16", "fp32"]

DTYPES: Final[dict[ActivationType, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_LEAST_BLOCK_TOKENS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSettings:
    """Sizes fixed at start. The defaults are for one large GPU; tests set all of them."""

    rows: int = 256
    """Requests of one step."""
    context_tokens: int | None = None
    """Prompt plus answer of one request; None for what the model can."""
    step_tokens: int = 8192
    """Tokens of one step; what a prompt chunk is cut to."""
    block_tokens: int = 16
    """Tokens of a block, a power of two."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds; None: as many as fit into the memory that is left."""
    memory_mib: int | None = None
    """Of the device; None: nine tenths of what is free at start. Not with a CPU."""
    activations: ActivationType = "bf16"
    kv_precision: KvPrecision = "same"
    int8_activations: bool = False
    """8-bit weights are multiplied with activations rounded to 8 bits; refused without any."""
    deterministic: bool = False
    """The same tokens whatever else is in the batch, at some speed."""
    graphs: bool = True
    """Record decode steps as CUDA graphs."""
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("rows", "step_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        for name in ("context_tokens", "kv_tokens", "memory_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "at least 1, or absent")
        size = self.block_tokens
        if size < _LEAST_BLOCK_TOKENS or size & (size - 1):
            raise ConfigError(
                "block_tokens", size, f"a power of two of at least {_LEAST_BLOCK_TOKENS}"
            )
        if self.rows > self.step_tokens:
            raise ConfigError("rows", self.rows, f"at most step_tokens, {self.step_tokens}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of weights that are not packed."""
        return DTYPES[self.activations]

    @property
    def step_logits(self) -> int:
        """Tokens of one step that can have logits: guesses are verified for a row or two each."""
        return min(self.step_tokens, 2 * self.rows)
