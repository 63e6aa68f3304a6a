"""The router: privacy is never traded, and every decision says which numbers made it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.router import (
    MAY_LEAVE,
    CloudSignals,
    EdgeSignals,
    RouteRequest,
    decide,
    predict_edge_s,
)

REQUEST = RouteRequest(
    prompt_tokens=50, answer_tokens=40.0, wish="auto", privacy="sealed", deadline_s=None
)
EDGE = EdgeSignals(
    healthy=True,
    context_tokens=512,
    running=0,
    waiting=0,
    batch_rows=4,
    queue_limit=16,
    prefill_tokens_per_s=500.0,
    decode_step_s=0.01,
    pending_tokens=0.0,
)
CLOUD = CloudSignals(reachable=True, context_tokens=2048, answer_s=0.3, detail="")
GONE = replace(CLOUD, reachable=False, detail="broker not connected")

requests = st.builds(
    RouteRequest,
    prompt_tokens=st.integers(1, 4000),
    answer_tokens=st.floats(1, 4000),
    wish=st.sampled_from(["auto", "edge", "cloud"]),
    privacy=st.sampled_from(["local", "redact", "sealed", "any"]),
    deadline_s=st.none() | st.floats(0.001, 100),
)
edges = st.builds(
    EdgeSignals,
    healthy=st.booleans(),
    context_tokens=st.integers(1, 2000),
    running=st.integers(0, 8),
    waiting=st.integers(0, 40),
    batch_rows=st.integers(1, 8),
    queue_limit=st.integers(0, 32),
    prefill_tokens_per_s=st.none() | st.floats(1, 1e5),
    decode_step_s=st.none() | st.floats(1e-4, 10),
    pending_tokens=st.floats(0, 1e5),
)
clouds = st.builds(
    CloudSignals,
    reachable=st.booleans(),
    context_tokens=st.integers(1, 4000),
    answer_s=st.none() | st.floats(0.01, 100),
    detail=st.just("broker not connected"),
)


@given(requests, edges, clouds)
def test_what_is_private_never_leaves_whatever_else_holds(
    request: RouteRequest, edge: EdgeSignals, cloud: CloudSignals
) -> None:
    decision = decide(request, edge, cloud)
    assert decision.reason
    if request.privacy not in MAY_LEAVE or request.wish == "edge" or not cloud.reachable:
        assert decision.place != "cloud"
    if request.wish == "cloud":
        assert decision.place != "edge"


@given(requests, edges, clouds)
def test_nothing_runs_where_it_does_not_fit(
    request: RouteRequest, edge: EdgeSignals, cloud: CloudSignals
) -> None:
    place = decide(request, edge, cloud).place
    if place == "edge":
        assert request.prompt_tokens < edge.context_tokens
        assert edge.healthy
    elif place == "cloud":
        assert request.prompt_tokens < cloud.context_tokens


def test_a_request_that_fits_stays_and_says_how_well() -> None:
    decision = decide(replace(REQUEST, deadline_s=2.0), EDGE, CLOUD)
    assert decision.place == "edge"
    assert decision.reason == "fits: 0.50 s predicted, 2.00 s allowed"


def test_an_overlong_prompt_goes_to_the_cloud() -> None:
    decision = decide(replace(REQUEST, prompt_tokens=700), EDGE, CLOUD)
    assert decision.place == "cloud"
    assert decision.reason == "too long for the device: 701 tokens, it holds 512"


def test_a_deadline_that_a_full_queue_breaks_goes_to_the_cloud() -> None:
    busy = replace(EDGE, running=4, waiting=8, pending_tokens=480.0)
    decision = decide(replace(REQUEST, deadline_s=0.8), busy, CLOUD)
    assert decision.place == "cloud"
    # 480 tokens, 4 at a time, 9 of 12 requests to finish first: 90 steps and 40 of its own.
    assert decision.reason == (
        "deadline too tight: 1.40 s predicted here with 8 waiting, 0.80 s allowed"
    )


def test_a_late_request_stays_when_the_cloud_would_be_later() -> None:
    slow = replace(CLOUD, answer_s=9.0)
    decision = decide(replace(REQUEST, deadline_s=0.1), EDGE, slow)
    assert decision.place == "edge"
    assert "late either way" in decision.reason


def test_a_private_request_that_cannot_run_here_is_refused_with_both_reasons() -> None:
    private = replace(REQUEST, prompt_tokens=700, privacy="local")
    decision = decide(private, EDGE, CLOUD)
    assert (decision.place, decision.refusal) == ("refuse", "lasting")
    assert decision.reason == (
        "too long for the device: 701 tokens, it holds 512; "
        "private (local): never leaves the device"
    )


def test_without_a_cloud_the_device_answers_and_says_that_it_will_be_late() -> None:
    decision = decide(replace(REQUEST, deadline_s=0.1), EDGE, GONE)
    assert decision.place == "edge"
    assert decision.reason == (
        "cloud: broker not connected; late: 0.50 s predicted, 0.10 s allowed"
    )


def test_the_prediction_grows_with_the_queue_and_waits_for_measurements() -> None:
    busy = replace(EDGE, running=4, waiting=8, pending_tokens=480.0)
    alone, queued = predict_edge_s(REQUEST, EDGE), predict_edge_s(REQUEST, busy)
    assert alone is not None
    assert queued is not None
    assert alone < queued
    assert predict_edge_s(REQUEST, replace(EDGE, decode_step_s=None)) is None


def test_a_refusal_says_whether_trying_again_may_help() -> None:
    private = replace(REQUEST, privacy="local")
    assert decide(private, replace(EDGE, waiting=16), CLOUD).refusal == "busy"
    assert decide(private, replace(EDGE, healthy=False), CLOUD).refusal == "gone"
    assert decide(replace(REQUEST, wish="cloud"), EDGE, GONE).refusal == "gone"
    nowhere = replace(GONE, is_set_up=False)
    assert decide(replace(REQUEST, wish="cloud"), EDGE, nowhere).refusal == "lasting"
    assert decide(replace(REQUEST, prompt_tokens=700), EDGE, nowhere).refusal == "lasting"
    assert decide(replace(REQUEST, prompt_tokens=9000), EDGE, CLOUD).refusal == "lasting"


def test_an_answer_that_would_be_cut_short_here_goes_where_it_fits() -> None:
    tight = replace(REQUEST, prompt_tokens=500)
    decision = decide(tight, EDGE, CLOUD)
    assert decision.place == "cloud"
    assert decision.reason == "answer cut short here: 540 tokens expected, 512 fit"
    assert decide(replace(tight, privacy="local"), EDGE, CLOUD).place == "edge"
    assert decide(tight, EDGE, GONE).place == "edge"
