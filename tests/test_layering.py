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


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def parsed(own: str) -> Iterator[tuple[Path, ast.Module]]:
    """Every module of a component."""
    for path in modules():
        if component(path) == own:
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def not_allowed(own: str, name: str) -> bool:
    """Whether a module of `own` may not import that; the namespace and relative ones none may."""
    top, *rest = name.split(".")
    if not top:
        return True
    if top == "tidegate":
        return not rest or rest[0] not in {own, *MAY_IMPORT[own]}
    return top in HEAVY and own != "cli" and top not in MAY_IMPORT_HEAVY.get(own, set())


@pytest.mark.parametrize("own", MAY_IMPORT)
def test_modules_import_only_what_their_layer_may_and_say_what_they_are(own: str) -> None:
    wrong, undescribed, number = [], [], 0
    for path, tree in parsed(own):
        number += 1
        wrong += [f"{path} imports {name}" for name in imported(tree) if not_allowed(own, name)]
        undescribed += [] if ast.get_docstring(tree) else [str(path)]
    assert number, f"there is no module of {own}"
    assert not wrong
    assert not undescribed


@pytest.mark.parametrize(
    ("own", "name", "refused"),
    [
        ("model", "tidegate.engine.kv", True),
        ("model", "tidegate.errors", False),
        ("engine", "tidegate", True),
        ("engine", "tidegate.engine.kv", False),
        ("engine", ".kv", True),
        ("api", "torch", True),
        ("cloud", "torch.nn", False),
        ("cli", "openvino", False),
        ("api", "asyncio", False),
    ],
)
def test_a_layer_below_is_allowed_and_one_above_is_not(own: str, name: str, refused: bool) -> None:
    assert not_allowed(own, name) == refused


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
