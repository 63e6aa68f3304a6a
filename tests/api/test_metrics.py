"""Metrics carry vLLM's names under our prefix."""

from __future__ import annotations

from tidegate.api.backend import Routed
from tidegate.api.metrics import EngineNumbers, Metrics, render_engine
from tidegate.engine.events import Cancelled, Failed, TextDelta, Usage

ROUTED = Routed(route="cloud", reason="x", model="m", request_id="r")


def test_engine_numbers_have_vllms_names() -> None:
    shown = render_engine(
        EngineNumbers(
            model="m",
            running=2,
            waiting=3,
            kv_usage=0.25,
            prefix_queries=100,
            prefix_hits=40,
            preemptions=1,
            drafts=5,
            draft_tokens=20,
            accepted_draft_tokens=15,
        )
    ).decode()
    for line in (
        'tidegate_num_requests_running{model_name="m"} 2.0',
        'tidegate_num_requests_waiting{model_name="m"} 3.0',
        'tidegate_kv_cache_usage_perc{model_name="m"} 0.25',
        'tidegate_prefix_cache_queries_total{model_name="m"} 100.0',
        'tidegate_prefix_cache_hits_total{model_name="m"} 40.0',
        'tidegate_num_preemptions_total{model_name="m"} 1.0',
        'tidegate_spec_decode_num_drafts_total{model_name="m"} 5.0',
        'tidegate_spec_decode_num_draft_tokens_total{model_name="m"} 20.0',
        'tidegate_spec_decode_num_accepted_tokens_total{model_name="m"} 15.0',
    ):
        assert line in shown


def test_an_answer_that_broke_off_counts_as_abort_and_a_failed_one_as_error() -> None:
    metrics = Metrics()
    left = metrics.begin()
    left.see(ROUTED)
    left.see(TextDelta(text="hi", tokens=(1, 2)))
    left.end()
    failed = metrics.begin()
    failed.see(ROUTED)
    failed.see(Failed(code="x", message="y", retryable=False))
    failed.end()
    cancelled = metrics.begin()
    cancelled.see(ROUTED)
    cancelled.see(Cancelled(usage=Usage(prompt_tokens=3, completion_tokens=4)))
    cancelled.end()
    shown = metrics.render().decode()
    for line in (
        'tidegate_request_success_total{finished_reason="abort",model_name="m"} 2.0',
        'tidegate_request_success_total{finished_reason="error",model_name="m"} 1.0',
        'tidegate_requests_total{model_name="m",route="cloud"} 3.0',
        'tidegate_generation_tokens_total{model_name="m"} 4.0',
    ):
        assert line in shown


def test_two_registries_do_not_collide() -> None:
    first, second = Metrics(), Metrics()
    first.begin().see(ROUTED)
    assert b'tidegate_requests_total{model_name="m",route="cloud"} 1.0' in first.render()
    assert b"tidegate_requests_total{" not in second.render()
