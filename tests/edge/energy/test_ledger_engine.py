"""An engine, a ledger and a panel over a counter that moves as the engine works."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sensortrees import COSTS, UNKNOWN, panel_of, profile, put_rapl
from toyengine import ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor, VirtualClock

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.ledger import EnergyLedger
from tidegate.engine.events import EnergyUse
from tidegate.engine.executor import PagedGeometry
from tidegate.engine.steps import StepReport

IDLE_W, BUSY_W = 2.0, 11.0
REQUESTS = {"short": ((5, 6, 7), 4), "long": ((8, 9, 10), 40), "wordy": (tuple(range(5, 85)), 4)}


class Bench:
    """A machine whose package draws some watts while steps run and others else."""

    def __init__(self, sysroot: Path, costs: CostModel, *, counter: bool = True) -> None:
        self.sysroot, self.clock, self.counter = sysroot, VirtualClock(), counter
        self.busy_s = 0.0
        self.draw()
        self.panel = panel_of(profile("generic-x86-64"), sysroot, self.clock, costs)
        self.ledger = EnergyLedger(costs, self.panel, self.clock)
        self.reports = 0

    def draw(self) -> None:
        """Move the counter to where it is by now."""
        joules = IDLE_W * self.clock.now_s + (BUSY_W - IDLE_W) * self.busy_s
        if self.counter:
            put_rapl(self.sysroot, 500.0 + joules)

    def look(self) -> None:
        self.draw()
        self.ledger.settle(self.panel.sample())

    def stepped(self, report: StepReport) -> None:
        self.busy_s += report.elapsed_s
        self.ledger.stepped(report, 0)
        self.reports += 1
        if self.reports % 3 == 0:
            self.look()

    def answer(self) -> dict[str, EnergyUse | None]:
        """Idle for a while, answer all requests at once, look once more."""
        for _ in range(10):
            self.clock.advance(1.0)
            self.look()
        behaviour = Behaviour(clock=self.clock, step_s=0.02, token_s=0.001)
        executor = ToyExecutor(
            PagedGeometry(blocks=64, block_tokens=4, bytes_per_token=8),
            step_tokens=32,
            behaviour=behaviour,
        )

        async def run() -> None:
            async with serving(toy_engine(executor, eos=False, watcher=self.stepped)) as engine:
                asks = (
                    ask(name, prompt, max_tokens=tokens)
                    for name, (prompt, tokens) in REQUESTS.items()
                )
                await asyncio.gather(*(collect(engine.submit(one)) for one in asks))

        asyncio.run(run())
        self.look()
        return {name: self.ledger.use_of(name) for name in REQUESTS}


@pytest.mark.parametrize("costs", [COSTS, UNKNOWN], ids=["costs", "no watts"])
def test_concurrent_answers_share_what_the_counter_moved_above_idling(
    tmp_path: Path, costs: CostModel
) -> None:
    bench = Bench(tmp_path, costs)
    uses = bench.answer()
    joules = {name: use.joules for name, use in uses.items() if use is not None}
    assert joules.keys() == REQUESTS.keys()
    assert {(use.source, use.scope) for use in uses.values() if use is not None} == {
        ("measured", "package")
    }
    above_j = (BUSY_W - IDLE_W) * bench.busy_s
    assert sum(joules.values()) == pytest.approx(above_j, rel=1e-3)
    assert joules["short"] < joules["wordy"] < joules["long"]


def test_without_a_sensor_the_same_answers_are_told_from_the_costs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, COSTS, counter=False)
    uses = bench.answer()
    joules = {name: use.joules for name, use in uses.items() if use is not None}
    assert {(use.source, use.scope) for use in uses.values() if use is not None} == {
        ("estimated", "module")
    }
    low_w, high_w = COSTS.modes[0].decode_w - 2.0, COSTS.modes[0].prefill_w - 2.0
    assert low_w * bench.busy_s < sum(joules.values()) < high_w * bench.busy_s
    totals = bench.ledger.totals()
    assert totals["module", "estimated", "edge"] == pytest.approx(sum(joules.values()))
    idle_j = totals["module", "estimated", "idle"]
    assert idle_j == pytest.approx(COSTS.idle_w * bench.clock.now_s)
    assert bench.panel.sample().joules == pytest.approx(idle_j + sum(joules.values()))
