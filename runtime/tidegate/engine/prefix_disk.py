"""`DiskPrefixes`: prefixes that outlive their place in the KV cache, and the process, in a store.

A unit of KV is kept under a key chained over everything before it: the model, the layout of its KV,
and every token from the first. So equal keys mean equal KV, and nothing stale can ever match. Books
are kept on the loop's thread, bytes are copied on the thread of the steps, a bounded number at a
time, and the store writes them on one of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from tidegate.engine.executor import Tokens
from tidegate.engine.kv import KvCache, Placement
from tidegate.engine.scheduler import Key
from tidegate.engine.spill import KvUnit, SpillingKv

LEAST_TOKENS = 64
"""Of a prefix worth keeping, and of a hit worth loading. Loading a unit of 32 takes a hundredth of
computing it for a model of 1.1 B (benchmarks/edge/prefix.py), but every short chat would write its
own."""

_MOST_OFFERS = 64
"""Prefixes that wait to be copied; the oldest of more is let go."""

_MIB = 1 << 20
LOAD_BESIDE_BYTES = 4 * _MIB
"""Loaded in a step in which others run: about 5 ms."""
LOAD_ALONE_BYTES = 32 * _MIB
"""Loaded in a step that nobody shares: whoever comes waits at most about 50 ms."""
SPILL_BESIDE_BYTES = 1 * _MIB
"""Copied out between two steps, and at least one unit: about 1 ms."""
SPILL_IDLE_BYTES = 4 * _MIB
"""Copied out at once when nobody waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreNumbers:
    """A store in numbers; counters since it was opened."""

    kept_bytes: int = 0
    units: int = 0
    writes: int = 0
    evictions: int = 0
    errors: int = 0
    """Units that could not be read or written, damaged ones included."""
    writing: bool = True
    """False once the disk was full or read only: what is there is still read."""


