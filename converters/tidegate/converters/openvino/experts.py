"""Routing of tokens to experts in an OpenVINO graph: sorted once, so that each expert gets a slice.

The choices of all tokens are put in the order of their experts, and one split with computed lengths
hands each expert its rows, mostly none when few tokens run. A product of no rows is skipped, and
every expert's weight stays a compressed constant of its own, of whatever kind. Measured on
OpenVINO 2026.4 (Zen 4, two threads, 4-bit, groups of 64; milliseconds for one block, the best of
30 runs on a machine with other work):

    experts, chosen, widths     tokens   sorted   rows found per expert   every expert dense
    8, 2, 1024 x 1024                1      0.2                     0.2                  0.9
                                    32      2.2                     2.5                  6.4
    64, 8, 512 x 256                 1      0.3                     0.8                  4.6
                                    32      4.7                     8.8                 18.2

The second form takes 15 small operations an expert instead of 5, and compiles for twice as long.
The plugin has a fused operation, used for one exact pattern and on x86 only; elsewhere that
pattern becomes float32 weights of all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openvino.opset13 as op

from tidegate.converters.openvino.graph import ROWS, Node, ints, length, scalar
from tidegate.model.architecture import Experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """What the router chose for T tokens, C choices each."""

    shares: Node
    """float32 [T, C], the weight of each choice."""
    order: Node
    """int64 [T * C], the choices by expert; choice `c` is of token `c / C`."""
    counts: Node
    """int64 [experts], how many choices fell on each."""
    experts: Experts

    def pieces(self, x: Node) -> list[Node]:
        """The rows of `x` [T, n] that each expert is to compute, in the order of the experts."""
        tokens = op.divide(self.order, scalar(np.int64(self.experts.chosen)))
        rows = op.gather(x, tokens, scalar(ROWS))
        return list(op.variadic_split(rows, scalar(ROWS), self.counts).outputs())

    def combined(self, pieces: Sequence[Node]) -> Node:
        """The sum [T, n] over each token's choices, from what every expert made of its piece."""
        width = length(pieces[0], 1)
        rows = op.gather(op.concat(list(pieces), 0), _inverse(self.order), scalar(ROWS))
        by_token = op.reshape(rows, ints(-1, self.experts.chosen, width), False)
        weighted = op.multiply(by_token, op.unsqueeze(self.shares, ints(2)))
        return op.reduce_sum(weighted, ints(1), False)


def route(scores: Node, experts: Experts) -> Routes:
    """Choose by the router's outputs [T, experts]; see `tidegate.model.ops.Ops.moe`."""
    chosen = scalar(np.int64(experts.chosen))
    top = op.topk(op.softmax(scores, -1), chosen, -1, "max", "value", "i64")
    shares, choices = top.outputs()
    if experts.normalised:
        shares = op.divide(shares, op.reduce_sum(shares, ints(-1), True))
    numbers = op.constant(np.arange(experts.count, dtype=np.int64)[:, None])
    hits = op.equal(numbers, op.reshape(choices, ints(1, -1), False))
    return Routes(
        shares=shares,
        # Places of the hits come row by row, so sorted by expert and then by token.
        order=op.gather(op.non_zero(hits, "i64"), scalar(np.int64(1)), scalar(ROWS)),
        counts=op.reduce_sum(op.convert(hits, "i64"), ints(1), False),
        experts=experts,
    )


def _inverse(order: Node) -> Node:
    """Where each choice came to lie."""
    count = op.squeeze(op.shape_of(order), ints(0))
    places = op.range(scalar(ROWS), count, scalar(np.int64(1)), "i64")
    return op.scatter_elements_update(order, order, places, scalar(ROWS))
