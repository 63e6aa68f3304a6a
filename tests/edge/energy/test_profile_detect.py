"""Every board is recognised by its own files, and nothing is taken for its sibling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from boards import BOARDS, BoardFiles

from tidegate.edge.energy.profile_detect import Board, detect, match, read_board
from tidegate.edge.energy.profile_files import Library, read_library
from tidegate.errors import ConfigError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    nowhere = tmp_path_factory.mktemp("site") / "none"
    return read_library(nowhere, nowhere)


@pytest.mark.parametrize(("wanted", "files"), BOARDS)
def test_a_board_is_recognised_by_its_files(
    wanted: str, files: BoardFiles, tmp_path: Path, library: Library
) -> None:
    found = detect(read_board(files.write(tmp_path), files.arch), library.every())
    assert found.profile.id == wanted


def test_every_profile_has_a_board_that_is_recognised_as_it(library: Library) -> None:
    assert {wanted for wanted, _ in BOARDS} == set(library.ids())


def test_a_token_that_only_begins_alike_does_not_match(library: Library) -> None:
    board = Board(arch="aarch64", dt_compatible=("nvidia,p3767-0005-superb", "nvidia,tegra234"))
    assert detect(board, library.every()).profile.id == "generic-aarch64"


def test_a_device_tree_in_sysfs_alone_is_read(tmp_path: Path, library: Library) -> None:
    base = tmp_path / "sys/firmware/devicetree/base"
    base.mkdir(parents=True)
    (base / "compatible").write_bytes(b"raspberrypi,5-model-b\0brcm,bcm2712\0")
    found = detect(read_board(tmp_path, "aarch64"), library.every())
    assert found.profile.id == "raspberry-pi-5"
    assert "device tree has raspberrypi,5-model-b" in found.reasons
    assert found.others == ("generic-aarch64",)


def test_a_machine_that_says_nothing_is_of_its_architecture(
    tmp_path: Path, library: Library
) -> None:
    assert detect(read_board(tmp_path, "x86_64"), library.every()).profile.id == "generic-x86-64"


def test_garbage_in_the_files_is_no_match_and_no_crash(tmp_path: Path, library: Library) -> None:
    BoardFiles(arch="x86_64", cpuinfo="model: many\ncpu family: -6\nflags\n").write(tmp_path)
    (tmp_path / "proc/meminfo").write_text("MemTotal: lots\n")
    (tmp_path / "proc/cpuinfo").write_bytes(b"model\xff: \xff\n")
    board = read_board(tmp_path, "x86_64")
    assert (board.cpu_model, board.mem_mib) == (None, None)
    assert detect(board, library.every()).profile.id == "generic-x86-64"


def test_an_unknown_architecture_is_refused_by_name(library: Library) -> None:
    with pytest.raises(ConfigError, match="no profile matches this board \\(riscv64\\)"):
        detect(Board(arch="riscv64"), library.every())


def test_two_profiles_that_match_equally_are_both_named(library: Library) -> None:
    one = library.profile("raspberry-pi-5")
    board = Board(arch="aarch64", dt_compatible=("raspberrypi,5-model-b", "brcm,bcm2712"))
    with pytest.raises(ConfigError, match="mine and raspberry-pi-5"):
        detect(board, [one, replace(one, id="mine")])


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        ("intel-n100-class", {"cpu_vendor": "AuthenticAMD"}),
        ("intel-n100-class", {"cpu_family": 7}),
        ("intel-n100-class", {"cpu_model": 191}),
        ("intel-n100-class", {"flags": frozenset({"avx2"})}),
        ("ryzen-laptop", {"chassis": 3}),
        ("ryzen-laptop", {"cpu_name": "AMD RyzenX"}),
        ("raspberry-pi-5", {"dt_compatible": ("brcm,bcm2712",)}),
        ("raspberry-pi-5", {"dt_compatible": ("raspberrypi,5-model-b",)}),
        ("jetson-agx-orin-64gb", {"mem_mib": 30500}),
        ("jetson-agx-orin-64gb", {"mem_mib": None}),
        ("generic-x86-64", {"arch": "aarch64"}),
    ],
)
def test_every_group_has_to_hold(
    wanted: str, change: dict[str, object], tmp_path: Path, library: Library
) -> None:
    files = dict(reversed(BOARDS))[wanted]
    board, groups = read_board(files.write(tmp_path), files.arch), library.profile(wanted).detect
    assert groups is not None
    assert match(board, groups)
    assert match(replace(board, **change), groups) is None  # type: ignore[arg-type]
