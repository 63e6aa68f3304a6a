"""Keys that nobody has: how often a source may try in a minute before it is told to wait.

A key of 256 bits is not found by trying; this bounds what trying costs us: lines of the audit log,
and memory. A good key from the same source always passes: nobody is locked out by a neighbour.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Final

MOST_OF_A_SOURCE: Final = 30
MOST_OF_ALL: Final = 1000
WINDOW_S: Final = 60.0


class FailedAttempts:
    """Counts in whole minutes of `clock`; forgets everything when one ends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._minute = -1
        self._counts: dict[str, int] = {}
        self._all = 0

    def failed(self, source: str) -> bool:
        """Count one; False when it is beyond what is listened to."""
        minute = int(self._clock() // WINDOW_S)
        if minute != self._minute:
            self._minute, self._all = minute, 0
            self._counts.clear()
        if self._all >= MOST_OF_ALL:
            return False
        network = network_of(source)
        count = self._counts.get(network, 0)
        if count >= MOST_OF_A_SOURCE:
            return False
        self._all += 1
        self._counts[network] = count + 1
        return True


def network_of(source: str) -> str:
    """Whose address it is: of IPv6 the first 64 bits, since one machine has all the rest."""
    try:
        address = ipaddress.ip_address(source)
    except ValueError:
        return source
    if address.version == 4:
        return source
    return str(ipaddress.ip_network(f"{address}/64", strict=False))
