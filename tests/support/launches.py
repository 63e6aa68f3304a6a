"""Which kernels are launched, and in which way each had to be compiled for it.

Triton's interpreter is told to run nothing: what is launched follows from what the host knows, so a
whole model's steps take no longer than their host code. A way is what Triton keys its binaries by:
constants, types, which pointers and numbers are multiples of 16, which numbers are 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

Launch = tuple[str, tuple[tuple[str, str], ...]]
"""A kernel and how it was compiled: each argument's name and what is known of it."""


@contextmanager
def recorded() -> Iterator[set[Launch]]:
    """Every launch within, none of which is run."""
    found: set[Launch] = set()
    plain = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        with _disable_current_modes():
            found.add((self.fn.__name__, _way(self, args, kwargs)))

    InterpretedFunction.run = run
    try:
        yield found
    finally:
        InterpretedFunction.run = plain


def _way(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    options = {name: one for name, one in kwargs.items() if name not in kernel.arg_names}
    given = {name: one for name, one in kwargs.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **given).arguments
    types = inspect.get_annotations(kernel.fn)
    general = kernel.kwargs.get("do_not_specialize") or ()
    known = [
        (name, repr(one) if "constexpr" in str(types.get(name)) else _known(one, name in general))
        for name, one in bound.items()
    ]
    return tuple(known + sorted((name, repr(one)) for name, one in options.items()))


def _known(value: object, general: bool) -> str:
    """What a binary is made for of an argument that is no constant."""
    match value:
        case torch.Tensor():
            aligned = "" if general or value.data_ptr() % 16 else " aligned"
            return f"{value.dtype}{aligned}"
        case bool() | None:
            return repr(value)
        case int():
            if general:
                return "integer"
            return "1" if value == 1 else "a multiple of 16" if value % 16 == 0 else "integer"
        case _:
            return type(value).__name__


class Allocations(TorchDispatchMode):
    """Counts the operations of torch whose result lies in memory that they took."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*_tensors(args), *_tensors((kwargs or {}).values())]
        known = {one.untyped_storage().data_ptr() for one in given}
        result = func(*args, **(kwargs or {}))
        for one in _tensors([result]):
            if one.untyped_storage().nbytes() and one.untyped_storage().data_ptr() not in known:
                self.found.append(str(func))
        return result


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
