"""The native library built otherwise: with sanitizers, for other CPUs, or not at all.

`self_check` compares every path with the portable one and prints digests of what that computes, so
equal output means equal bits, on an emulated CPU as well.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from nativelinear import NativeLibrary

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "kernels/native"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.system


def run(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, with what it says if it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done


def build_self_check(folder: Path, *options: str) -> Path:
    """`self_check` built with CMake's options."""
    # Without OpenVINO: nothing of it is tested here.
    options = ("-DCMAKE_DISABLE_FIND_PACKAGE_OpenVINO=ON", "-DTIDEGATE_WERROR=ON", *options)
    run(["cmake", "-S", SOURCE, "-B", folder, *options])
    run(["cmake", "--build", folder, "--target", "self_check", "--parallel", "2"])
    return folder / "self_check"


@pytest.fixture(scope="module")
def everything(native: NativeLibrary) -> tuple[str, ...]:
    """Options that make every path of this architecture run here, where that can be had.

    AVX-VNNI is AVX-512's dot product in another encoding; the latter stands in for it.
    """
    if "avx512-vnni" in native.paths() and "avx-vnni" not in native.paths():
        return ("-DTIDEGATE_AVX_VNNI_AS_EVEX=ON",)
    return ()


@pytest.fixture(scope="module")
def digests(
    native: NativeLibrary, everything: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What `self_check` prints here, where all paths gave the same bits."""
    done = run([build_self_check(tmp_path_factory.mktemp("plain"), *everything)])
    assert set(native.paths()) <= set(done.stderr.split())
    assert not everything or "avx-vnni" in done.stderr.split()
    return done.stdout


def test_nothing_reads_or_writes_where_it_must_not(
    everything: tuple[str, ...], digests: str, tmp_path: Path
) -> None:
    program = build_self_check(tmp_path, "-DTIDEGATE_SANITIZE=ON", *everything)
    assert run([program]).stdout == digests


def test_the_neon_path_gives_the_same_bits_on_an_emulated_cpu(digests: str, tmp_path: Path) -> None:
    if platform.machine() == "aarch64":
        return  # compared already
    for tool in (CROSS_COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing (scripts/system-deps arm64)")
    toolchain = tmp_path / "arm64.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\n"
        f"set(CMAKE_CXX_COMPILER {CROSS_COMPILER})\n"
    )
    program = build_self_check(
        tmp_path, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DCMAKE_EXE_LINKER_FLAGS=-static"
    )
    done = run([EMULATOR, "-cpu", "max", program])
    assert (done.stdout, done.stderr) == (digests, "paths: neon-dotprod portable\n")
    # A CPU of before the dot product.
    assert run([EMULATOR, "-cpu", "cortex-a53", program, "40"]).stderr == "paths: portable\n"


def test_the_environment_chooses_the_path(native: NativeLibrary) -> None:
    code = (
        "import sys; from pathlib import Path; from nativelinear import NativeLibrary;"
        "print(NativeLibrary(Path(sys.argv[1])).path())"
    )
    library = str(SOURCE / "build/tidegate_native/libtidegate_native.so")
    command = [str(ROOT / ".venv/bin/python"), "-P", "-c", code, library]
    sources = os.pathsep.join([str(ROOT / "runtime"), str(ROOT / "tests/support")])
    for path in native.paths():
        done = run(command, PYTHONPATH=sources, TIDEGATE_NATIVE_PATH=path)
        assert done.stdout.strip() == path
    wrong = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": sources, "TIDEGATE_NATIVE_PATH": "mmx"},
    )
    assert "TIDEGATE_NATIVE_PATH = mmx: must be one of" in wrong.stderr


def test_where_the_system_gives_fewer_threads_they_do_all_of_the_work(
    native: NativeLibrary,
) -> None:
    code = (
        "import resource, sys; from pathlib import Path; import numpy as np;"
        "from nativelinear import NativeLibrary; library = NativeLibrary(Path(sys.argv[1]));"
        "memory = np.zeros(1 << 20, np.uint8); memory[::64] = 1;"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize();"
        # Room for the stacks of a few threads, each of about 8 MiB.
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2);"
        "print([library.read(memory, 200) for _ in range(3)])"
    )
    library = str(SOURCE / "build/tidegate_native/libtidegate_native.so")
    sources = os.pathsep.join([str(ROOT / "runtime"), str(ROOT / "tests/support")])
    command = [str(ROOT / ".venv/bin/python"), "-P", "-c", code, library]
    assert run(command, PYTHONPATH=sources).stdout.strip() == f"{[1 << 14] * 3}"


def test_without_a_compiler_the_build_says_so_and_succeeds() -> None:
    done = run([ROOT / "scripts/build-native"], CXX="no-such-compiler")
    assert "skipped: it needs a C++ compiler and CMake" in done.stderr


def test_the_distribution_carries_the_licence_of_the_repository() -> None:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    assert [(SOURCE / name).read_bytes() for name in project["license-files"]] == [
        (ROOT / "LICENSE").read_bytes()
    ]
