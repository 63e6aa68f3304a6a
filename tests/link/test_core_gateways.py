"""Which gateways a device knows, for how long, and which of them it asks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from coreends import OFFERS, Ends, published, started
from linklab import CrashingDatabase

from tidegate.link import gateway_store
from tidegate.link.counters import Tally
from tidegate.link.effects import (
    Publish,
)
from tidegate.link.fleet import add_gateway
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_directory import GatewayDirectory
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.identity import load_device
from tidegate.link.messages import Call
from tidegate.link.prekeys import ModelOffer, PrekeyStore


def test_only_a_gateway_with_the_model_is_asked(ends: Ends) -> None:
    ends.ask(model="other")
    assert ends.device.poll(0.1) == []
    advert = ends.gateway.advert((*OFFERS, ModelOffer(id="other", context_tokens=512)), 0.0)
    ends.to_device(advert)
    assert isinstance(ends.device.poll(2.0)[0], Publish)


def test_an_older_advert_than_the_known_one_is_rejected(ends: Ends) -> None:
    older = ends.gateway.advert(OFFERS, 0.1)
    newer = ends.gateway.advert(OFFERS, 0.2)
    ends.to_device(newer)
    ends.to_device(newer)
    ends.to_device(older)
    assert [advert.load for advert in ends.device.gateways(ends.now_s)] == [0.2]
    assert ends.device.tally.snapshot().adverts_rejected == 1


def test_an_advert_under_another_gateways_topic_is_rejected(ends: Ends) -> None:
    advert = ends.gateway.advert(OFFERS, 0.1)
    ends.device.receive(0.0, "tidegate/1/home/gw/gw1/advert", advert.payload)
    assert ends.device.tally.snapshot().adverts_rejected == 1


def new_directory(ends: Ends, *, off_s: float = 0.0) -> GatewayDirectory:
    return GatewayDirectory(
        load_device(ends.root / "device"),
        timing=ends.timing,
        rng=random.Random(0),
        wall_s=lambda: ends.wall_s() + off_s,
        tally=Tally(),
    )


@pytest.mark.parametrize("off_s", [-590, 590])
def test_a_gateway_is_alive_on_a_clock_that_is_off_as_long_as_it_advertises(
    tmp_path: Path, off_s: int
) -> None:
    ends = Ends(tmp_path)
    directory = new_directory(ends, off_s=off_s)
    for _ in range(2):
        advert = ends.gateway.advert(OFFERS, 0.1)
        directory.receive(0.0, advert.topic, advert.payload)
    assert len(directory.alive(0.0)) == 1
    assert directory.alive(ends.timing.advert_valid_s + 1) == []
    ends.close()


def test_an_advert_the_broker_kept_of_a_dead_gateway_shows_none(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    advert = ends.gateway.advert(OFFERS, 0.1)
    ends.now_s += ends.timing.advert_valid_s + 1
    directory = new_directory(ends)
    assert not directory.receive(ends.now_s, advert.topic, advert.payload)
    assert directory.alive(ends.now_s) == []
    ends.close()


def test_a_gateway_is_forgotten_when_its_advert_expires(ends: Ends) -> None:
    assert len(ends.device.gateways(ends.now_s)) == 1
    ends.now_s = ends.timing.advert_valid_s + 1
    assert ends.device.gateways(ends.now_s) == []


def second_gateway(ends: Ends) -> Publish:
    """Another gateway of the fleet, as busy as can be: it refuses everything."""
    identity = add_gateway(ends.root / "gateway" / "fleet", ends.root / "gateway1", "gw1")
    prekeys = PrekeyStore(ends.root / "prekeys1.json")
    ends.other = GatewayCore(
        keys=GatewayKeys(
            identity=identity, prekeys=prekeys, registry=ends.registry, wall_s=ends.wall_s
        ),
        store=GatewayStore(CrashingDatabase(ends.root / "g1.sqlite", gateway_store.SCHEMA)),
        timing=ends.timing,
        max_requests=1,
        wall_s=ends.wall_s,
        now_s=ends.now_s,
    )
    return ends.other.advert(OFFERS, 0.9)


def test_a_gateway_without_room_is_left_for_another_one(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=1)
    ends.meet()
    busy = ends.seal_as("device", Call(have=0, credit=1, ttl_ms=9000, body=b""))
    started(ends.to_gateway(busy))
    other = second_gateway(ends)
    request_id = ends.ask()
    refused = ends.request()
    ends.to_device(other)
    (refusal,) = published(ends.to_gateway(refused))
    assert ends.to_device(refusal) == []
    moved = ends.request()
    assert "/gw/gw1/" in moved.topic
    assert started(ends.other.receive(0.0, moved.topic, moved.payload)).request.body == b"prompt"
    assert ends.device.tally.snapshot().moves == 1
    assert ends.device.remaining_s(0.0, request_id) is not None
    ends.close()


def test_a_gateway_that_left_requests_unanswered_comes_last_until_it_is_heard(
    tmp_path: Path,
) -> None:
    ends = Ends(tmp_path)
    ends.meet()
    ends.ask()
    for wait_s in (0.1, 5.0):
        assert "/gw/gw0/" in ends.device.poll(wait_s)[0].topic  # type: ignore[union-attr]
    ends.to_device(second_gateway(ends))
    ends.now_s = 15.0
    (moved,) = ends.device.poll(15.0)
    assert isinstance(moved, Publish)
    assert "/gw/gw1/" in moved.topic
    ends.ask()
    (fresh,) = ends.device.poll(15.1)
    assert isinstance(fresh, Publish)
    assert "/gw/gw1/" in fresh.topic, "a new request does not try the silent one either"
    ends.close()