class PrefixStore(Protocol):
    """Keeps units by key, within a bound of its own. Methods may be called from any thread."""

    def holds(self, key: bytes) -> bool:
        """Whether the unit is kept, or about to be; it may still turn out to be damaged."""

    def load(self, key: bytes) -> bytes | None:
        """The unit as it was saved, or None: then it is gone, or damaged and now removed."""

    def save(self, key: bytes, data: bytes) -> None:
        """Keep a unit, some time later and unless that fails; returns at once."""

    def use(self, keys: tuple[bytes, ...]) -> None:
        """These units, in the order of their tokens, were useful: evict them after others."""

    def room_bytes(self) -> int:
        """Bytes that `save` takes now; 0 while too much waits to be written."""

    def numbers(self) -> StoreNumbers:
        """See `StoreNumbers`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCopy:
    """One unit between the store, under `key`, and the KV at `unit`."""

    key: bytes
    unit: KvUnit


@dataclass(kw_only=True, slots=True)
class _Loading:
    """What a running request can still load: the units from `next` up to `end`."""

    next: int
    end: int


@dataclass(kw_only=True, slots=True)
class _Offer:
    """A prefix that may be kept, with the keys of its units."""

    tokens: Tokens = field(repr=False)
    keys: tuple[bytes, ...] = field(repr=False)


class DiskPrefixes:
    """The disk tier of one engine. `load` and `save` run on the thread of the steps."""

    def __init__(
        self,
        store: PrefixStore,
        executor: SpillingKv,
        *,
        model_digest: bytes,
        least_tokens: int = LEAST_TOKENS,
    ) -> None:
        """Keep prefixes of one model in `store`.

        Args:
            store: may hold those of others too.
            executor: whose KV is copied.
            model_digest: of everything that decides over the model's numbers.
            least_tokens: of a prefix to keep and of a hit to load.
        """
        self.unit_tokens = executor.unit_tokens
        self.hit_tokens = 0
        """Tokens that were loaded instead of computed."""
        self.settled = asyncio.Event()
        """No prefix waits to be copied out."""
        self.settled.set()
        self._store, self._executor = store, executor
        self._least_tokens = least_tokens
        self._root = blake2b(model_digest + executor.kv_layout.encode(), digest_size=16).digest()
        self._chains: dict[Key, list[bytes]] = {}
        self._loading: dict[Key, _Loading] = {}
        self._offers: deque[_Offer] = deque()
        self._done: list[_Offer] = []

    def numbers(self) -> StoreNumbers:
        """The store's."""
        return self._store.numbers()

    def load_tokens(self, *, alone: bool) -> int:
        """Tokens that one step may load, at least a unit's."""
        most = LOAD_ALONE_BYTES if alone else LOAD_BESIDE_BYTES
        return max(1, most // self._executor.unit_bytes) * self.unit_tokens

    def stored(self, key: Key, tokens: Tokens, computed: int) -> int:
        """Tokens after the first `computed` of a waiting request that could be loaded."""
        gain = self._stored_units(key, tokens) * self.unit_tokens - computed
        return gain if gain >= self._least_tokens else 0

    def begin(self, key: Key, tokens: Tokens, computed: int) -> None:
        """A request starts over `computed` tokens: what is stored after them will be loaded."""
        gain = self.stored(key, tokens, computed)
        if gain:
            end = (computed + gain) // self.unit_tokens
            self._loading[key] = _Loading(next=computed // self.unit_tokens, end=end)

    def left(self, key: Key, computed: int) -> int:
        """Tokens after `computed` that the running request is still to load."""
        loading = self._loading.get(key)
        return 0 if loading is None else loading.end * self.unit_tokens - computed

    def next_end(self, key: Key, tokens: int) -> int:
        """Tokens the request has when about `tokens` more were loaded, in whole units."""
        loading = self._loading[key]
        return min(loading.next + max(1, tokens // self.unit_tokens), loading.end) * (
            self.unit_tokens
        )

    def copies(self, key: Key, end: int, place: Placement) -> tuple[UnitCopy, ...]:
        """What to load so that the request has `end` tokens."""
        first, chain = self._loading[key].next, self._chains[key]
        return tuple(
            UnitCopy(key=chain[index], unit=_unit(place, index, self.unit_tokens))
            for index in range(first, end // self.unit_tokens)
        )

    def load(self, copies: tuple[UnitCopy, ...]) -> int:
        """Write stored units into the KV until one is missing; how many were there.

        Raises:
            ExecutionError: the executor took none.
        """
        for done, copy in enumerate(copies):
            data = self._store.load(copy.key)
            if data is None or len(data) != self._executor.unit_bytes:
                return done
            self._executor.write_kv(copy.unit, data)
        return len(copies)

    def loaded(self, key: Key, asked: int, done: int) -> int:
        """Book a load and return the request's tokens; after a missing unit it loads no more."""
        loading = self._loading[key]
        loading.next += done
        self.hit_tokens += done * self.unit_tokens
        tokens = loading.next * self.unit_tokens
        if done < asked or loading.next == loading.end:
            del self._loading[key]
        return tokens

    def end(self, key: Key) -> None:
        """The request runs no longer; unknown keys are fine."""
        self._loading.pop(key, None)
        self._chains.pop(key, None)

    def offer(self, key: Key, tokens: Tokens) -> None:
        """A request that ends has computed `tokens`: keep them if they are worth it."""
        if len(tokens) >= self._least_tokens and self._store.numbers().writing:
            keys = tuple(self._chain(key, tokens)[: len(tokens) // self.unit_tokens])
            self._offers.append(_Offer(tokens=tokens, keys=keys))
            self.settled.clear()
            if len(self._offers) > _MOST_OFFERS:
                self._offers.popleft()

    def spills(self, kv: KvCache, *, idle: bool) -> tuple[UnitCopy, ...]:
        """What to copy out now; call `save` with it before anything else runs."""
        if not self._store.numbers().writing:
            self._offers.clear()
        most = min(SPILL_IDLE_BYTES if idle else SPILL_BESIDE_BYTES, self._store.room_bytes())
        units = max(int(most > 0), most // self._executor.unit_bytes)
        found: list[UnitCopy] = []
        while self._offers and len(found) < units:
            fresh = self._fresh(self._offers[0], kv)
            room = units - len(found)
            found += fresh[:room]
            if len(fresh) > room:
                break  # the rest of it comes next
            self._done.append(self._offers.popleft())
        if not found:
            self.save(())
            if not self._offers:
                self.settled.set()
        return tuple(found)

    def save(self, copies: tuple[UnitCopy, ...]) -> None:
        """Copy units out of the KV and hand them to the store."""
        for copy in copies:
            if not self._store.holds(copy.key):  # two prefixes may begin alike
                self._store.save(copy.key, self._executor.read_kv(copy.unit))
        for offer in self._done:
            self._store.use(offer.keys)
        self._done.clear()

    def _fresh(self, offer: _Offer, kv: KvCache) -> list[UnitCopy]:
        """Units of a prefix that are not kept and still lie in the KV."""
        places = kv.locate(offer.tokens, self.unit_tokens)
        return [
            UnitCopy(key=key, unit=unit)
            for key, unit in zip(offer.keys, places, strict=False)
            if not self._store.holds(key)
        ]

    def _stored_units(self, key: Key, tokens: Tokens) -> int:
        usable = (len(tokens) - 1) // self.unit_tokens  # the last token is always computed
        chain = self._chain(key, tokens)
        for index in range(usable):
            if not self._store.holds(chain[index]):
                return index
        return usable

    def _chain(self, key: Key, tokens: Tokens) -> list[bytes]:
        """Keys of the full units of `tokens`; kept per request, as its tokens only ever grow."""
        chain, size = self._chains.setdefault(key, []), self.unit_tokens
        for index in range(len(chain), len(tokens) // size):
            content = tokens[index * size : (index + 1) * size].astype("<i8").tobytes()
            parent = chain[-1] if chain else self._root
            chain.append(blake2b(parent + content, digest_size=16).digest())
        return chain


def _unit(place: Placement, index: int, unit_tokens: int) -> KvUnit:
    if place.blocks is not None:
        return KvUnit(home=int(place.blocks[index]))
    assert place.slot is not None, "KV is in blocks or in a slot"
    return KvUnit(home=place.slot, first=index * unit_tokens)
