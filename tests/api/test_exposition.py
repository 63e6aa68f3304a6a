"""One text of all parts, and vLLM's names beside ours."""

from __future__ import annotations

import re
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families
from toyengine import toy_engine

from tidegate.api.engine_metrics import render_engine
from tidegate.api.exposition import ALIASES, exposition
from tidegate.api.metrics import Metrics
from tidegate.api.metrics_buckets import (
    REQUEST_S,
    TOKEN_S,
    TTFT_S,
    VLLM_REQUEST_S,
    VLLM_TOKEN_S,
)

IDLE = toy_engine().snapshot()
ENGINES = b"".join(
    render_engine(name, replace(IDLE, running=running))
    for name, running in (("one", 1), ("two", 2))
)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by its name and labels."""
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text.decode())
        for one in family.samples
    }


def bounds(text: str, name: str) -> list[float]:
    return [float(one) for one in re.findall(rf'^{name}_bucket{{.*?le="([^"]+)"', text, re.M)][:-1]


def test_two_engines_tell_a_family_under_one_head() -> None:
    text = exposition(ENGINES, vllm=False).decode()
    assert text.count("# TYPE tidegate_num_requests_running gauge") == 1
    head = text.index("# TYPE tidegate_num_requests_running")
    rest = text[head:].splitlines()[1:3]
    assert rest == [
        'tidegate_num_requests_running{model_name="one"} 1.0',
        'tidegate_num_requests_running{model_name="two"} 2.0',
    ]
    assert samples(exposition(ENGINES, vllm=False)) == samples(ENGINES)


def test_when_a_series_began_is_left_out_and_nothing_else_is() -> None:
    metrics = Metrics()
    metrics.expect(["m"])
    told, kept = samples(metrics.render()), samples(metrics.show(b""))
    assert {
        key: value for key, value in told.items() if not key[0].endswith("_created")
    }.keys() == (kept.keys())


def test_vllms_names_have_the_same_numbers_and_its_labels() -> None:
    metrics = Metrics(vllm_names=True)
    metrics.expect(["one"])
    shown = samples(metrics.show(ENGINES))
    theirs = {key: value for key, value in shown.items() if key[0].startswith("vllm:")}
    for (name, labels), value in theirs.items():
        assert ("engine", "0") in labels
        assert {"model_name", "engine"} <= dict(labels).keys()
        alias = next(one for one in ALIASES if name.startswith(f"vllm:{one.theirs}"))
        ours = name.replace(f"vllm:{alias.theirs}", f"tidegate_{alias.ours}")
        assert shown[ours, labels - {("engine", "0")}] == value
    told = {name for name, _ in theirs}
    for alias in ALIASES:
        # Positions of guesses are told once there was a guess.
        assert "per_pos" in alias.theirs or any(
            name in (f"vllm:{alias.theirs}", f"vllm:{alias.theirs}_count") for name in told
        )


def test_buckets_are_vllms_under_its_names_and_finer_under_ours() -> None:
    metrics = Metrics(vllm_names=True)
    metrics.expect(["one"])
    text = metrics.show(b"").decode()
    for name, fine, coarse in (
        ("time_to_first_token_seconds", TTFT_S, TTFT_S),
        ("inter_token_latency_seconds", TOKEN_S, VLLM_TOKEN_S),
        ("e2e_request_latency_seconds", REQUEST_S, VLLM_REQUEST_S),
        ("request_queue_time_seconds", REQUEST_S, VLLM_REQUEST_S),
    ):
        assert bounds(text, f"tidegate_{name}") == list(fine)
        assert bounds(text, f"vllm:{name}") == list(coarse)
        assert set(coarse) <= set(fine)
    assert bounds(text, "vllm:time_per_output_token_seconds") == list(VLLM_TOKEN_S)


def test_vllms_names_can_be_left_out() -> None:
    assert b"vllm:" not in Metrics().show(ENGINES)
