"""What the files in cloud/deploy say, as data, for the tests that hold them against the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tidegate.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "cloud" / "deploy"

Manifest = dict[str, Any]


def kubernetes() -> dict[str, Manifest]:
    """Every object of the Kubernetes folder, by its file's name."""
    found = {}
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        (found[path.name],) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return found


def pod_specs() -> Iterator[tuple[str, Manifest]]:
    """The pods of everything that has some."""
    for name, one in kubernetes().items():
        template = one.get("spec", {}).get("template")
        if template is not None:
            yield name, template["spec"]


def compose() -> Manifest:
    """The compose file, its anchors merged."""
    found: Manifest = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text("utf-8"))
    return found


def parsed(arguments: Sequence[str]) -> Any:
    """What our own command line makes of a container's arguments; ends the test if it refuses."""
    args = build_parser().parse_args(list(arguments))
    if not hasattr(args, "options"):
        return args
    found, _ = args.options.resolved(args, {}, Path())  # what a file could set has its default
    return found
