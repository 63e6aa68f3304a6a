"""Attention with capped scores in an OpenVINO graph, in plain operations over the paged cache.

The paged operation has no soft cap. It is still what writes keys and values into their blocks, in
place; then, in the same run, plain operations gather the blocks of the step's requests and attend.
What the paged operation attends to itself, a block at most, is thrown away. Three things follow:

* Every token is scored against the blocks of all requests of the step and the wrong ones hidden,
  so a step takes tokens x tokens in these blocks x heads x 4 bytes, a few times over.
* One layer of 4 key/value heads of 256 takes 5 milliseconds more than its paged twin for a token
  behind 1024 (OpenVINO 2026.4, Zen 4, two threads, float16), most of it to copy and widen the keys.
* The cache must be float16 or float32: plain operations cannot read the quantised layouts.

That a reader behind the writer sees what was written is how the CPU plugin of OpenVINO 2026.4
works, not a promise; tests hold it, and no other minor version may run a graph.
"""

from __future__ import annotations

import numpy as np
import openvino.opset13 as op

from tidegate.converters.openvino.graph import ROWS, Node, ints, scalar
from tidegate.model.architecture import AttentionSpec

BLOCK_TOKENS = 32
"""Fixed by the CPU plugin."""

_HIDDEN = np.float32(-1e30)
"""Added to a score that must not count; its exponential is exactly 0."""


class CappedAttention:
    """Attention of one graph: which token may see which place of which block, and the products.

    Places are the tokens that the step's blocks have room for, [S] in the order of
    `block_indices`; requests are numbered from 0.
    """

    def __init__(self, step: dict[str, Node], positions: Node) -> None:
        """Emit what all layers share, from the graph's inputs."""
        self._blocks = step["block_indices"]
        begins, count = step["block_indices_begins"], _count(self._blocks)
        owners = _owners(begins, count)
        within = op.subtract(_numbers(count), op.gather(begins, owners, scalar(ROWS)))
        offsets = op.constant(np.arange(BLOCK_TOKENS, dtype=np.int32)[None])
        first = op.multiply(within, scalar(np.int32(BLOCK_TOKENS)))
        self._place = op.reshape(op.add(_column(first), offsets), ints(1, -1), False)
        alike = op.constant(np.zeros((1, BLOCK_TOKENS), np.int32))
        place_owner = op.reshape(op.add(_column(owners), alike), ints(1, -1), False)
        self._position = _column(positions)
        token_owner = _owners(step["subsequence_begins"], _count(positions))
        same = op.equal(_column(token_owner), place_owner)
        before = op.less_equal(self._place, self._position)
        self._causal = op.logical_and(same, before)
        self._masks: dict[int | None, Node] = {}
        self.writing = _from_first_written(step)
        """The step for the operation that fills the caches."""
        self._places_count = op.multiply(
            op.convert(op.shape_of(self._blocks), "i64"), ints(BLOCK_TOKENS)
        )

    def attend(
        self, query: Node, caches: tuple[Node, Node], written: Node, spec: AttentionSpec
    ) -> Node:
        """Attend to the caches [blocks, K, 32, H], [T, N * H].

        Args:
            query: rotated, [T, N * H].
            caches: keys and values of the layer.
            written: what the operation that fills the caches gives.
            spec: of the layer; its soft cap is set.
        """
        assert spec.softcap is not None, "plain attention is the paged operation's"
        shared = spec.heads // spec.kv_heads
        blocks = op.add(self._blocks, _nothing(written))
        keys, values = (_gathered(cache, blocks, spec) for cache in caches)
        # Scaled here: behind the product the plugin would move the factor to all keys.
        query = op.multiply(query, scalar(np.float32(spec.scale / spec.softcap)))
        heads = op.reshape(query, ints(0, spec.kv_heads, shared, spec.head_size), True)
        heads = op.transpose(heads, ints(1, 0, 2, 3))
        rows = op.reshape(heads, ints(spec.kv_heads, -1, spec.head_size), False)
        scores = op.tanh(op.matmul(rows, keys, False, True))
        scores = op.multiply(scores, scalar(np.float32(spec.softcap)))
        by_token = op.concat([ints(spec.kv_heads, -1, shared), self._places_count], 0)
        scores = op.add(op.reshape(scores, by_token, False), self._mask(spec.window))
        as_rows = op.concat([ints(spec.kv_heads, -1), self._places_count], 0)
        shares = op.reshape(op.softmax(scores, -1), as_rows, False)
        mixed = op.matmul(shares, values, False, False)
        mixed = op.reshape(mixed, ints(spec.kv_heads, -1, shared, spec.head_size), False)
        return op.reshape(
            op.transpose(mixed, ints(1, 0, 2, 3)), ints(-1, spec.heads * spec.head_size), False
        )

    def _mask(self, window: int | None) -> Node:
        """What to add to scores, [1, T, 1, S]; layers of one window share it."""
        if window not in self._masks:
            seen = self._causal
            if window is not None:
                oldest = op.subtract(self._position, scalar(np.int32(window)))
                seen = op.logical_and(seen, op.greater(self._place, oldest))
            mask = op.select(seen, scalar(np.float32(0)), scalar(_HIDDEN))
            self._masks[window] = op.unsqueeze(mask, ints(0, 2))
        return self._masks[window]


