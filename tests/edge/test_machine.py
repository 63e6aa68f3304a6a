"""What a machine is, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

from tidegate.edge.machine import Machine, read_gb_per_s, read_machine, usable_cores

X86 = """\
processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx2 f16c avx512f avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"
MEMORY = "MemTotal:        4000 kB\nMemFree:  100 kB\nMemAvailable:    3000 kB\n"


def machine(folder: Path, cpuinfo: str) -> Machine:
    (folder / "cpuinfo").write_text(cpuinfo)
    (folder / "meminfo").write_text(MEMORY)
    return read_machine(folder)


def test_an_x86_machine_is_its_first_processor(tmp_path: Path) -> None:
    found = machine(tmp_path, X86)
    assert (found.processor, found.cores) == ("AMD EPYC", usable_cores())
    assert found.flags == ("avx2", "f16c", "avx512f", "avx512_vnni")
    assert (found.memory_bytes, found.available_bytes) == (4_096_000, 3_072_000)


def test_an_arm_machine_calls_its_flags_features(tmp_path: Path) -> None:
    assert machine(tmp_path, ARM).flags == ("asimddp",)


def test_a_system_without_these_files_is_still_a_machine(tmp_path: Path) -> None:
    found = read_machine(tmp_path)
    assert found.processor
    assert found.flags == ()
    assert found.available_bytes == found.memory_bytes > 1 << 20


def test_memory_is_read_at_some_rate() -> None:
    assert 0.1 < read_gb_per_s(1) < 2000
