"""A small board for tests of scheduling: three modes with the knee in the middle, a cloud."""

from __future__ import annotations

from tidegate.edge.energy.cost import CloudCost, CostModel, ModeCost, RadioCost

SLOW = ModeCost(
    name="slow",
    prefill_token_s=4e-3,
    prefill_start_s=0.05,
    step_s=0.1,
    context_token_s=1e-5,
    row_s=0.01,
    prefill_w=4.0,
    decode_w=4.0,
    idle_w=1.0,
)
KNEE = ModeCost(
    name="knee",
    prefill_token_s=2e-3,
    prefill_start_s=0.03,
    step_s=0.05,
    context_token_s=5e-6,
    row_s=0.005,
    prefill_w=6.0,
    decode_w=6.0,
    idle_w=1.5,
)
FAST = ModeCost(
    name="fast",
    prefill_token_s=1e-3,
    prefill_start_s=0.02,
    step_s=0.025,
    context_token_s=3e-6,
    row_s=0.003,
    prefill_w=14.0,
    decode_w=14.0,
    idle_w=2.0,
)
BOARD = CostModel(
    modes=(SLOW, KNEE, FAST),
    rows=4,
    scope="board",
    source="estimated",
    switch_s=0.05,
    switch_j=0.2,
)
RADIO = RadioCost(up_byte_j=2e-6, down_byte_j=1e-6, tail_w=0.5, tail_s=0.5)
CLOUD = CloudCost(
    rtt_s=0.1, wait_s=0.2, prefill_token_s=1e-4, token_s=0.02, token_j=0.4, token_price=1.0
)
