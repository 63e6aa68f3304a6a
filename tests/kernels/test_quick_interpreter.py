"""Kernels that are interpreted quickly compute as before and leave Triton's language as it was."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType

import pytest
import torch
import triton
import triton.language as tl
from gpus import DEVICE
from quickinterpreter import patch_once


@triton.jit  # type: ignore[untyped-decorator]
def _doubled(x: tl.tensor) -> tl.tensor:
    return tl.where(x > 0, x * 2, x)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of_doubled(x: tl.tensor, out: tl.tensor, number: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < number, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(_doubled(values)) + _doubled(tl.program_id(0)))


def test_a_launch_computes_through_its_device_functions_and_puts_everything_back() -> None:
    names = [name for name in dir(tl) if callable(getattr(tl, name))]
    before = [getattr(tl, name) for name in names]
    conversion = getattr(tl.tensor, "__bool__", None)
    x, out = torch.arange(5.0, device=DEVICE), torch.zeros(3, device=DEVICE)
    for _ in range(2):
        _sum_of_doubled[(3,)](x, out, 5, BLOCK=8)
        assert out.tolist() == [20, 22, 24]
        assert [getattr(tl, name) for name in names] == before
        assert getattr(tl.tensor, "__bool__", None) == conversion


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled on a CUDA device")
def test_the_interpreter_of_this_process_is_the_quick_one() -> None:
    from triton.runtime import interpreter

    assert interpreter._patch_lang.__module__ == patch_once.__module__


@dataclass
class Scope:
    """What Triton gives for a patched language."""

    told: list[str]
    name: str

    def restore(self) -> None:
        self.told.append(f"{self.name} restored")


def test_only_what_the_launch_around_has_not_patched_is_patched_again() -> None:
    told: list[str] = []

    def patch(function: FunctionType) -> Scope:
        told.append(function.__name__)
        return Scope(told, function.__name__)

    def of(name: str, *seen: object) -> FunctionType:
        code = (lambda: None).__code__
        return FunctionType(code, {str(number): one for number, one in enumerate(seen)}, name)

    quick = patch_once(patch, (tl, tl.core))
    kernel, same, other = of("kernel", tl), of("same", tl, torch), of("other", tl.core)
    for _ in range(2):
        scope = quick(kernel)
        assert scope is not None
        assert quick(same) is None
        assert quick(other) is not None
        scope.restore()
    assert told == ["kernel", "other", "kernel restored"] * 2
