"""The tables of states: the document shows them, and the sessions do nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.link import device_states, gateway_states
from tidegate.link.device_session import Deliver, DeviceSession, End, SendAck, SendCancel
from tidegate.link.gateway_session import GatewaySession
from tidegate.link.messages import Bundle, Control, ControlKind, Status
from tidegate.link.timing import Timing

DOCUMENT = Path(__file__).parents[2] / "docs" / "link-sessions.md"
TIMING = Timing(pacing="off", credit=4)
ENDS: list[Any] = [device_states, gateway_states]


def rows(table: Any) -> list[str]:
    """The table as Markdown: one line for each state and event, in the order of the code."""
    lines = []
    for state, events in table.STEPS.items():
        for event in table.Event:
            if event in events:
                step = events[event]
                effects = ", ".join(one.value for one in table.Effect if one in step.effects)
                lines.append(f"| {state.value} | {event.value} | {step.to.value} | {effects} |")
    return lines


@pytest.mark.parametrize("table", ENDS, ids=["device", "gateway"])
def test_the_document_shows_exactly_the_table_of_the_code(table: Any) -> None:
    end = table.__name__.rpartition(".")[2].removesuffix("_states")
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## The {end}'s states\n")[1]
    shown = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
    assert shown[2:] == rows(table)


@pytest.mark.parametrize("table", ENDS, ids=["device", "gateway"])
def test_every_state_can_be_reached_and_every_other_than_an_end_can_be_left(table: Any) -> None:
    steps = table.STEPS
    first = next(iter(steps))
    reached, todo = {first}, [first]
    while todo:
        for step in steps[todo.pop()].values():
            if step.to not in reached:
                reached.add(step.to)
                todo.append(step.to)
    assert reached == set(table.State) == set(steps)
    for state, events in steps.items():
        assert (state in table.TERMINAL) == (not events)
        ways_out = {step.to for step in events.values()} & table.TERMINAL
        assert state in table.TERMINAL or len(ways_out) >= 2


class Walk(DeviceSession):
    """A session that writes down its steps."""

    def __init__(self, have: int) -> None:
        self.steps: list[tuple[device_states.State, device_states.Event]] = []
        super().__init__(
            timing=TIMING,
            rng=random.Random(0),
            now_s=0.0,
            deadline_s=50.0,
            connect_by_s=10.0,
            have=have,
        )

    def _go(self, event: device_states.Event) -> None:
        self.steps.append((self.state, event))
        super()._go(event)


device_acts = st.lists(
    st.tuples(
        st.sampled_from(["send", "bundle", "cancel", "poll", "late", "stop"]),
        st.integers(0, 6),
        st.integers(0, 2),
        st.sampled_from(list(Status)),
    ),
    max_size=30,
)
_EFFECTS = {
    Deliver: device_states.Effect.DELIVER,
    SendAck: device_states.Effect.ACK,
    SendCancel: device_states.Effect.STOP,
    End: device_states.Effect.END,
}


@given(st.integers(0, 3), device_acts)
def test_the_device_takes_no_step_outside_its_table(
    have: int, acts: list[tuple[str, int, int, Status]]
) -> None:
    session = Walk(have)
    now_s = 0.0
    for act, first, count, status in acts:
        state, refused = session.state, session.out_of_turn
        session.steps.clear()
        actions: list[Any] = []
        match act:
            case "send":
                if session.due_to_send(now_s + 40.0):
                    session.send(now_s)
            case "bundle":
                code = "failed" if status is Status.FAILED else ""
                payloads = (b"x",) * count
                bundle = Bundle(first=first, payloads=payloads, status=status, code=code)
                actions = session.on_bundle(now_s, max(0, session.next_attempt - 1), 0, bundle)
            case "cancel":
                actions = session.cancel()
            case "stop":
                actions = session.stop("stopped")
            case "poll" | "late":
                now_s += 0.3 if act == "poll" else 20.0
                actions = session.poll(now_s)
        at = state
        allowed: set[device_states.Effect] = set()
        for step_state, event in session.steps:
            assert step_state is at
            step = device_states.STEPS[at][event]
            allowed |= step.effects
            at = step.to
        assert session.state is at
        if not session.steps and state not in device_states.TERMINAL:
            # Time alone may acknowledge what is there; that is no event.
            allowed.add(device_states.Effect.ACK)
        assert {_EFFECTS[type(action)] for action in actions} <= allowed
        wanted = {
            "bundle": device_states.Event.LIFE,
            "cancel": device_states.Event.CANCEL,
            "stop": device_states.Event.FAIL,
        }.get(act)
        untold = wanted is not None and wanted not in device_states.STEPS[state]
        assert session.out_of_turn == refused + untold
        if untold:
            assert (actions, session.steps, session.state) == ([], [], state)


class GatewayWalk(GatewaySession):
    """A session that writes down its steps."""

    def __init__(self, stored: int) -> None:
        self.steps: list[tuple[gateway_states.State, gateway_states.Event]] = []
        super().__init__(timing=TIMING, now_s=0.0, stored=[b"x"] * stored)

    def _go(self, event: gateway_states.Event) -> None:
        self.steps.append((self.state, event))
        super()._go(event)


gateway_acts = st.lists(
    st.tuples(
        st.sampled_from(["attach", "ack", "produce", "finish", "done", "cancel", "poll", "late"]),
        st.integers(0, 4),
        st.booleans(),
    ),
    max_size=30,
)


@given(st.integers(0, 2), gateway_acts)
def test_the_gateway_takes_no_step_outside_its_table(
    stored: int, acts: list[tuple[str, int, bool]]
) -> None:
    session = GatewayWalk(stored)
    now_s = 0.0
    for act, count, flag in acts:
        state, refused = session.state, session.out_of_turn
        session.steps.clear()
        held = list(session.payloads)
        bundles: list[Bundle] = []
        match act:
            case "attach":
                session.on_request(now_s, have=count, credit=2, ttl_s=200.0, proof=bytes(32))
            case "ack":
                control = Control(
                    kind=ControlKind.ACK, have=count, credit=4, seen=count, rewind=flag
                )
                session.on_ack(now_s, control)
            case "produce":
                session.produce(b"x" if flag else b"y")
            case "finish":
                session.finish(Status.COMPLETE if flag else Status.FAILED, "" if flag else "bad")
            case "done":
                session.on_done()
            case "cancel":
                session.cancel()
            case "poll" | "late":
                now_s += 0.3 if act == "poll" else 61.0
                bundles = session.poll(now_s)
        at = state
        for step_state, event in session.steps:
            assert step_state is at
            at = gateway_states.STEPS[at][event].to
        assert session.state is at
        assert not bundles or at not in gateway_states.TERMINAL
        wanted = {one.value: one for one in gateway_states.Event}.get(act)
        untold = wanted is not None and wanted not in gateway_states.STEPS[state]
        assert session.out_of_turn == refused + untold
        if untold:
            assert (session.steps, session.state, session.payloads) == ([], state, held)
