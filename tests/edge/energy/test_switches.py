"""Power modes of a board: by name, those without a reboot only, read back, undone in the end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from powerboards import JETSONS, Jetson, cpufreq_of, write_cpufreq, write_jetson

from tidegate.edge.energy import power_board
from tidegate.edge.energy.actuate import ModeSwitch, OneMode
from tidegate.edge.energy.own_modes import own_modes
from tidegate.edge.energy.profile import Power, Profile
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.settings import Switching
from tidegate.edge.energy.switches import open_switch
from tidegate.errors import ActuationError, ExecutionError

LIBRARY = read_library(Path("/none"), Path("/none"))
PI = LIBRARY.profile("raspberry-pi-5")
SUPER = LIBRARY.profile("jetson-orin-nano-8gb-super")


class Threads:
    """An executor whose threads can be limited."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.limits: list[int] = []
        self.broken = False

    @property
    def most_threads(self) -> int | None:
        return self._most

    def limit_threads(self, threads: int) -> None:
        if self.broken:
            raise ExecutionError("no memory")
        self.limits.append(threads)


def opened(
    profile: Profile, root: Path, own: ModeSwitch | None = None, switching: Switching = "auto"
) -> ModeSwitch:
    return open_switch(profile, switching=switching, helper=None, sysroot=root, own=own)


LIVE = {
    "jetson-orin-nano-8gb-super": ("15W", "25W", "MAXN_SUPER"),
    "jetson-orin-nx-16gb": ("10W", "15W"),
    "jetson-orin-nx-16gb-super": ("25W", "40W", "MAXN_SUPER"),
    "jetson-agx-thor": ("120W", "MAXN"),
}


@pytest.mark.parametrize("board", LIVE)
def test_a_jetson_has_the_modes_that_need_no_reboot(board: str, tmp_path: Path) -> None:
    root = write_jetson(tmp_path, JETSONS[board])
    switch = opened(LIBRARY.profile(board), root, switching="all")
    assert (switch.tool, switch.modes) == ("nvpmodel", LIVE[board])
    before = switch.current()
    assert before == JETSONS[board].modes[JETSONS[board].default][0]
    for mode in (*switch.modes, *reversed(switch.modes)):
        switch.switch(mode)
        assert switch.current() == mode
    switch.switch(next(mode for mode in switch.modes if mode != before))
    switch.close()
    assert switch.current() == before
    assert not (root / "rebooted").exists()


@pytest.mark.parametrize("chosen", ["15W", "25W", "MAXN_SUPER"])
def test_the_mode_that_the_owner_chose_is_the_fastest_that_is_taken(
    chosen: str, tmp_path: Path
) -> None:
    modes = JETSONS[SUPER.id].modes
    (number,) = (number for number, (name, _) in modes.items() if name == chosen)
    root = write_jetson(tmp_path, Jetson(modes=modes, default=number))
    live = LIVE[SUPER.id]
    switch = opened(SUPER, root)
    assert switch.modes == live[: live.index(chosen) + 1]
    switch.close()
    switch = opened(SUPER, root, switching="all")
    assert switch.modes == live
    switch.switch("MAXN_SUPER")
    switch.close()
    assert (root / "var/lib/nvpmodel/status").read_text() == f"pmode:{number:04d}"


