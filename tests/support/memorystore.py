"""A `PrefixStore` in a dictionary, which survives the engines that use it and can lose units."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.engine.prefix_disk import StoreNumbers


class MemoryStore:
    """Keeps everything, unless told otherwise."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.used: list[bytes] = []
        self.loads = 0
        self.damaged: Callable[[int], bool] = lambda load: False
        """Given the number of a load: is the unit found to be damaged?"""
        self.room = 1 << 30

    def holds(self, key: bytes) -> bool:
        return key in self.kept

    def load(self, key: bytes) -> bytes | None:
        self.loads += 1
        if self.damaged(self.loads):
            self.kept.pop(key, None)
        return self.kept.get(key)

    def save(self, key: bytes, data: bytes) -> None:
        self.kept[key] = data

    def use(self, keys: tuple[bytes, ...]) -> None:
        self.used += keys

    def room_bytes(self) -> int:
        return self.room

    def numbers(self) -> StoreNumbers:
        return StoreNumbers(units=len(self.kept), kept_bytes=sum(map(len, self.kept.values())))
