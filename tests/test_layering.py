"""Who may import whom, that every module says what it is, and that the namespace stays open."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("runtime", "edge", "cloud", "kernels", "converters", "firmware-profiles", "sdk")

RUNTIME = {"errors", "model", "engine", "api", "link"}
MAY_IMPORT = {
    "errors": set[str](),
    "model": {"errors"},
    "engine": {"errors", "model"},
    "api": {"errors", "model", "engine"},
    "link": {"errors", "engine"},
    "profiles": {"errors"},
    "kernels": {"errors", "model"},
    "converters": {"errors", "model", "kernels"},
    "edge": RUNTIME | {"profiles"},
    "cloud": RUNTIME | {"kernels"},
    "client": RUNTIME,
    "cli": RUNTIME | {"profiles", "kernels", "converters", "edge", "cloud", "client"},
}
HEAVY = {"torch", "triton", "transformers", "onnx", "onnxruntime", "openvino", "amqtt"}
MAY_IMPORT_HEAVY = {
    "edge": {"onnxruntime", "openvino"},
    "link": {"amqtt"},
    "converters": {"onnx", "openvino", "torch"},
    "kernels": {"torch", "triton"},
    "cloud": {"torch"},
}


def modules() -> list[Path]:
    return sorted(path for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py"))


def component(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return Path(parts[2]).stem


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    own = component(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "tidegate":
            assert rest, f"{path}: import a module, not the namespace"
            assert rest[0] == own or rest[0] in MAY_IMPORT[own], f"{own} imports {name}"
        elif top in HEAVY:
            allowed = own == "cli" or top in MAY_IMPORT_HEAVY.get(own, set())
            assert allowed, f"{own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_the_namespace_stays_open() -> None:
    for root in SOURCE_ROOTS:
        assert not (ROOT / root / "__init__.py").exists()
        assert not (ROOT / root / "tidegate" / "__init__.py").exists()


def test_every_component_is_known_to_the_layering() -> None:
    assert {component(path) for path in modules()} <= set(MAY_IMPORT)


def test_starting_the_command_line_loads_no_heavy_library() -> None:
    code = (
        "import sys, tidegate.cli.main; tidegate.cli.main.build_parser();"
        f"print(sorted({HEAVY | {'fastapi', 'tokenizers', 'paho'}!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
