"""The paged KV cache and a step's tensors, as every kernel and its torch reference take them.

A step is ragged: the tokens of all its requests lie one behind the other, and `StepTensors` says
where each request begins, how long it is by then, and in which blocks its keys and values lie. So
one layout serves prefill, chunks of it, decode and the verification of guesses. The block comes
first and the head before the token: a program that serves one key/value head reads whole runs of
`block_tokens * H` values.

    keys, values   [blocks, K, block_tokens, H]
    scales         [blocks, K, block_tokens]   of int8 and fp8: value = stored * scale

Blocks hold a power of two of tokens, at least 16. Block 0 is nobody's: padding of a step (which
CUDA graphs need, since they are captured for a fixed number of requests) writes and reads there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Tensor = torch.Tensor

KvPrecision = Literal["same", "int8", "fp8"]
"""How keys and values are kept: as the activations are, or 8 bits with a scale per token and head.

fp8 is e4m3 (Micikevicius et al. 2022). Scales are the largest magnitude over 127 and over 448.
"""

PADDING_BLOCK = 0


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class KvLayer:
    """Keys and values of one layer; see the module for the layout."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    """float32 [blocks, K, block_tokens]; None when keys are kept as they are."""
    value_scales: Tensor | None = None

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return int(self.keys.shape[2])

    @property
    def blocks(self) -> int:
        """Blocks of the cache, the padding block included."""
        return int(self.keys.shape[0])

    @property
    def kv_heads(self) -> int:
        """K."""
        return int(self.keys.shape[1])

    @property
    def head_size(self) -> int:
        """H."""
        return int(self.keys.shape[3])

    @classmethod
    def allocate(
        cls,
        *,
        blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        precision: KvPrecision = "same",
        device: torch.device | str = "cpu",
    ) -> KvLayer:
        """Zeros for `blocks` blocks, the padding block among them."""
        shape = (blocks, kv_heads, block_tokens, head_size)
        stored = {"same": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[precision]
        pair = [torch.zeros(shape, dtype=stored, device=device) for _ in range(2)]
        if precision == "same":
            return cls(keys=pair[0], values=pair[1])
        scales = [torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2)]
        return cls(keys=pair[0], values=pair[1], key_scales=scales[0], value_scales=scales[1])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepTensors:
    """A step of B requests and T tokens, on the device of the cache.

    A request whose `lengths` is 0 is padding: it has no tokens, or one at `PADDING_BLOCK` whose
    result nobody reads.
    """

    tokens: Tensor
    """int32 [T], token ids."""
    positions: Tensor
    """int32 [T], of each token in its request."""
    starts: Tensor
    """int32 [B + 1], the first token of each request, then T."""
    lengths: Tensor
    """int32 [B], tokens in the cache once this step has written: past + new."""
    blocks: Tensor
    """int32 [B, most blocks], block ids of each request in order; what is beyond is 0."""
    places: Tensor
    """int64 [T], where each token's key and value go: block * block_tokens + place within."""
    most_tokens: int
    """The longest request's new tokens, known on the host: what a launch grid is sized by."""
    most_length: int
    """At least the largest of `lengths`, known on the host; fixed while a graph is replayed."""
