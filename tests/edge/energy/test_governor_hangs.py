"""What does not answer: a sensor, and a tool in the middle of a switch while the daemon closes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from governedboard import ToyBoard, World, energy_settings, going
from powerboards import cpufreq_of, write_cpufreq
from virtualtime import run_virtually, virtual_now_s

from tidegate.edge.energy.cpufreq import CpufreqSwitch
from tidegate.edge.energy.governor_modes import ModeKeeper
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.power_writes import HelperWrites, OwnWrites
from tidegate.edge.energy.sensors.sample import BatteryState
from tidegate.errors import ActuationError


def ask(name: str) -> Ask:
    return Ask(id=name, kind="chat", prompt_tokens=50, most_tokens=200)


def test_a_sensor_that_hangs_is_said_delays_no_answer_and_takes_no_limit_away() -> None:
    async def main() -> None:
        battery = BatteryState(share=0.5, plugged=False, full_j=100_000.0)
        world = World(celsius=84.5, battery=battery)
        board = ToyBoard(world, settings=energy_settings(until="06:00"))
        with going(board.governor.run(), board.engine()):
            await asyncio.sleep(12)
            assert world.mode == "slow"
            world.hangs = True
            await asyncio.sleep(7)
            view = board.governor.view()
            assert any("no answer for 5 s" in fault for fault in view.faults)
            assert (view.celsius, view.watts, view.battery) == (None, None, None)
            assert board.governor.board.outlook.fastest == 0
            began_s = virtual_now_s()
            await board.ask(ask("a"), 1)
            assert virtual_now_s() - began_s < 0.3  # the prompt's 0.25 s, and no wait for a sample
            assert board.governor.view().plan is not None
            await asyncio.sleep(70)
            view = board.governor.view()
            assert view.plan is None
            assert any("no temperature" in fault for fault in view.faults)
            assert any("no battery can be read" in fault for fault in view.faults)
            assert view.failures == 0
            world.hangs = False
            await asyncio.sleep(3)
            view = board.governor.view()
            assert (view.faults, view.celsius) == ((), 84.5)
            assert view.plan is not None

    run_virtually(main())


def test_a_sensor_that_hangs_from_the_start_keeps_nobody_waiting() -> None:
    async def main() -> None:
        board = ToyBoard(World(hangs=True), settings=energy_settings())
        with going(board.governor.run(), board.engine()):
            await asyncio.sleep(6)
            await board.ask(ask("a"), 20)
            assert board.placed["a"] is not None
            assert board.governor.view().faults != ()

    run_virtually(main())


def test_a_switch_that_never_ends_is_not_waited_for_without_end() -> None:
    class Stuck:
        tool = "own"
        modes: tuple[str, ...] = ("slow", "fast")

        def current(self) -> str | None:
            return "fast"

        def switch(self, mode: str) -> None:
            """Never reached: the thread is stuck."""

        def close(self) -> None:
            """Nothing to restore."""

    async def never(work: Callable[[], object]) -> object:
        return await asyncio.get_running_loop().create_future()

    async def main() -> None:
        keeper = ModeKeeper(
            Stuck(),
            Stuck.modes,
            clock=virtual_now_s,
            in_thread=never,  # type: ignore[arg-type]
            changed=lambda: None,
        )
        assert keeper.want(0, "why")
        await keeper.settled()
        assert 5 < virtual_now_s() < 30

    run_virtually(main())


class SlowWrites(OwnWrites):
    """Whose first line of a switch is under way until it is let go."""

    def __init__(self, sysroot: Path) -> None:
        super().__init__(sysroot)
        self.slow = False
        self.asked, self.let_go = threading.Event(), threading.Event()

    def ask(self, line: str) -> str:
        if self.slow:
            self.asked.set()
            assert self.let_go.wait(10)
        return super().ask(line)


def test_closing_during_a_switch_leaves_the_board_as_it_was_found(tmp_path: Path) -> None:
    write_cpufreq(tmp_path, 2)
    writes = SlowWrites(tmp_path)
    switch = CpufreqSwitch(writes, tmp_path)
    names = ("scaling_max_freq", "energy_performance_preference")
    before = [cpufreq_of(tmp_path, name) for name in names]
    refused: list[Exception] = []

    def change() -> None:
        try:
            switch.switch("0.6")
        except ActuationError as error:
            refused.append(error)

    writes.slow = True
    thread = threading.Thread(target=change)
    thread.start()
    assert writes.asked.wait(10)
    switch.close()
    writes.let_go.set()
    thread.join(10)
    assert [cpufreq_of(tmp_path, name) for name in names] == before
    assert "the daemon is closing" in str(refused[0])


def test_closing_wakes_who_waits_for_the_helper_and_nothing_is_asked_of_it_after_that(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s"
    told: list[str] = []
    refused: list[str] = []
    asked = threading.Event()

    def helper(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, client.makefile("rw") as lines:
            for line in lines:
                told.append(line.strip())
                if line == "hello\n":
                    lines.write("ok 1\n")
                    lines.flush()
                else:
                    asked.set()  # and never answered

    def change() -> None:
        for line in ("freq 0 1", "freq 1 1"):
            try:
                writes.ask(line)
            except ActuationError as error:
                refused.append(str(error))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threads = [threading.Thread(target=helper, args=(listener,))]
        threads[0].start()
        writes = HelperWrites(path)
        threads.append(threading.Thread(target=change))
        threads[1].start()
        assert asked.wait(10)
        writes.close()
        for thread in threads:
            thread.join(5)  # far below the 15 s that an answer may take
            assert not thread.is_alive()
    assert told == ["hello", "freq 0 1"]
    assert len(refused) == 2
    assert all("the daemon is closing" in one for one in refused)
