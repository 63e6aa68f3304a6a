"""The sampling kernels choose the tokens that the engine's sampler in numpy chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gpus import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from randomdraws import some_draw, some_logits
from samplingasks import asks_of

from tidegate.engine import sampling as host
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.kernels import sampling
from tidegate.kernels.sampling import SamplingAsks, SamplingWorkspace, reference

Logits = npt.NDArray[np.float32]
PLAIN = Draw(params=SamplingParams(max_tokens=8, temperature=1), seed=1, position=2)
NAN, INF = float("nan"), float("inf")


def on_device(asks: SamplingAsks) -> SamplingAsks:
    def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    return replace(
        asks,
        numbers=asks.numbers.to(DEVICE),
        integers=asks.integers.to(DEVICE),
        starts=there(asks.starts),
        edits=there(asks.edits),
        masks=there(asks.masks),
    )


def by_kernels(logits: Logits, draws: Sequence[Draw]) -> list[int]:
    asks = on_device(asks_of(draws, logits.shape[1]))
    return sampling.sample(torch.tensor(logits, device=DEVICE), asks).tolist()


def by_host(logits: Logits, draws: Sequence[Draw]) -> list[int]:
    return [-1 if one is None else one.token for one in host.sample(logits, draws)]


def with_params(**changes: float | int | None) -> Draw:
    return replace(PLAIN, params=replace(PLAIN.params, **changes))  # type: ignore[arg-type]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_reference_chooses_as_the_host_does(seed: int) -> None:
    draws = np.random.default_rng(seed)
    logits, wishes = some_logits(draws, 6, 500), [some_draw(draws, 500) for _ in range(6)]
    found = reference.sample(torch.tensor(logits), asks_of(wishes, 500)).tolist()
    assert found == by_host(logits, wishes)


@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_choose_as_the_host_does(seed: int) -> None:
    # Fixed: a draw within float32's rounding of a border between two tokens may go either way.
    draws = np.random.default_rng(seed)
    logits, wishes = some_logits(draws, 7, 417), [some_draw(draws, 417) for _ in range(7)]
    assert by_kernels(logits, wishes) == by_host(logits, wishes)


def test_the_likeliest_token_is_the_first_of_equals() -> None:
    logits = np.zeros((3, 600), np.float32)
    logits[1, [599, 300]] = 7
    logits[2] = -np.inf
    logits[2, 5] = -3e38
    greedy = with_params(temperature=0)
    assert by_kernels(logits, [greedy] * 3) == [0, 300, 5]


def test_a_row_without_numbers_gets_no_token_and_the_others_theirs() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32)
    logits[0, 17], logits[1, 280], logits[2] = NAN, INF, -INF
    logits[3, 1] = NAN  # where no token may be chosen anyway
    only_seven = np.zeros(10, np.uint32)
    only_seven[0] = 1 << 7
    nothing = replace(PLAIN, allowed=np.zeros(10, np.uint32))
    wishes = [PLAIN, PLAIN, PLAIN, replace(PLAIN, allowed=only_seven), nothing, PLAIN]
    found = by_kernels(logits, wishes)
    assert found[:5] == [-1] * 5
    assert found == by_host(logits, wishes)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_of_equal_tokens_the_lowest_ids_are_kept(top_p: float) -> None:
    logits = np.zeros((2, 400), np.float32)
    logits[:, 350] = 1
    wishes = [replace(with_params(top_k=4, top_p=top_p), seed=seed) for seed in range(2)]
    found = by_kernels(logits, wishes)
    assert set(found) <= {350, 0, 1, 2}
    assert found == by_host(logits, wishes)


def test_an_answer_may_end_early_only_where_nothing_else_is_left() -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[:, [3, 290]] = [5, 6]
    ends = replace(PLAIN, ends=(3, 290), ends_from=10)
    mask = np.zeros(10, np.uint32)
    mask[[0, 9]] = 1 << 3, 1 << 2  # tokens 3 and 290
    greedy = replace(ends, params=replace(ends.params, temperature=0.0))
    wishes = [greedy, replace(greedy, allowed=mask), replace(ends, allowed=mask), ends]
    found = by_kernels(logits, wishes)
    assert found[:2] == [0, 290]
    assert found[2] in (3, 290)
    assert found == by_host(logits, wishes)


def test_a_row_gets_the_same_token_alone_and_among_others() -> None:
    draws = np.random.default_rng(5)
    logits, wishes = some_logits(draws, 5, 300), [some_draw(draws, 300) for _ in range(5)]
    space = SamplingWorkspace.allocate(rows=8, vocab=300, edits=999, device=DEVICE)
    given = torch.tensor(logits, device=DEVICE)
    together = sampling.sample(given.clone(), on_device(asks_of(wishes, 300)), workspace=space)
    for row in (0, 3):
        asks, alone = on_device(asks_of(wishes[row : row + 1], 300)), given[row : row + 1].clone()
        assert sampling.sample(alone, asks, workspace=space).tolist() == [int(together[row])]


def test_the_share_of_a_token_is_its_probability() -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.0, 0.7]], np.float32) + 1e-30)
    asks = on_device(asks_of([PLAIN], 4))
    found = []
    for share in (0.0, 0.099, 0.101, 0.299, 0.301, 0.999999):
        asks.numbers[0, sampling.Column.UNIFORM] = share
        found += sampling.sample(torch.tensor(logits, device=DEVICE), asks).tolist()
    assert found == [0, 0, 1, 1, 3, 3]


def test_a_temperature_next_to_none_takes_the_largest() -> None:
    logits = np.array([[1.0, 1.0000001, 0.5]], np.float32)
    assert by_kernels(logits, [with_params(temperature=1e-300)]) == [1]


@pytest.mark.gpu
def test_on_a_gpu_large_vocabularies_give_the_tokens_of_the_host() -> None:
    draws = np.random.default_rng(0)
    logits, wishes = some_logits(draws, 64, 151936), [some_draw(draws, 151936) for _ in range(64)]
    found, wanted = by_kernels(logits, wishes), by_host(logits, wishes)
    assert sum(one != other for one, other in zip(found, wanted, strict=True)) <= 1
    assert found == by_kernels(logits, wishes)
