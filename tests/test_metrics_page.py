"""docs/metrics.md names everything that a scrape has, and a scrape has everything it names."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import httpx
from energyviews import full_view
from keyedapp import keyed_access
from linklab import FAST
from linkpair import ScriptedCloud
from toyengine import toy_engine
from toypool import toy_pool

from tidegate.api.encoder_metrics import EncoderMetrics
from tidegate.api.encoders import Encoders
from tidegate.api.engine_metrics import render_engine
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.metrics import Metrics, render_counters
from tidegate.cloud.access_metrics import AccessMetrics
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.cloud.usage import UsageRow
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.energy.metrics import render_energy
from tidegate.engine.prefix_disk import StoreNumbers
from tidegate.engine.text_batcher import BatchSeen
from tidegate.link.counters import LinkCounters
from tidegate.link.device import DeviceLink
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.memory import MemoryBroker, MemoryTransport

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")

USED = UsageRow(
    id="0",
    key_id="key-1",
    key_name="team",
    request_id="r",
    endpoint="/v1/chat/completions",
    model="m",
    began_s=0.0,
    ended_s=1.0,
    status=200,
    outcome="ok",
    prompt_tokens=3,
    cached_tokens=1,
    completion_tokens=2,
    cost_nano=5,
)


RUN = BatchSeen(texts=1, tokens=3, padded_tokens=3, calls=1, waited_s=(0.0,), run_s=0.1)
DISK = StoreNumbers(kept_bytes=1, units=1, writes=1)


async def scrape(tmp_path: Path) -> str:
    """What the cloud says with everything on, and a device with a disk tier and sensors."""
    pair(tmp_path / "device", tmp_path / "gateway")
    pool = toy_pool()
    await pool.start()
    backend = CloudBackend(pool, created_s=0)
    backend.gateway = Gateway(
        tmp_path / "gateway", MemoryTransport(MemoryBroker()), ScriptedCloud(()), timing=FAST
    )
    backend.access = keyed_access(tmp_path / "state")
    settings = HttpSettings(admission=backend.access)
    metrics = Metrics(vllm_names=True)
    metrics.watch_certificate(lambda: 0.0)
    encoders = Encoders(metrics=EncoderMetrics())
    assert encoders.metrics is not None
    encoders.metrics.watch("e", lambda: 0)
    encoders.metrics.saw("e", RUN)
    app = create_app(backend, settings=settings, metrics=metrics, encoders=encoders)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/metrics")
            assert answer.status_code == 200
    finally:
        await pool.close()
        await backend.access.close()
        await backend.gateway.close()
    with_disk = replace(toy_engine().snapshot(), disk=DISK)
    of_device = render_engine("m", with_disk) + render_energy(full_view())
    return answer.text + of_device.decode()


def test_a_scrape_has_what_the_page_names_and_nothing_else(tmp_path: Path) -> None:
    named = set(re.findall(r"^\| `((?:tidegate|process)_[a-z_0-9]+)", PAGE, re.MULTILINE))
    text = asyncio.run(scrape(tmp_path))
    exposed = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    assert {name for name in exposed if not name.startswith("vllm:")} == named


def test_labels_are_those_of_the_page(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(tidegate_[a-z0-9_]+)` \| (`[a-z_`, ]+`) \|", PAGE, re.MULTILINE)
    labels = {name: set(re.findall(r"`([a-z_]+)`", listed)) for name, listed in rows}
    text = asyncio.run(scrape(tmp_path))
    for name, listed in re.findall(r"^(tidegate_[a-z0-9_]+)\{(.*?)\} ", text, re.MULTILINE):
        family = name if name in labels else re.sub(r"_(bucket|sum|count)$", "", name)
        told = set(re.findall(r'([a-z_]+)="', listed)) - {"le"}
        assert told == labels.get(family, {"path"}), name  # the link's path has no column


def test_vllms_names_are_those_that_the_page_promises(tmp_path: Path) -> None:
    text = asyncio.run(scrape(tmp_path))
    exposed = set(re.findall(r"^# TYPE vllm:(\S+) ", text, re.MULTILINE))
    calls_and_engine = PAGE[: PAGE.index("## Models")]
    rows = re.findall(r"^\| `tidegate_([a-z0-9_]+)` \|", calls_and_engine, re.MULTILINE)
    without = ("requests_total", "admission_rejections_total", "http_responses_total")
    same = {name for name in rows if name not in without and not name.startswith("engine_")}
    older = set(re.findall(r"`vllm:([a-z_]+)`", PAGE))
    assert exposed == same | older
    assert older & same == set()


def test_every_counter_has_its_line_and_every_line_a_counter() -> None:
    named = re.findall(r"^\| `tidegate_link_([a-z_]+)_total` \|", PAGE, re.MULTILINE)
    assert named == [field.name for field in fields(LinkCounters)]


def test_what_is_exposed_bears_the_names_of_the_page() -> None:
    text = render_counters("tidegate_link", asdict(LinkCounters(sent=3))).decode()
    for name in re.findall(r"`(tidegate_link_[a-z_]+_total)`", PAGE):
        assert f"\n{name} " in text
    assert "tidegate_link_sent_total 3.0" in text


def test_both_ends_expose_every_counter_of_the_page(tmp_path: Path) -> None:
    names = re.findall(r"`(tidegate_link_[a-z_]+_total)`", PAGE)

    async def main() -> None:
        pair(tmp_path / "device", tmp_path / "gateway")
        broker = MemoryBroker()
        device = DeviceLink(tmp_path / "device", MemoryTransport(broker), timing=FAST)
        backend = CloudBackend(toy_pool(), created_s=0)
        backend.gateway = Gateway(
            tmp_path / "gateway", MemoryTransport(broker), ScriptedCloud(()), timing=FAST
        )
        for text in (CloudLeg(device).metrics().decode(), backend.metrics().decode()):
            assert all(f"\n{name} 0.0\n" in text for name in names)
        await backend.gateway.close()
        await device.close()

    asyncio.run(main())


def test_every_metric_of_keys_has_its_line_with_its_labels() -> None:
    rows = re.findall(r"^\| `(tidegate_(?:key|access)_[a-z_]+)` \| (.*?) \|", PAGE, re.MULTILINE)
    named = {name: set(re.findall(r"`([a-z]+)`", labels)) for name, labels in rows}
    families = list(AccessMetrics(per_key=False).registry.collect())
    assert named.keys() == {f"{family.name}_total" for family in families}
    metrics = AccessMetrics(per_key=False)
    metrics.refused("tokens_rate")
    metrics.used(USED)
    exposed = {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert exposed == named
