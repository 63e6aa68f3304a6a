"""See the whole idea work, on this machine alone.

Converts the small assistant checkpoint to a 4-bit bundle, starts a broker, a cloud service and a
device daemon on loopback ports, asks about ten questions that take different routes, shows where
each ran and why, and stops everything again.

Example:
  tidegate demo
  tidegate demo --keep
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.errors import ConfigError, RequestError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Console

    from tidegate.cli.demo_script import DemoRequest
    from tidegate.cli.processes import Processes
    from tidegate.client import AsyncClient, EnergyUse

DEVICE_CONTEXT_TOKENS = 512
"""Below the model's own limit, so that the demo has a prompt that is too long for the device."""

_LINK_S = 30.0

_LOG_COLUMNS = 120
"""Width of the table where there is no terminal to ask."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table at the end."""

    title: str
    route: str
    reason: str
    tokens: int
    ttft_s: float | None
    tokens_per_s: float | None
    energy: EnergyUse | None = None
    as_expected: bool


@dataclass(frozen=True, kw_only=True)
class Urls:
    """Where the demo's services listen."""

    broker: str
    cloud: str
    device: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("examples/assistant"),
        help="folder with the checkpoints edge/ and cloud/ (default: examples/assistant)",
    )
    parser.add_argument(
        "--executor", choices=("auto", "onnx", "openvino"), default="auto", help="on the device"
    )
    parser.add_argument(
        "--profile",
        metavar="ID",
        help="of this board, or auto: the device schedules by energy and keeps account of joules,"
        " where it has sensors or watts to estimate them from",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every request took the route it should."""
    from rich.console import Console

    for name in ("edge", "cloud"):
        if not (args.models / name / "config.json").is_file():
            raise ConfigError("models", str(args.models), f"a folder with {name}/config.json")
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _LOG_COLUMNS
    with tempfile.TemporaryDirectory(prefix="tidegate-demo-") as folder:
        return _demo(args, Path(folder), console)


def _demo(args: argparse.Namespace, folder: Path, console: Console) -> int:
    from tidegate.cli.processes import Processes
    from tidegate.link.fleet import pair

    _convert(args.models / "edge", folder / "bundle", console)
    pair(folder / "device", folder / "gateway")
    with Processes(folder) as processes:
        urls = _start(processes, args, folder)
        console.print(f"\nbroker {urls.broker}   cloud {urls.cloud}   device {urls.device}\n")
        outcomes = asyncio.run(_ask_everything(urls.device, console))
        processes.check()
        print_table(outcomes, console)
        if args.profile is None:
            console.print("With --profile auto the device keeps account of joules.")
        if args.keep:
            _keep(urls, folder, console)
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1


def _convert(checkpoint: Path, bundle: Path, console: Console) -> None:
    from tidegate.cli.convert import print_summary
    from tidegate.cli.progress import progress_bars
    from tidegate.converters.convert import ConversionPlan, convert
    from tidegate.converters.recipe import make_recipe

    plan = ConversionPlan(
        model_id="assistant",
        targets=("onnx", "openvino"),
        recipe=make_recipe(bits=4, group_size=64, symmetric=False),
    )
    console.print(f"[bold]Converting {checkpoint} to a 4-bit bundle[/bold]")
    with progress_bars() as report:
        print_summary(convert(checkpoint, bundle, plan, report))


def _start(processes: Processes, args: argparse.Namespace, folder: Path) -> Urls:
    broker = processes.start("broker", ["broker", "--listen", f"127.0.0.1:{_free_port()}"])
    cloud = processes.start(
        "cloud",
        [
            "cloud",
            str(args.models / "cloud"),
            "--name",
            "assistant-cloud",
            "--threads",
            "1",  # at 10 M parameters a second thread costs more in waiting than it computes
            "--listen",
            "127.0.0.1:0",
            "--link",
            broker,
            "--keys",
            str(folder / "gateway"),
        ],
    )
    device = processes.start(
        "device",
        [
            "serve",
            str(folder / "bundle"),
            "--executor",
            args.executor,
            "--context",
            str(DEVICE_CONTEXT_TOKENS),
            "--listen",
            "127.0.0.1:0",
            "--link",
            broker,
            "--keys",
            str(folder / "device"),
            *(() if args.profile is None else ("--profile", args.profile)),
        ],
    )
    return Urls(broker=broker, cloud=cloud, device=device)


def _free_port() -> int:
    """A port nobody listens on now; the broker library cannot bind port 0 and tell which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _ask_everything(device: str, console: Console) -> list[Outcome]:
    from tidegate.cli.demo_script import REQUESTS
    from tidegate.client import AsyncClient

    async with AsyncClient(device) as client:
        await _wait_for_link(device)
        by_energy = (await _status(device))["energy"] is not None
        requests = [one.scheduled(by_energy=by_energy) for one in REQUESTS]
        outcomes = [await _ask(client, one, console) for one in requests if not one.while_busy]
        async with asyncio.TaskGroup() as tasks:
            busy = tasks.create_task(_keep_busy(client))
            await _wait_for_queue(device)
            outcomes += [await _ask(client, one, console) for one in requests if one.while_busy]
            busy.cancel()
    return outcomes


async def _status(device: str) -> dict[str, object]:
    import httpx

    async with httpx.AsyncClient(base_url=device, timeout=10, trust_env=False) as http:
        body = (await http.get("/status")).json()
    assert isinstance(body, dict)
    return body


async def _wait_for_link(device: str) -> None:
    """Wait until the device has seen the gateway's advert."""
    deadline_s = time.monotonic() + _LINK_S
    while time.monotonic() < deadline_s:
        link = (await _status(device))["link"]
        if isinstance(link, dict) and link["reachable"]:
            return
        await asyncio.sleep(0.1)
    raise UnavailableError(f"the device found no gateway within {_LINK_S:.0f} s")


async def _wait_for_queue(device: str) -> None:
    """Wait until requests queue up on the device, in its engine or before it."""
    deadline_s = time.monotonic() + _LINK_S
    while time.monotonic() < deadline_s:
        status = await _status(device)
        engine, energy = status["engine"], status["energy"]
        waiting = engine["waiting"] if isinstance(engine, dict) else 0
        waiting += energy["held"] if isinstance(energy, dict) else 0
        if waiting > 10:
            return
        await asyncio.sleep(0.02)
    raise UnavailableError("the device's queue did not fill")


async def _keep_busy(client: AsyncClient) -> None:
    """Background requests until cancelled, which cancels them too."""
    from tidegate.cli.demo_script import BUSY_REQUESTS, BUSY_WORK

    async def one(number: int) -> None:
        while True:
            await client.chat(f"hello number {number}", **BUSY_WORK)

    async with asyncio.TaskGroup() as tasks:
        for number in range(BUSY_REQUESTS):
            tasks.create_task(one(number))


async def _ask(client: AsyncClient, request: DemoRequest, console: Console) -> Outcome:
    """Stream one answer to the terminal and note how it went."""
    lines = request.prompt.splitlines()
    shown = lines[-1] if len(lines) == 1 else f"({len(lines) - 1} lines) {lines[-1]}"
    console.print(f"[bold cyan]{request.title}[/bold cyan]  [dim]{shown}[/dim]", markup=True)
    began_s, first_s = time.monotonic(), None
    stream = client.stream(request.prompt, **request.options)
    try:
        async with stream:
            async for text in stream:
                first_s = first_s or time.monotonic() - began_s
                console.print(text, end="", markup=False)
        answer = stream.answer
    except RequestError as error:
        console.print(f"  refused: {error}", markup=False)
        return Outcome(
            title=request.title,
            route="refused",
            reason=str(error),
            tokens=0,
            ttft_s=None,
            tokens_per_s=None,
            as_expected=request.expected == "refused" and error.status == 422,
        )
    console.print()
    return Outcome(
        title=request.title,
        route=str(answer.route),
        reason=answer.reason,
        tokens=answer.usage.completion_tokens,
        ttft_s=first_s,
        tokens_per_s=answer.timings.tokens_per_s,
        energy=answer.energy,
        as_expected=answer.route in request.right,
    )


def print_table(outcomes: list[Outcome], console: Console) -> None:
    """Where each request ran, why, how fast and with how many joules."""
    from rich.table import Table
    from rich.text import Text

    from tidegate.cli.energy_text import energy_lines

    told = "joules above idling, of what and how they are known; - where nobody keeps account"
    table = Table(
        title="Where each request ran, and why",
        title_justify="left",
        caption=told,
        caption_justify="left",
    )
    table.add_column("request")
    table.add_column("route", no_wrap=True)
    table.add_column("why", ratio=1)
    for name in ("tokens", "first token", "tokens/s", "joules"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in outcomes:
        route = one.route if one.as_expected else f"[red]{one.route}, unexpected[/red]"
        first = "" if one.ttft_s is None else f"{one.ttft_s * 1000:.0f} ms"
        rate = "" if one.tokens_per_s is None else f"{one.tokens_per_s:.0f}"
        reason, energy = Text(one.reason), Text(energy_lines(one.energy))
        table.add_row(one.title, route, reason, str(one.tokens), first, rate, energy)
    console.print()
    console.print(table)


def _keep(urls: Urls, folder: Path, console: Console) -> None:
    console.print(f"\ndevice    {urls.device}/v1 (OpenAI API), {urls.device}/status")
    console.print(f"cloud     {urls.cloud}/v1\nbroker    {urls.broker}\nlogs      {folder}/*.log")
    console.print("Running until Ctrl-C.")
    try:
        signal.pause()
    except KeyboardInterrupt:
        console.print("Stopping.")
