"""The compiled attention kernels in bf16 on real shapes, against float64."""

from __future__ import annotations

import pytest
import torch
from gpus import DEVICE
from pagedsteps import filled_layer, ragged_step

from tidegate.kernels.attention import paged_attention
from tidegate.kernels.attention.reference import attend, gather
from tidegate.kernels.paged_kv import KvLayer, KvPrecision, StepTensors

pytestmark = pytest.mark.gpu

Tensor = torch.Tensor
ROUNDING = 2**-8
"""Of bf16; the weights of the values are rounded to it too."""


def exact(
    q: Tensor,
    kv: KvLayer,
    step: StepTensors,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for index, length in enumerate(step.lengths.tolist()):
        rows = slice(int(step.starts[index]), int(step.starts[index + 1]))
        if length == 0:
            continue
        keys = gather(kv.keys, kv.key_scales, step.blocks[index], length).double()
        values = gather(kv.values, kv.value_scales, step.blocks[index], length).double()
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        out[rows] = attend(q[rows].double(), keys, values, **options)  # type: ignore[arg-type]
    return out


def near(heads: int, kv_heads: int, head_size: int, **options: object) -> None:
    """A mixed step of long and short requests comes within a rounding of float64."""
    block_tokens = int(options.pop("block_tokens", 128))  # type: ignore[call-overload]
    precision: KvPrecision = options.pop("precision", "same")  # type: ignore[assignment]
    deterministic = options.pop("deterministic", False)
    step = ragged_step(
        [700, 1, 3, 9, 1, 130],
        [1000, 7000, 100, 0, 0, 313],
        block_tokens=block_tokens,
        padding=2,
        device=DEVICE,
    )
    kv = filled_layer(
        step,
        kv_heads=kv_heads,
        head_size=head_size,
        block_tokens=block_tokens,
        dtype=torch.bfloat16,
        precision=precision,
    )
    q = torch.randn(len(step.tokens), heads, head_size, device=DEVICE).bfloat16()
    options = {"scale": head_size**-0.5, **options}
    got = paged_attention(q, kv, step, deterministic=deterministic, **options)  # type: ignore[arg-type]
    expected = exact(q, kv, step, **options)  # type: ignore[arg-type]
    scale = expected.abs().amax(dim=-1, keepdim=True)
    assert ((got.double() - expected).abs() <= 2 * ROUNDING * scale + 1e-6).all()


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_tokens", [16, 128])
def test_heads_of_every_size(head_size: int, block_tokens: int) -> None:
    near(32, 8, head_size, block_tokens=block_tokens)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_keys_of_eight_bits(precision: KvPrecision, head_size: int) -> None:
    near(32, 8, head_size, precision=precision, block_tokens=16)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (32, 32), (64, 1), (71, 1)])
def test_any_number_of_heads(heads: int, kv_heads: int) -> None:
    near(heads, kv_heads, 128)


@pytest.mark.parametrize("window", [1, 128, 1000])
def test_windows(window: int) -> None:
    near(16, 4, 128, window=window)
    near(16, 4, 256, window=window, softcap=50.0)


def test_sinks() -> None:
    near(64, 8, 64, sinks=torch.randn(64, device=DEVICE), window=128)


def test_a_deterministic_request_is_the_same_alone_and_among_32() -> None:
    new, past = [1, 3, 40, 1] * 8, [5000, 200, 64, 900] * 8
    together = ragged_step(new, past, device=DEVICE)
    kv = filled_layer(together, kv_heads=8, head_size=128, dtype=torch.bfloat16)
    q = torch.randn(len(together.tokens), 32, 128, device=DEVICE).bfloat16()
    whole = paged_attention(q, kv, together, scale=0.1, deterministic=True)
    for index in range(4):
        rows = slice(int(together.starts[index]), int(together.starts[index + 1]))
        alone = StepTensors(
            tokens=together.tokens[rows],
            positions=together.positions[rows],
            starts=torch.tensor([0, new[index]], dtype=torch.int32, device=DEVICE),
            lengths=together.lengths[index : index + 1],
            blocks=together.blocks[index : index + 1],
            places=together.places[rows],
            most_tokens=new[index],
            most_length=new[index] + past[index],
        )
        got = paged_attention(q[rows], kv, alone, scale=0.1, deterministic=True)
        assert torch.equal(got, whole[rows])
