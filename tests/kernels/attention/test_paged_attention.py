"""Attention kernels against their definition on odd shapes: interpreted, or compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE
from pagedsteps import filled_layer, ragged_step

from tidegate.errors import ConfigError
from tidegate.kernels.attention import paged_attention, workspace_floats
from tidegate.kernels.attention.reference import paged_attention as defined
from tidegate.kernels.paged_kv import KvLayer, KvPrecision, StepTensors

Tensor = torch.Tensor
LOOSE = {torch.float32: 3e-6, torch.float16: 3e-3}
MIXED = ragged_step([40, 1, 9, 3, 17], [0, 170, 5, 0, 90], padding=2, device=DEVICE)
"""Two chunks and a fresh prompt beside a decode row and a check of two guesses."""


def draw(step: StepTensors, heads: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (len(step.tokens), heads, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)


def agree(q: Tensor, kv: KvLayer, step: StepTensors, **options: object) -> None:
    """The kernels, writing over NaN, come to what the definition says."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    got = paged_attention(q, kv, step, out=out, **options)  # type: ignore[arg-type]
    expected = defined(q, kv, step, **options)  # type: ignore[arg-type]
    assert got is out
    assert torch.allclose(got.float(), expected.float(), atol=LOOSE[q.dtype])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("block_tokens", [16, 128])
def test_prefill_chunks_guesses_and_decode_share_a_step(
    block_tokens: int, deterministic: bool
) -> None:
    past = [0, 170, 5, 0, 90]
    step = ragged_step([40, 1, 9, 3, 17], past, block_tokens=block_tokens, padding=2, device=DEVICE)
    kv = filled_layer(step, kv_heads=2, head_size=12, block_tokens=block_tokens)
    agree(draw(step, 6, 12), kv, step, scale=0.3, deterministic=deterministic)


@pytest.mark.parametrize("window", [1, 7, 33, 1000])
def test_a_window_hides_older_tokens(window: int) -> None:
    kv = filled_layer(MIXED, kv_heads=2, head_size=12)
    agree(draw(MIXED, 4, 12), kv, MIXED, scale=0.3, window=window)


@pytest.mark.parametrize("window", [None, 20])
def test_sinks_take_their_share_and_give_nothing(window: int | None) -> None:
    kv = filled_layer(MIXED, kv_heads=2, head_size=12)
    sinks = torch.linspace(-2, 4, 4, device=DEVICE)
    agree(draw(MIXED, 4, 12), kv, MIXED, scale=0.3, window=window, sinks=sinks)


def test_a_softcap_bounds_scores_of_any_size() -> None:
    kv = filled_layer(MIXED, kv_heads=2, head_size=12)
    agree(draw(MIXED, 4, 12), kv, MIXED, scale=3.0, softcap=5.0)
    agree(draw(MIXED, 4, 12) * 1000, kv, MIXED, scale=3.0, softcap=5.0)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_and_values_of_eight_bits_are_scaled_back(
    precision: KvPrecision, dtype: torch.dtype
) -> None:
    kv = filled_layer(MIXED, kv_heads=2, head_size=24, precision=precision)
    agree(draw(MIXED, 4, 24, dtype), kv, MIXED, scale=0.2)


def test_a_query_in_two_tiles_of_integers_is_as_sharp_as_it_was() -> None:
    step = ragged_step([1, 12], [200, 40], device=DEVICE)
    kv = filled_layer(step, kv_heads=2, head_size=64, precision="int8")
    q = draw(step, 4, 64, torch.float16) * 3
    got = paged_attention(q, kv, step, scale=1.0)
    # Scores in the tens: an error of 2 ** -8 in a query's values would be a tenth of a weight.
    torch.testing.assert_close(got, defined(q, kv, step, scale=1.0), atol=4e-3, rtol=2e-3)


@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(1, 1, 64), (7, 1, 80), (10, 5, 20)])
def test_heads_of_any_number_and_size(heads: int, kv_heads: int, head_size: int) -> None:
    step = ragged_step([11, 1], [3, 140], device=DEVICE)
    kv = filled_layer(step, kv_heads=kv_heads, head_size=head_size, dtype=torch.float16)
    agree(draw(step, heads, head_size, torch.float16), kv, step, scale=head_size**-0.5)


def test_a_query_may_be_a_view_of_a_wider_row() -> None:
    step = ragged_step([12, 2], [0, 30], device=DEVICE)
    kv = filled_layer(step, kv_heads=2, head_size=16)
    fused = torch.randn(14, 4 * 16 + 40, device=DEVICE)
    agree(fused[:, 8:72].view(14, 4, 16), kv, step, scale=0.25)


