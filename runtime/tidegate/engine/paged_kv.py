"""`PagedKv`: KV in blocks that requests share when they begin with the same tokens.

A full, computed block is known by a hash of its tokens chained to its parent's hash, so equal keys
mean equal whole prefixes. Freed blocks keep their content until the space is needed and are taken
least recently used first. Plain dictionaries; after nano-vllm's block manager and vLLM V1.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from tidegate.engine.executor import PagedGeometry, Tokens
from tidegate.engine.kv import Copy, Match, Placement
from tidegate.engine.spill import KvUnit
from tidegate.errors import CapacityError

_ROOT = b""


def extend_chain(chain: list[bytes], tokens: Tokens, block_tokens: int) -> list[bytes]:
    """Add the keys of further full blocks of `tokens` to those in `chain`, and return it.

    Equal keys mean equal tokens from the first one on, here and in every other process.
    """
    for index in range(len(chain), len(tokens) // block_tokens):
        parent = chain[-1] if chain else _ROOT
        content = tokens[index * block_tokens : (index + 1) * block_tokens].tobytes()
        chain.append(blake2b(parent + content, digest_size=16).digest())
    return chain


class PagedKv:
    """Ref-counted blocks with hash-chained prefix reuse and LRU eviction.

    Every block is either free (no references, in `_free`) or referenced by requests. A block has a
    chain key only when it is full and computed; at most one block has a given key.
    """

    def __init__(self, geometry: PagedGeometry, *, reuse: bool = True) -> None:
        self._block_tokens = geometry.block_tokens
        self._reuse = reuse
        self._references = [0] * geometry.blocks
        self._chain_key: list[bytes | None] = [None] * geometry.blocks
        self._by_chain_key: dict[bytes, int] = {}
        # Oldest first; blocks without content at the front, so that they are taken before any hit.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(geometry.blocks))
        self._held: dict[int, list[int]] = {}
        self._places: dict[int, Placement] = {}
        self._committed: dict[int, int] = {}
        self._chains: dict[int, list[bytes]] = {}

    @property
    def unit_tokens(self) -> int:
        return self._block_tokens

    @property
    def units(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    def match(self, key: int, tokens: Tokens) -> Match:
        blocks = self._matching(key, tokens)
        drawn = sum(self._references[block] == 0 for block in blocks)
        return Match(tokens=len(blocks) * self._block_tokens, units=len(blocks), drawn=drawn)

    def admit(self, key: int, tokens: Tokens, *, reuse: bool = True) -> int:
        assert key not in self._held, "a request is admitted once"
        blocks = self._matching(key, tokens) if reuse else []
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)
        self._held[key] = blocks
        self._committed[key] = len(blocks)
        return len(blocks) * self._block_tokens

    def grow(self, key: int, tokens: int) -> None:
        held = self._held[key]
        while len(held) * self._block_tokens < tokens:
            held.append(self._take_free())
            self._places.pop(key, None)

    def trim(self, key: int, tokens: int) -> None:
        held, needed = self._held[key], -(-tokens // self._block_tokens)
        assert needed >= self._committed[key], "what is computed is never given back"
        while len(held) > needed:
            # Only ever its own: blocks that others share are full of tokens before these.
            self._places.pop(key, None)
            block = held.pop()
            self._references[block] -= 1
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def place(self, key: int) -> Placement:
        if key not in self._places:
            self._places[key] = Placement(blocks=np.array(self._held[key], dtype=np.int32))
        return self._places[key]

    def held(self, key: int) -> int:
        return len(self._held.get(key, ()))

    def exclusive(self, key: int) -> int:
        return sum(self._references[block] == 1 for block in self._held.get(key, ()))

    def commit(self, key: int, tokens: Tokens) -> None:
        full = len(tokens) // self._block_tokens
        if not self._reuse or full == self._committed[key]:
            return
        chain, held = self._chain(key, tokens), self._held[key]
        for index in range(self._committed[key], full):
            # A twin computed in the same step may own the key already; ours then stays private.
            if chain[index] not in self._by_chain_key:
                self._by_chain_key[chain[index]] = held[index]
                self._chain_key[held[index]] = chain[index]
        self._committed[key] = full

    def release(self, key: int, *, forget: bool = False) -> None:
        for books in (self._chains, self._committed, self._places):
            books.pop(key, None)
        # Backwards: the end of a prefix is useless without its beginning, so it goes first.
        for block in reversed(self._held.pop(key, [])):
            self._references[block] -= 1
            if self._references[block] == 0:
                if forget:
                    self._forget(block)
                self._free[block] = None
                self._free.move_to_end(block, last=self._chain_key[block] is not None)

    def locate(self, tokens: Tokens, unit_tokens: int) -> tuple[KvUnit, ...]:
        assert unit_tokens == self._block_tokens, "a unit of paged KV is a block"
        found: list[KvUnit] = []
        for chain_key in self._extended([], tokens):
            if (block := self._by_chain_key.get(chain_key)) is None:
                break
            found.append(KvUnit(home=block))
        return tuple(found)

    def take_copies(self) -> tuple[Copy, ...]:
        return ()

    def check_integrity(self) -> None:
        counts = [0] * self.units
        for blocks in self._held.values():
            assert len(set(blocks)) == len(blocks), "a request holds a block once"
            for block in blocks:
                counts[block] += 1
        assert counts == self._references, "references are those of the holders"
        assert {block for block, count in enumerate(counts) if count == 0} == set(self._free)
        keyed = {key: block for block, key in enumerate(self._chain_key) if key is not None}
        assert keyed == self._by_chain_key, "keys and blocks agree"
        assert self._held.keys() == self._committed.keys()

    def _matching(self, key: int, tokens: Tokens) -> list[int]:
        blocks: list[int] = []
        if not self._reuse:
            return blocks
        usable = (len(tokens) - 1) // self._block_tokens  # the last token is always computed
        for chain_key in self._chain(key, tokens)[:usable]:
            if (block := self._by_chain_key.get(chain_key)) is None:
                break
            blocks.append(block)
        return blocks

    def _chain(self, key: int, tokens: Tokens) -> list[bytes]:
        """Keys of the full blocks of `tokens`; kept per request, as its tokens only ever grow."""
        return self._extended(self._chains.setdefault(key, []), tokens)

    def _extended(self, chain: list[bytes], tokens: Tokens) -> list[bytes]:
        """`chain`, now as long as there are full blocks."""
        return extend_chain(chain, tokens, self._block_tokens)

    def _take_free(self) -> int:
        if not self._free:
            raise CapacityError(f"all {self.units} KV blocks are in use")
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        chain_key, self._chain_key[block] = self._chain_key[block], None
        if chain_key is not None:
            del self._by_chain_key[chain_key]
