"""The few files by which each board is recognised, as its kernel writes them, under a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class BoardFiles:
    """What one board's files say. Tokens are given as the device tree lists them."""

    arch: str
    compatible: tuple[str, ...] = ()
    cpuinfo: str = ""
    chassis: int | None = None
    mem_mib: int = 7800

    def write(self, sysroot: Path) -> Path:
        """Make the tree below `sysroot` and return it."""
        proc, dmi = sysroot / "proc", sysroot / "sys/class/dmi/id"
        proc.mkdir(parents=True, exist_ok=True)
        (proc / "cpuinfo").write_text(self.cpuinfo, encoding="utf-8")
        (proc / "meminfo").write_text(f"MemTotal: {self.mem_mib * 1024} kB\n", encoding="utf-8")
        if self.compatible:
            tree = proc / "device-tree"
            tree.mkdir(exist_ok=True)
            (tree / "compatible").write_bytes(b"".join(t.encode() + b"\0" for t in self.compatible))
        if self.chassis is not None:
            dmi.mkdir(parents=True, exist_ok=True)
            (dmi / "chassis_type").write_text(f"{self.chassis}\n", encoding="utf-8")
        return sysroot


def arm_cpu(features: str) -> str:
    """/proc/cpuinfo of an ARM core."""
    return f"processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU part\t: 0xd0b\n"


def x86_cpu(vendor: str, family: int, model: int, name: str, flags: str) -> str:
    """/proc/cpuinfo of an x86 core."""
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"model name\t: {name}\nflags\t\t: {flags}\n"
    )


def _arm(*compatible: str, mem_mib: int = 7800) -> BoardFiles:
    cpu = arm_cpu("fp asimd evtstrm asimdhp asimddp")
    return BoardFiles(arch="aarch64", compatible=compatible, cpuinfo=cpu, mem_mib=mem_mib)


_ORIN: Final = "nvidia,tegra234"
_N100: Final = x86_cpu("GenuineIntel", 6, 190, "Intel(R) N100", "sse2 avx2 fma f16c avx_vnni")
_RYZEN: Final = x86_cpu("AuthenticAMD", 26, 96, "AMD Ryzen AI 5 340 w/ Radeon 840M", "avx2 avx512f")

BOARDS: Final[tuple[tuple[str, BoardFiles], ...]] = (
    ("generic-x86-64", BoardFiles(arch="x86_64", cpuinfo=_RYZEN, chassis=3)),
    ("generic-x86-64", BoardFiles(arch="x86_64")),
    ("generic-aarch64", _arm("acme,board", "acme,soc")),
    ("generic-aarch64", BoardFiles(arch="aarch64", cpuinfo=arm_cpu("fp asimd"))),
    ("intel-n100-class", BoardFiles(arch="x86_64", cpuinfo=_N100, chassis=35)),
    ("ryzen-laptop", BoardFiles(arch="x86_64", cpuinfo=_RYZEN, chassis=10)),
    ("raspberry-pi-4", _arm("raspberrypi,4-model-b", "brcm,bcm2711")),
    ("raspberry-pi-4", _arm("raspberrypi,400", "brcm,bcm2711")),
    ("raspberry-pi-5", _arm("raspberrypi,5-model-b", "brcm,bcm2712")),
    ("raspberry-pi-5", _arm("raspberrypi,5-compute-module", "brcm,bcm2712")),
    ("rk3588", _arm("xunlong,orangepi-5-plus", "rockchip,rk3588")),
    ("rk3588", _arm("xunlong,orangepi-5", "rockchip,rk3588s")),
    (
        "jetson-orin-nano-8gb",
        _arm("nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", _ORIN),
    ),
    (
        "jetson-orin-nano-8gb",
        _arm("nvidia,p3509-0000+p3767-0003", "nvidia,p3767-0003", _ORIN),
    ),
    (
        "jetson-orin-nano-8gb-super",
        _arm("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", _ORIN),
    ),
    (
        "jetson-orin-nx-16gb",
        _arm("nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", _ORIN, mem_mib=15600),
    ),
    (
        "jetson-orin-nx-16gb-super",
        _arm("nvidia,p3768-0000+p3767-0000-super", "nvidia,p3767-0000", _ORIN, mem_mib=15600),
    ),
    (
        "jetson-agx-orin-64gb",
        _arm("nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", _ORIN, mem_mib=62800),
    ),
    (
        "jetson-agx-thor",
        _arm("nvidia,p3971-0089+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"),
    ),
    # Siblings that no profile is of: other cores or memory, so nothing but the architecture holds.
    ("generic-aarch64", _arm("nvidia,p3768-0000+p3767-0004", "nvidia,p3767-0004", _ORIN)),
    ("generic-aarch64", _arm("nvidia,p3768-0000+p3767-0001", "nvidia,p3767-0001", _ORIN)),
    ("generic-aarch64", _arm("nvidia,p3737-0000+p3701-0000", _ORIN, mem_mib=30500)),
    ("generic-aarch64", _arm("raspberrypi,3-model-b", "brcm,bcm2837")),
)
"""Files of boards, and the profile that each is of."""
