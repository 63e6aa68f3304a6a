"""`SpillingKv`: KV that can be copied out of an executor and back in, one unit at a time.

A unit is a fixed number of tokens, the same in blocks and in slots. Its bytes mean something only
to an executor with the same `kv_layout`, and there they mean exactly what they did: a request goes
on over them as over KV that it computed itself. An executor without these methods has no disk tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True, slots=True)
class KvUnit:
    """Where a unit lies: in block `home`, or in slot `home` from token `first` on."""

    home: int
    first: int = 0


@runtime_checkable
class SpillingKv(Protocol):
    """What an `Executor` may offer besides. Called from the thread that runs its steps."""

    @property
    def kv_layout(self) -> str:
        """What decides over the bytes of a unit: library and version, precision, shapes."""

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit; paged KV: those of a block."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""

    def read_kv(self, unit: KvUnit) -> bytes:
        """A copy of the unit's keys and values.

        Raises:
            ExecutionError: there is no such unit, or the executor is closed.
        """

    def write_kv(self, unit: KvUnit, data: bytes) -> None:
        """Make the unit what it was when `read_kv` gave `data`.

        Raises:
            ExecutionError: there is no such unit, the executor is closed, or `data` is not
                `unit_bytes` long; nothing was written then.
        """
