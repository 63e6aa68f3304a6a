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


FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "a window and sinks": {"window": 150, "sinks": torch.linspace(-2, 4, 2, device=DEVICE)},
    "a softcap": {"softcap": 5.0},
}


@pytest.mark.parametrize(
    ("features", "precision"),
    [("plain", "same"), ("a window and sinks", "int8"), ("a softcap", "same")],
)
def test_a_tokens_attention_has_the_same_bits_however_it_comes(
    features: str, precision: KvPrecision
) -> None:
    """Decoded, in a check of guesses, last of a chunk, in a whole prompt, in a batch of 32."""
    new = [1, 3, 12, 5, 40, *[1] * 27]
    past = [1100, 9, 1020, 1022, 0, *range(27)]
    step = ragged_step(new, past, padding=1, device=DEVICE)
    dtype = torch.float16 if precision == "int8" else torch.float32
    kv = filled_layer(step, kv_heads=1, head_size=16, precision=precision, dtype=dtype)
    q = draw(step, 2, 16, dtype)
    options = {"scale": 0.2, "deterministic": True, **FEATURES[features]}
    whole = paged_attention(q, kv, step, **options)  # type: ignore[arg-type]
    for index in (0, 2, 3, 4, 31):
        begin, length = int(step.starts[index]), past[index] + new[index]
        for first, end in _cuts(new[index]):
            rows = slice(begin + first, begin + end)
            part = chunk_of(step, index, rows, length=length - new[index] + end)
            found = paged_attention(q[rows], kv, part, **options)  # type: ignore[arg-type]
            assert torch.equal(found, whole[rows]), f"request {index}, tokens {first} to {end}"


def _cuts(new: int) -> list[tuple[int, int]]:
    """Alone whole; token by token at both ends; and cut in the middle."""
    middle = new * 2 // 3
    cuts = [(0, new), (0, 1), (new - 1, new), *([(0, middle), (middle, new)] if middle else [])]
    return list(dict.fromkeys(cuts))  # of a single token they are all the same


def chunk_of(step: StepTensors, index: int, rows: slice, *, length: int) -> StepTensors:
    """Some tokens of one request as a step of their own, the request `length` long by then."""
    new = rows.stop - rows.start
    return StepTensors(
        tokens=step.tokens[rows],
        positions=step.positions[rows],
        starts=torch.tensor([0, new], dtype=torch.int32, device=DEVICE),
        lengths=torch.tensor([length], dtype=torch.int32, device=DEVICE),
        blocks=step.blocks[index : index + 1],
        places=step.places[rows],
        most_tokens=new,
        most_length=length,
    )


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
