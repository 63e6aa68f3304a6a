"""What a caller has had of an answer, so that another replica's run of it can go on after that.

Payloads are the same bytes at every run of the same request (greedy or seeded sampling, one payload
for each token). A second run is compared with the first as far as the caller has it, and then it is
his answer; where they differ he gets no mixture of two, but an error that he may retry on.
"""

from __future__ import annotations

from hashlib import blake2b

from tidegate.errors import UnavailableError


class DivergedError(UnavailableError):
    """Another replica answers differently: a caller who has a part may only begin anew."""


class Replay:
    """One answer, over as many runs as it takes."""

    def __init__(self) -> None:
        self.given = 0
        """Payloads that the caller has."""
        self._had = blake2b(digest_size=16)
        self._now = blake2b(digest_size=16)
        self._position = 0

    def begin(self) -> None:
        """A run begins from the answer's first payload."""
        self._position = 0
        self._now = blake2b(digest_size=16)

    def is_new(self, payload: bytes) -> bool:
        """Take the run's next payload; true when the caller does not have it yet.

        Raises:
            DivergedError: the run is not what the caller had; known with its last old payload.
        """
        self._position += 1
        self._now.update(len(payload).to_bytes(8) + payload)
        if self._position > self.given:
            self.given = self._position
            self._had = self._now.copy()
            return True
        if self._position == self.given and self._now.digest() != self._had.digest():
            raise DivergedError("the replica that went on with the answer gave another one")
        return False

    def end(self) -> None:
        """The run is over.

        Raises:
            DivergedError: before it came to what the caller had.
        """
        if self._position < self.given:
            raise DivergedError("the replica that went on with the answer gave a shorter one")
