"""Which replica should answer a prompt: one that is likely to have its beginning in its cache.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
1998): every replica has a score for every key and the best one is the favourite, so all fronts
agree without a word between them, and a replica that comes or goes moves only keys of its own. The
key is that of the prompt's first blocks in the engine's own prefix cache. A favourite that is
busier than the others is passed over for the less loaded of the next two, which are the same two
every time, so a popular beginning is kept by three replicas and not by all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np

from tidegate.engine.paged_kv import extend_chain

BLOCK_TOKENS = 16
"""Of an engine whose KV has no blocks; the executors on a GPU have blocks of as many."""
ANCHOR_BLOCKS = 8
"""128 tokens: past a chat template and into a system prompt, before what differs from user to user.

Of 1, 4, 8 and 16 blocks only 1 is too few where prompts begin alike (benchmarks/cloud/
ray_affinity.py); more would divide those whose common part is short."""
SLACK = 4
"""Requests that a favourite may have more than the idlest replica before it counts as busy."""


def anchor_of(
    prompt: Sequence[int], *, block_tokens: int = BLOCK_TOKENS, anchor_blocks: int = ANCHOR_BLOCKS
) -> bytes | None:
    """The key that prompts with the same beginning share; None for one without a full block.

    Args:
        prompt: token ids.
        block_tokens: of the engine's KV.
        anchor_blocks: the most blocks that the key stands for.
    """
    first = np.asarray(prompt[: block_tokens * anchor_blocks], dtype=np.int64)
    chain = extend_chain([], first, block_tokens)
    return chain[-1] if chain else None


def ranked(key: bytes, replicas: Sequence[str]) -> list[str]:
    """Replicas by their scores for `key`, the favourite first."""
    return sorted(replicas, key=lambda replica: (_score(key, replica), replica), reverse=True)


def order(
    anchor: bytes | None, loads: Mapping[str, int], *, salt: bytes, slack: int = SLACK
) -> list[str]:
    """All replicas, in the order in which they should be asked.

    Args:
        anchor: from `anchor_of`.
        loads: requests that each replica has now.
        salt: the request's own, to spread what has no anchor.
        slack: see `SLACK`.
    """
    line = ranked(salt if anchor is None else anchor, list(loads))
    if anchor is None:
        return _by_load(line[:2], loads) + _by_load(line[2:], loads)
    if not line or loads[line[0]] <= min(loads.values()) + slack:
        return line[:1] + _by_load(line[1:3], loads) + _by_load(line[3:], loads)
    second = _by_load(line[1:3], loads)
    if loads[second[0]] >= loads[line[0]]:
        return _by_load(line, loads)
    return second + _by_load([line[0], *line[3:]], loads)


def _score(key: bytes, replica: str) -> bytes:
    return blake2b(replica.encode(), key=key[:64], digest_size=8).digest()


def _by_load(replicas: Sequence[str], loads: Mapping[str, int]) -> list[str]:
    """The idlest first; of equals the one with the better score, as they came."""
    return sorted(replicas, key=lambda replica: loads[replica])
