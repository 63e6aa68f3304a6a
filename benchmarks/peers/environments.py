"""The peers' virtual environments: one folder each, pinned versions, built once.

Peers need versions of libraries that contradict ours and one another's. They live in
`.tidegate/peers/<name>`, or under the folder that TIDEGATE_PEERS names, each beside a log of how it
was built. An environment that holds the pinned versions already is used as it is; one that was
interrupted goes on where it stopped. llama.cpp is compiled, which takes ten minutes on two cores.

    python benchmarks/peers/environments.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from peers.contract import PeerError  # noqa: E402

NAMES = ("llama", "ovgenai", "genai", "optimum")
REQUIREMENTS = Path(__file__).with_name("requirements")
_VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(version(name).partition("+")[0])
    except PackageNotFoundError:
        print("none")
"""


def home() -> Path:
    """The folder that holds all environments."""
    return Path(os.environ.get("TIDEGATE_PEERS", ROOT / ".tidegate" / "peers"))


def python(name: str) -> Path:
    """The interpreter of an environment, built or not."""
    return home() / name / "bin" / "python"


def pins(name: str) -> dict[str, str]:
    """Package and version of every line of the requirements."""
    lines = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def problem(name: str) -> str | None:
    """What the environment lacks; None when it holds every pinned version."""
    if not python(name).exists():
        return f"{home() / name} is not there"
    wanted = pins(name)
    said = subprocess.run(
        [python(name), "-c", _VERSIONS, *wanted], capture_output=True, text=True, check=False
    )
    if said.returncode != 0:
        return f"{python(name)} does not run"
    found = dict(zip(wanted, said.stdout.split(), strict=True))
    wrong = [f"{one} is {found[one]}" for one in wanted if not _same(found[one], wanted[one])]
    return f"{', '.join(wrong)}: see requirements/{name}.txt" if wrong else None


def _same(found: str, wanted: str) -> bool:
    """Whether versions are equal but for zeros at their end."""
    return found.removesuffix(".0") == wanted.removesuffix(".0")


def build(name: str) -> None:
    """Make or complete an environment.

    Raises:
        PeerError: it could not be built; the log says why.
    """
    if problem(name) is None:
        return
    folder = home() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{name}.log"
    print(f"building {folder}, log in {log}", file=sys.stderr, flush=True)
    commands: list[list[str]] = []
    if not python(name).exists():
        commands.append([sys.executable, "-m", "venv", str(folder)])
    requirements = str(REQUIREMENTS / f"{name}.txt")
    commands.append([str(python(name)), "-m", "pip", "install", "-r", requirements])
    with log.open("ab") as out:
        for command in commands:
            done = subprocess.run(command, stdout=out, stderr=out, check=False)
            if done.returncode != 0:
                raise PeerError(f"{name}: {' '.join(command)} failed: see {log}")
    if (still := problem(name)) is not None:
        raise PeerError(f"{name}: built, but {still}")


def build_all(names: Iterable[str]) -> dict[str, str]:
    """Build what can be built; the reasons for what cannot, by name."""
    failed: dict[str, str] = {}
    for name in names:
        try:
            build(name)
        except PeerError as error:
            failed[name] = str(error)
    return failed


def main() -> int:
    """Build, then say what is there. A peer that cannot be built is named, and ends nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}")
    args = parser.parse_args()
    failed = build_all(args.names)
    for name in args.names:
        print(f"{name:<8} {failed.get(name, 'ready')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