def _from_first_written(step: dict[str, Node]) -> dict[str, Node]:
    """The step as if every request began with the block that it writes to first.

    Keys and values go to the same places, and the writer, which attends to all it knows of, has no
    more than 31 tokens before the step's own to do so.
    """
    block = scalar(np.int32(BLOCK_TOKENS))
    past, begins = step["past_lens"], step["block_indices_begins"]
    full = op.concat([op.divide(past, block), op.constant(np.zeros(1, np.int32))], 0)
    moved = {
        "past_lens": op.floor_mod(past, block),
        "block_indices_begins": op.add(begins, full),
    }
    return step | moved


def _gathered(cache: Node, blocks: Node, spec: AttentionSpec) -> Node:
    """The blocks' keys or values by head, [K, S, H], copied once and to where they are needed."""
    heads = op.constant(np.arange(spec.kv_heads, dtype=np.int32)[:, None, None])
    none = op.constant(np.zeros((spec.kv_heads, 1, 1), np.int32))
    blocks = op.unsqueeze(blocks, ints(0, 2))
    where = op.concat([op.add(blocks, none), op.add(op.multiply(blocks, none), heads)], 2)
    rows = op.convert(op.gather_nd(cache, where), "f32")
    return op.reshape(rows, ints(spec.kv_heads, -1, spec.head_size), False)


def _nothing(written: Node) -> Node:
    """0, int32 [1], known only when `written` is there: whoever adds it runs afterwards.

    Not a product with 0, which is none when the value is infinite.
    """
    one = op.slice(written, ints(0, 0), ints(1, 1), ints(1, 1), ints(0, 1))
    impossible = op.greater(one, scalar(np.float32(np.inf)))
    return op.reshape(op.convert(impossible, "i32"), ints(1), False)


def _owners(begins: Node, count: Node) -> Node:
    """The request that each of `count` things belongs to, int32, by where requests begin."""
    ends = op.slice(begins, ints(1), ints(2**31 - 1), ints(1), ints(0))
    behind = op.greater_equal(_column(_numbers(count)), op.unsqueeze(ends, ints(0)))
    return op.reduce_sum(op.convert(behind, "i32"), ints(1), False)


def _numbers(count: Node) -> Node:
    """0, 1, 2, ... of int32."""
    return op.range(scalar(np.int32(0)), count, scalar(np.int32(1)), "i32")


def _count(x: Node) -> Node:
    """How many things the vector `x` has, int32 of rank 0."""
    return op.squeeze(op.shape_of(x, "i32"), ints(0))


def _column(x: Node) -> Node:
    return op.unsqueeze(x, ints(1))
