"""LoRA adapters beside a model: what an executor may offer, and how the KV of each stays apart.

An adapter has a number, which no other adapter of the process ever has again. Rows of one step may
have different ones. KV computed under an adapter is another than the model's own: to the books of
the KV cache a token under adapter `n` is the token plus `n * 2**32`, so that prefixes match under
the same adapter only, in every shape of cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Final, Protocol, runtime_checkable

from tidegate.engine.executor import Tokens
from tidegate.model.lora import LowRank

_TOKEN_BITS: Final = 32
_numbers = itertools.count(1)


def new_adapter_number() -> int:
    """A number that no adapter has had."""
    return next(_numbers)


def kv_tokens(tokens: Tokens, adapter: int | None) -> Tokens:
    """The tokens as the books of the KV cache know them."""
    return tokens if adapter is None else tokens + (adapter << _TOKEN_BITS)


@runtime_checkable
class Adapting(Protocol):
    """What an executor may offer besides. Both may be called from any thread, while steps run."""

    def load_adapter(self, number: int, layers: Mapping[str, LowRank]) -> None:
        """Keep an adapter, of which rows of later steps may bring the number.

        Args:
            number: of `new_adapter_number`.
            layers: by role; see `tidegate.model.lora.Adapter.checked`.
        """

    def unload_adapter(self, number: int) -> None:
        """Let an adapter go that no request uses; a step that was begun before may still do."""
