"""An answer under attack: whatever is done to its chunks, what is delivered is a true beginning."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linklab import FAST, new_peers

from tidegate.errors import SealError
from tidegate.link.device_session import Deliver, DeviceSession
from tidegate.link.device_states import State
from tidegate.link.envelope import DeviceAttempt, GatewayAttempt
from tidegate.link.gateway_session import GatewaySession
from tidegate.link.messages import Bundle, Status

PEERS = new_peers()
ANSWER = [b"The ", b"tide", b"", b" is rising", b"."]


@dataclass
class Receiver:
    """The device's side: opens what it is given, as the core does."""

    keys: DeviceAttempt
    session: DeviceSession
    got: list[bytes] = field(default_factory=list)
    refused: int = 0

    def take(self, message: bytes) -> None:
        try:
            number, final, data = self.keys.open_response(message)
        except SealError:
            self.refused += 1
            return
        bundle = Bundle.decode(data)
        assert final == (bundle.status is not Status.MORE)
        for action in self.session.on_bundle(0.0, 0, number, bundle):
            if isinstance(action, Deliver):
                assert action.first == len(self.got)
                self.got += action.payloads


def new_stream(payloads_per_chunk: int) -> tuple[Receiver, list[bytes]]:
    """A receiver and the sealed chunks of ANSWER, in order."""
    message, keys = PEERS.seal(b"prompt")
    gateway: GatewayAttempt = PEERS.open(message)
    session = DeviceSession(
        timing=FAST, rng=random.Random(0), now_s=0.0, deadline_s=60.0, connect_by_s=None
    )
    session.send(0.0)
    sender = GatewaySession(timing=FAST, now_s=0.0, stored=[])
    bundles = sender.poll(0.0)
    for at in range(0, len(ANSWER), payloads_per_chunk):
        for payload in ANSWER[at : at + payloads_per_chunk]:
            sender.produce(payload)
        bundles += sender.poll(0.0)
    sender.finish(Status.COMPLETE, "")
    bundles += sender.poll(0.0)
    chunks = [
        gateway.seal_response(bundle.encode(), final=bundle.status is not Status.MORE)
        for bundle in bundles
    ]
    return Receiver(keys, session), chunks


def test_an_untouched_stream_is_delivered_whole() -> None:
    receiver, chunks = new_stream(2)
    for chunk in chunks:
        receiver.take(chunk)
    assert receiver.got == ANSWER
    assert receiver.session.state is State.DONE


attacks = st.lists(
    st.tuples(
        st.sampled_from(["pass", "replay", "splice", "cut", "flip", "renumber", "forge final"]),
        st.integers(0, 1000),
    ),
    max_size=40,
)


@given(st.integers(1, 5), attacks)
def test_no_attack_on_chunks_changes_what_is_delivered(
    payloads_per_chunk: int, attack: list[tuple[str, int]]
) -> None:
    receiver, chunks = new_stream(payloads_per_chunk)
    _, foreign = new_stream(payloads_per_chunk)
    passed: set[int] = set()
    refused = 0
    for act, at in attack:
        index = at % len(chunks)
        chunk = chunks[index]
        match act:
            case "pass" | "replay":
                passed.add(index)
                if receiver.session.state is State.DONE:
                    continue
                receiver.take(chunk)
                continue
            case "splice":
                chunk = chunk[:124] + foreign[index][124:]
            case "cut":
                chunk = chunk[: at % len(chunk)]
            case "flip":
                place = at % len(chunk)
                chunk = chunk[:place] + bytes((chunk[place] ^ 0x10,)) + chunk[place + 1 :]
            case "renumber":
                chunk = chunk[:19] + (index + 1 + at).to_bytes(8, "big") + chunk[27:]
            case "forge final":
                chunk = chunk[:27] + bytes((chunk[27] ^ 1,)) + chunk[28:]
        receiver.take(chunk)
        refused += 1
    assert receiver.refused == refused
    assert receiver.got == ANSWER[: len(receiver.got)]
    whole = receiver.session.state is State.DONE
    assert not whole or receiver.got == ANSWER
    assert whole == passed.issuperset(range(1, len(chunks)))


@given(st.permutations(range(7)))
def test_chunks_in_any_order_come_out_in_theirs(order: list[int]) -> None:
    receiver, chunks = new_stream(1)
    assert len(chunks) == len(order)
    for index in order:
        receiver.take(chunks[index])
    assert receiver.got == ANSWER
    assert receiver.session.state is State.DONE


@pytest.mark.parametrize("kept", range(6))
def test_a_stream_that_is_cut_never_counts_as_whole(kept: int) -> None:
    receiver, chunks = new_stream(1)
    for chunk in chunks[:kept]:
        receiver.take(chunk)
    assert receiver.session.state is not State.DONE
    assert receiver.got == ANSWER[: max(0, kept - 1)]
