"""Every kernel compiles for data-centre GPUs within their limits, without one at hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import compilegate
import pytest


@pytest.mark.system
@pytest.mark.parametrize("module", compilegate.registered())
def test_every_variant_compiles_within_the_limits(module: str) -> None:
    found = compilegate.compiled(module)
    assert {one.sm for one in found} == {80, 90}
    wrong = [one for one in found if one.problem]
    assert not wrong, "\n".join(f"{one.variant} on sm_{one.sm}: {one.problem}" for one in wrong)


@pytest.mark.system
def test_what_is_wrong_with_a_kernel_is_told() -> None:
    problems = {(one.variant, one.sm): one.problem for one in compilegate.compiled("gatevariants")}
    for sm in (80, 90):
        assert problems["good", sm] == ""
        assert "tensor cores" in problems["no tensor cores", sm]
        assert "spills" in problems["spills", sm]
        assert "shared memory" in problems["too much shared memory", sm]
        assert "lacks ['INNER'], has too much ['DEPTH']" in problems["wrong arguments", sm]


@pytest.mark.parametrize("module", compilegate.registered())
def test_every_kernel_of_a_folder_is_compiled_in_some_variant(module: str) -> None:
    found = list(jit_functions(compilegate.KERNELS / module.split(".")[-2]))
    called = {name for function in found for name in calls(function)}
    compiled = {variant.kernel.__name__ for variant in import_module(module).COMPILED}
    assert {function.name for function in found} - called == compiled


def test_every_folder_with_kernels_lists_its_variants() -> None:
    folders = {path.parent for path in compilegate.KERNELS.rglob("*.py")}
    with_kernels = {folder.name for folder in folders if list(jit_functions(folder))}
    assert {f"tidegate.kernels.{one}.variants" for one in with_kernels} == set(
        compilegate.registered()
    )


def jit_functions(folder: Path) -> Iterator[ast.FunctionDef]:
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                marks = {ast.unparse(one).partition("(")[0] for one in node.decorator_list}
                if "triton.jit" in marks:
                    yield node


def calls(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).rpartition(".")[2]