@pytest.mark.parametrize("board", sorted(JETSONS.keys() - LIVE.keys()))
def test_a_jetson_whose_other_modes_all_need_a_reboot_stays_in_its_own(
    board: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_jetson(tmp_path, JETSONS[board])
    switch = opened(LIBRARY.profile(board), root)
    assert switch.modes == (JETSONS[board].modes[JETSONS[board].default][0],)
    assert "can be taken without a reboot" in caplog.text


def test_every_profile_of_a_jetson_is_tried() -> None:
    tools = {name: LIBRARY.profile(name).power.tool for name in LIBRARY.ids()}
    assert {name for name, tool in tools.items() if tool == "nvpmodel"} == set(JETSONS)


def test_a_mode_that_is_not_the_profiles_is_none_of_ours(tmp_path: Path) -> None:
    modes = {0: ("15W", 6), 1: ("25W", 6), 2: ("MAXN_SUPER", 6), 7: ("mine", 6)}
    root = write_jetson(tmp_path, Jetson(modes=modes, default=7))
    assert isinstance(opened(SUPER, root), OneMode), "whether 15W is above it nobody knows"
    switch = opened(SUPER, root, switching="all")
    assert switch.current() is None
    switch.switch("15W")
    assert switch.current() == "15W"


def test_a_refusal_that_nvpmodel_does_not_tell_is_seen(tmp_path: Path) -> None:
    root = write_jetson(tmp_path, JETSONS[SUPER.id])
    switch = opened(SUPER, root)
    (root / "behaves").write_text("ignores")
    with pytest.raises(ActuationError, match="mode 1 is there after 0 was asked for"):
        switch.switch("15W")
    (root / "behaves").write_text("fails")
    with pytest.raises(ActuationError, match="ended with 1"):
        switch.switch("15W")
    # What is asked may need rights that this process has not; the state's file needs none.
    assert switch.current() == "25W"
    (root / "behaves").unlink()
    switch.switch("15W")
    assert switch.current() == "15W"


def test_nvpmodel_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_jetson(tmp_path, JETSONS[SUPER.id])
    switch = opened(SUPER, root)
    (root / "behaves").write_text("hangs")
    monkeypatch.setattr(power_board, "_NVPMODEL_S", 0.2)
    began_s = time.monotonic()
    with pytest.raises(ActuationError, match="nvpmodel -m 0: TimeoutExpired"):
        switch.switch("15W")
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(
    ("conf", "why"),
    [
        (None, "cannot be read"),
        ("", "has no POWER_MODEL"),
        ("\x00\xff garbage <<<", "has no POWER_MODEL"),
        ("< POWER_MODEL ID=one NAME=15W >", "has no id or no name"),
        ("< POWER_MODEL ID=1 NAME=15W >\n< POWER_MODEL ID=2 NAME=15W >", "is there twice"),
        ("< POWER_MODEL ID=9 NAME=15W >", "which nvpmodel.conf has not"),
        ("< POWER_MODEL ID=1 NAME=mine >", "without a reboot there are the power modes mine"),
    ],
)
def test_files_that_make_no_sense_leave_the_board_as_it_is(
    conf: str | None, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_jetson(tmp_path, JETSONS[SUPER.id])
    # Only the state's file answers then: the program reads the conf itself.
    (root / "behaves").write_text("fails")
    file = root / "etc/nvpmodel.conf"
    file.unlink() if conf is None else file.write_text(conf, encoding="latin-1")
    switch = opened(SUPER, root)
    assert isinstance(switch, OneMode)
    assert why in caplog.text
    assert "nvpmodel does not switch power modes" in caplog.text


def test_a_board_whose_clocks_can_be_limited_has_three_modes(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path, 4)
    switch = opened(PI, root)
    assert (switch.tool, switch.modes) == ("cpufreq", ("0.6", "0.8", "full"))
    assert switch.current() == "full"
    switch.switch("0.6")
    assert switch.current() == "0.6"
    assert cpufreq_of(root, "scaling_max_freq") == ["2040000"] * 4
    assert cpufreq_of(root, "energy_performance_preference") == ["balance_power"] * 4
    switch.switch("full")
    assert cpufreq_of(root, "scaling_max_freq") == ["3400000"] * 4
    assert cpufreq_of(root, "energy_performance_preference") == ["balance_performance"] * 4
    switch.switch("0.8")
    switch.close()
    assert cpufreq_of(root, "scaling_max_freq") == ["3400000"] * 4
    assert cpufreq_of(root, "energy_performance_preference") == ["balance_performance"] * 4


def test_frequencies_are_steps_that_there_are(tmp_path: Path) -> None:
    steps = (1_500_000, 1_600_000, 1_700_000, 1_800_000, 1_900_000, 2_000_000, 2_200_000, 2_400_000)
    root = write_cpufreq(
        tmp_path,
        khz=(1_500_000, 2_400_000),
        steps=tuple(reversed(steps)),
        governor="ondemand",
        governors="ondemand schedutil powersave performance",
        epp=None,
    )
    switch = opened(PI, root)
    switch.switch("0.6")
    assert cpufreq_of(root, "scaling_max_freq") == ["1500000"]
    switch.switch("0.8")
    assert cpufreq_of(root, "scaling_max_freq") == ["2000000"]
    assert cpufreq_of(root, "scaling_governor") == ["ondemand"]


def test_full_is_what_the_owner_allowed(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path)
    file = root / "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq"
    file.write_text("2000000\n")
    switch = opened(PI, root)
    switch.switch("0.6")
    assert cpufreq_of(root, "scaling_max_freq") == ["1200000"]
    switch.switch("full")
    assert cpufreq_of(root, "scaling_max_freq") == ["2000000"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tidegate.edge.energy.cpufreq import CpufreqSwitch
from tidegate.edge.energy.power_writes import OwnWrites
root = Path(sys.argv[1])
switch = CpufreqSwitch(OwnWrites(root), root)
switch.switch("0.6")
print(*(one.full_khz for one in switch._policies), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.system
def test_a_daemon_that_is_killed_again_and_again_leaves_full_what_it_was(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path)
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-P", "-c", KILLED, str(root)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert (done.returncode, done.stdout) == (-signal.SIGKILL, "3400000\n"), done.stderr
        assert cpufreq_of(root, "scaling_max_freq") == ["2040000"]
    switch = opened(PI, root)
    assert switch.current() == "full"
    switch.close()
    assert cpufreq_of(root, "scaling_max_freq") == ["3400000"]
    assert cpufreq_of(root, "energy_performance_preference") == ["balance_performance"]


def test_one_process_at_a_time_switches_a_board(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_cpufreq(tmp_path)
    first = opened(PI, root)
    first.switch("0.6")
    assert isinstance(opened(PI, root), OneMode)
    assert "another process switches power modes here" in caplog.text
    assert first.current() == "0.6"
    first.close()
    assert opened(PI, root).modes == first.modes


def test_what_cannot_be_put_back_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_cpufreq(tmp_path)
    switch = opened(PI, root)
    switch.switch("0.6")
    (root / "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq").unlink()
    switch.close()
    assert "the board is not as it was found: scaling_max_freq: cannot be read" in caplog.text


def test_what_was_closed_switches_no_more(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path)
    switch = opened(PI, root)
    switch.close()
    with pytest.raises(ActuationError, match="the daemon is closing"):
        switch.switch("0.6")
    assert cpufreq_of(root, "scaling_max_freq") == ["3400000"]


def test_a_board_that_is_not_there_is_not_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(opened(PI, tmp_path / "none"), OneMode)
    assert "none: must be a folder with the board's files" in caplog.text
    assert not (tmp_path / "none").exists()


def test_performance_gives_way_while_a_slower_mode_saves(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path, governor="performance", epp="performance")
    switch = opened(PI, root)
    switch.switch("0.6")
    assert cpufreq_of(root, "scaling_governor") == ["powersave"]
    assert cpufreq_of(root, "energy_performance_preference") == ["balance_power"]
    switch.switch("full")
    assert cpufreq_of(root, "scaling_governor") == ["performance"]
    switch.switch("0.6")
    switch.close()
    assert cpufreq_of(root, "scaling_governor") == ["performance"]
    assert cpufreq_of(root, "energy_performance_preference") == ["performance"]


def test_somebody_elses_frequency_is_none_of_ours(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path, 2)
    switch = opened(PI, root)
    (root / "sys/devices/system/cpu/cpufreq/policy1/scaling_max_freq").write_text("900000\n")
    assert switch.current() is None
    (root / "sys/devices/system/cpu/cpufreq/policy1/scaling_max_freq").write_text("fast\n")
    with pytest.raises(ActuationError, match=r"scaling_max_freq: 'fast': must be one frequency"):
        switch.current()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("scaling_max_freq", "", "must be one frequency in kHz"),
        ("cpuinfo_max_freq", "-5", "must be one frequency in kHz"),
        ("cpuinfo_min_freq", "0", "must be in order"),
        ("cpuinfo_min_freq", "3400000", "no frequency below"),
        ("cpuinfo_max_freq", "9" * 400, "must be one frequency in kHz"),
        ("scaling_available_frequencies", "600000 1500000 <bad>", "must be one frequency in kHz"),
    ],
)
def test_clocks_that_make_no_sense_are_left_alone(
    name: str, value: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_cpufreq(tmp_path)
    (root / "sys/devices/system/cpu/cpufreq/policy0" / name).write_text(value)
    own = own_modes(Threads(4))
    assert opened(PI, root, own) is own
    assert isinstance(opened(PI, root), OneMode)
    assert why in caplog.text


def test_without_clocks_the_modes_are_the_daemons_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    threads = Threads(8)
    switch = opened(PI, tmp_path, own_modes(threads))
    assert (switch.tool, switch.modes) == ("own", ("2 threads", "4 threads", "8 threads"))
    assert switch.current() == "8 threads"
    switch.switch("2 threads")
    assert switch.current() == "2 threads"
    switch.close()
    assert threads.limits == [2, 8]
    assert "the kernel has no cpufreq here" in caplog.text
    assert "2 threads, 4 threads, 8 threads" in caplog.text


def test_threads_that_cannot_be_had_leave_the_mode_as_it_was() -> None:
    threads = Threads(4)
    switch = own_modes(threads)
    assert switch is not None
    switch.switch("2 threads")
    threads.broken = True
    with pytest.raises(ActuationError, match="the power mode is 2 threads as before: no memory"):
        switch.switch("1 thread")
    assert switch.current() == "2 threads"
    switch.close()
    assert switch.current() == "2 threads"


def test_what_has_one_thread_or_fixed_ones_has_no_modes_of_its_own() -> None:
    assert own_modes(Threads(1)) is None
    assert own_modes(Threads(None)) is None
    assert own_modes(object()) is None


def test_switching_is_off_when_the_owner_says_so(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path)
    found = open_switch(PI, switching="off", helper=None, sysroot=root, own=own_modes(Threads(4)))
    assert isinstance(found, OneMode)
    none = replace(PI, power=Power())
    assert isinstance(opened(none, root), OneMode)


def test_without_a_helper_and_without_rights_the_way_there_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    socket = tmp_path / "none"
    found = open_switch(PI, switching="auto", helper=socket, sysroot=write_cpufreq(tmp_path))
    assert isinstance(found, OneMode)
    assert f"the power helper at {socket} does not answer" in caplog.text
    assert "start tidegate-power-helper as root" in caplog.text
