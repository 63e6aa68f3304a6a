"""`open_governor`: the governor of one daemon, put together from its settings and what it runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.energy.actuate import ModeSwitch
from tidegate.edge.energy.board_costs import explained_costs
from tidegate.edge.energy.corrections import OnlineCosts
from tidegate.edge.energy.cost import CostModel, RadioCost
from tidegate.edge.energy.governor import Governor
from tidegate.edge.energy.governor_budget import Budget
from tidegate.edge.energy.governor_cloud import CloudTimes, network_kind, radio_of
from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_heat import HeatWatch, poles_of
from tidegate.edge.energy.governor_trace import DecisionLog
from tidegate.edge.energy.ledger import EnergyLedger
from tidegate.edge.energy.own_modes import own_modes
from tidegate.edge.energy.sensors.panel import open_panel
from tidegate.edge.energy.settings import EnergySettings
from tidegate.edge.energy.some_modes import some_modes
from tidegate.edge.energy.switches import open_switch
from tidegate.edge.executors.choice import ExecutorSettings
from tidegate.engine.executor import Executor, Unloadable
from tidegate.errors import ConfigError
from tidegate.model.bundle import Bundle

_log = logging.getLogger(__name__)

_WH_J = 3600.0


@contextmanager
def open_governor(
    settings: EnergySettings,
    runs: ExecutorSettings,
    bundle: Bundle,
    executor: Executor,
    cloud: CloudLeg | None,
) -> Iterator[Governor]:
    """A governor that has not begun; the board is left as it was found in the end.

    Args:
        settings: what the owner wants.
        runs: how the model runs.
        bundle: of the model.
        executor: that runs it, for modes of its own.
        cloud: None for a device without a link.

    Raises:
        ConfigError: the file for decisions cannot be written.
        ProfileError: the calibration is wrong, or of another board.
    """
    profile = settings.profile
    with ExitStack() as stack:
        switch = open_switch(
            profile,
            switching=settings.switching,
            helper=settings.helper,
            sysroot=settings.sysroot,
            own=own_modes(executor),
        )
        stack.callback(switch.close)
        estimate = explained_costs(
            profile,
            bundle,
            runs,
            modes=switch.modes,
            rows=executor.limits.step_rows,
            calibration=settings.calibration,
        )
        costs = estimate.costs
        switch = some_modes(switch, [one.name for one in costs.modes])
        modes = ", ".join(switch.modes)
        _log.info("energy: %s, power modes by %s: %s", profile.id, switch.tool, modes)
        why = "; ".join(estimate.why)
        _log.info("energy: costs are %s, watts of scope %s: %s", costs.source, costs.scope, why)
        device = _device(settings, costs, switch, executor, cloud)
        record = None if settings.decisions is None else _record(settings.decisions, stack)
        yield Governor(settings, device, record=record)


def _device(
    settings: EnergySettings,
    costs: CostModel,
    switch: ModeSwitch,
    executor: Executor,
    cloud: CloudLeg | None,
) -> Device:
    profile, sysroot = settings.profile, settings.sysroot
    panel = open_panel(profile, sysroot=sysroot, clock=time.monotonic, costs=costs)
    capacity_wh = profile.battery.capacity_wh

    def radio() -> RadioCost | None:
        return radio_of(profile, network_kind(sysroot))

    def loaded() -> bool:
        return executor.loaded if isinstance(executor, Unloadable) else True

    async def link_up() -> bool:
        return cloud is not None and (await cloud.signals()).reachable

    return Device(
        costs=OnlineCosts(costs),
        panel=panel,
        ledger=EnergyLedger(costs, panel, time.monotonic),
        switch=switch,
        cloud=None if cloud is None else CloudTimes.guess(settings.joule_price, None),
        heat=HeatWatch(poles_of(profile.thermal)),
        budget=Budget(
            settings=settings,
            capacity_j=None if capacity_wh is None else capacity_wh * _WH_J,
        ),
        loaded=loaded,
        link_up=None if cloud is None else link_up,
        radio=radio,
    )


def _record(path: Path, stack: ExitStack) -> DecisionLog:
    try:
        log = DecisionLog(path)
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise ConfigError("energy.decisions", str(path), allowed) from error
    stack.callback(log.close)
    return log