def test_a_long_request_is_cut_into_segments_and_joined_again() -> None:
    step = ragged_step([1, 5], [700, 20], device=DEVICE)
    kv = filled_layer(step, kv_heads=1, head_size=16)
    floats = workspace_floats(2, kv, dtype=torch.float32, most_requests=4, most_length=705)
    assert floats > 0
    workspace = torch.full((floats,), torch.nan, device=DEVICE)
    agree(draw(step, 2, 16), kv, step, scale=0.25, workspace=workspace)
    with pytest.raises(ConfigError, match="workspace = 5: must be at least"):
        paged_attention(draw(step, 2, 16), kv, step, scale=0.25, workspace=torch.empty(5))


def test_a_deterministic_request_is_the_same_alone_and_in_company() -> None:
    past, heads = [1100, 9, 400, 30, 2], 4
    together = ragged_step([1, 1, 3, 12, 5], past, padding=1, device=DEVICE)
    kv = filled_layer(together, kv_heads=2, head_size=16)
    q = draw(together, heads, 16)
    whole = paged_attention(q, kv, together, scale=0.2, deterministic=True)
    for index, length in enumerate(together.lengths[:5].tolist()):
        rows = slice(int(together.starts[index]), int(together.starts[index + 1]))
        new = rows.stop - rows.start
        alone = StepTensors(
            tokens=together.tokens[rows],
            positions=together.positions[rows],
            starts=torch.tensor([0, new], dtype=torch.int32, device=DEVICE),
            lengths=together.lengths[index : index + 1],
            blocks=together.blocks[index : index + 1],
            places=together.places[rows],
            most_tokens=new,
            most_length=length,
        )
        got = paged_attention(q[rows], kv, alone, scale=0.2, deterministic=True)
        assert torch.equal(got, whole[rows])


def test_a_prompt_cut_into_long_chunks_comes_to_the_same_bits() -> None:
    whole = ragged_step([75], [0], device=DEVICE)
    kv = filled_layer(whole, kv_heads=2, head_size=16)
    q = draw(whole, 6, 16)
    at_once = paged_attention(q, kv, whole, scale=0.2, window=50, deterministic=True)
    for begin, end in ((0, 9), (9, 41), (41, 75)):
        rows = slice(begin, end)
        chunk = StepTensors(
            tokens=whole.tokens[rows],
            positions=whole.positions[rows],
            starts=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
            lengths=torch.tensor([end], dtype=torch.int32, device=DEVICE),
            blocks=whole.blocks,
            places=whole.places[rows],
            most_tokens=end - begin,
            most_length=end,
        )
        got = paged_attention(q[rows], kv, chunk, scale=0.2, window=50, deterministic=True)
        assert torch.equal(got, at_once[rows])


def test_more_room_for_lengths_changes_nothing_in_deterministic_mode() -> None:
    step = ragged_step([1, 2], [1500, 40], device=DEVICE)
    kv = filled_layer(step, kv_heads=1, head_size=16)
    q = draw(step, 2, 16)
    wide = StepTensors(
        tokens=step.tokens,
        positions=step.positions,
        starts=step.starts,
        lengths=step.lengths,
        blocks=step.blocks,
        places=step.places,
        most_tokens=2,
        most_length=40_000,
    )
    usual = paged_attention(q, kv, step, scale=0.2, deterministic=True)
    assert torch.equal(usual, paged_attention(q, kv, wide, scale=0.2, deterministic=True))


@pytest.mark.parametrize(
    ("shape", "stride", "scale", "sinks", "named"),
    [
        ((4, 6, 12), None, 1.0, None, "q.shape"),
        ((4, 5, 16), None, 1.0, None, "q.shape"),
        ((4, 4, 16), (256, 32, 1), 1.0, None, "q.stride"),
        ((4, 4, 16), None, 0.0, None, "scale = 0.0"),
        ((4, 4, 16), None, 1.0, 3, "sinks.shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None,
    scale: float,
    sinks: int | None,
    named: str,
) -> None:
    step = ragged_step([4], [0], device=DEVICE)
    kv = filled_layer(step, kv_heads=2, head_size=16)
    q = torch.randn(shape) if stride is None else torch.empty_strided(shape, stride)
    given = None if sinks is None else torch.zeros(sinks)
    with pytest.raises(ConfigError, match=named):
        paged_attention(q, kv, step, scale=scale, sinks=given)
