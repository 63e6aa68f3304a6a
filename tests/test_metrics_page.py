"""docs/metrics.md names every counter of the link and of keys, and each is exposed."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict, fields
from pathlib import Path

from linklab import FAST
from linkpair import ScriptedCloud
from toyengine import toy_engine

from tidegate.api.metrics import render_counters
from tidegate.cloud.access_metrics import AccessMetrics
from tidegate.cloud.service import CloudBackend
from tidegate.cloud.usage import UsageRow
from tidegate.edge.cloud_leg import CloudLeg
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
        backend = CloudBackend(toy_engine(), created_s=0)
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
