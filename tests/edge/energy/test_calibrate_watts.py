"""What is read of watts while a window runs, by a sensor that knows only the present."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from sensortrees import COSTS, ORIN_NANO, profile, put_ina3221

from tidegate.edge.energy.calibrate_watts import look_at
from tidegate.edge.energy.sensors.panel import open_panel
from tidegate.edge.energy.sensors.sample import drawn_between


def test_watts_that_are_there_only_within_a_window_are_seen(tmp_path: Path) -> None:
    put_ina3221(tmp_path, ORIN_NANO)
    board = profile("jetson-orin-nano-8gb-super")
    panel = open_panel(board, sysroot=tmp_path, clock=time.monotonic, costs=COSTS)

    async def work() -> None:
        put_ina3221(tmp_path, {**ORIN_NANO, "VDD_IN": (5.0, 4.0)})
        await asyncio.sleep(0.3)
        put_ina3221(tmp_path, ORIN_NANO)

    before, after = asyncio.run(look_at(panel, work, every_s=0.005))
    joules, seconds = drawn_between(before, after), after.at_s - before.at_s
    assert joules is not None
    assert 15.0 < joules / seconds < 20.5
