"""What every comparison starts with: a checkpoint, converted for every engine that is here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peers.contract import Peer, PeerError, Prepared
from peers.ours import checkpoint_of
from peers.rounds import tell


def prepare_all(
    shape: str, work: Path, engines: Sequence[Peer]
) -> tuple[list[tuple[Peer, Prepared]], dict[str, str]]:
    """Make the checkpoint and convert it for everyone; who is missing, and why."""
    checkpoint = checkpoint_of(shape, work)
    ready: list[tuple[Peer, Prepared]] = []
    missing: dict[str, str] = {}
    for peer in engines:
        reason = peer.missing()
        if reason is None:
            tell(f"preparing {peer.name}")
            try:
                ready.append((peer, peer.prepare(checkpoint, work)))
            except PeerError as error:
                reason = str(error)
        if reason is not None:
            missing[peer.name] = reason
    return ready, missing
