"""An engine in numbers, under the names that vLLM gives them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from toyengine import ask, collect, serving, toy_engine

from tidegate.api.engine_metrics import render_engine
from tidegate.engine.snapshot import STEP_TOKENS, EngineSnapshot, Meter


def shown(**changed: Any) -> str:
    """The text of an idle engine, with these numbers changed."""
    return render_engine("m", replace(toy_engine().snapshot(), **changed)).decode()


def test_engine_numbers_have_vllms_names() -> None:
    text = shown(
        running=2,
        waiting=3,
        kv_usage=0.25,
        prefix_query_tokens=100,
        prefix_hit_tokens=40,
        preemptions=1,
        drafts=5,
        draft_tokens=20,
        accepted_draft_tokens=15,
        accepted_lengths=(1, 0, 0, 1, 3),
        kv_units=128,
        kv_unit_tokens=16,
    )
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
        'tidegate_spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="0"} 4.0',
        'tidegate_spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="3"} 3.0',
        'tidegate_cache_config_info{block_size="16",model_name="m",num_gpu_blocks="128"} 1.0',
    ):
        assert f"{line}\n" in text
    # What held in all places together is what held.
    assert 4 + 4 + 4 + 3 == 15


def test_an_engine_that_is_stuck_draining_or_unloaded_says_so() -> None:
    text = shown(healthy=False, accepting=False, loaded=False)
    for name in ("healthy", "accepting", "loaded"):
        assert f'tidegate_engine_{name}{{model_name="m"}} 0.0\n' in text
        assert f'tidegate_engine_{name}{{model_name="m"}} 1.0\n' in shown()


def test_steps_are_counted_by_their_tokens() -> None:
    meter = Meter()
    for tokens in (1, 2, 8, 9, 16384, 20000):
        meter.stepped(prompt_tokens=0, rows=1, tokens=tokens, elapsed_s=0.1)
    text = shown(step_tokens=tuple(meter.step_tokens), tokens_of_steps=meter.tokens_of_steps)
    bucket = 'tidegate_iteration_tokens_total_bucket{le="%s",model_name="m"} %s\n'
    for le, count in (("1.0", 1.0), ("8.0", 3.0), ("16.0", 4.0), ("16384.0", 5.0), ("+Inf", 6.0)):
        assert bucket % (le, count) in text
    assert 'tidegate_iteration_tokens_total_sum{model_name="m"} 36404.0\n' in text
    assert len(meter.step_tokens) == len(STEP_TOKENS) + 1


def test_a_real_engines_steps_hold_every_token_of_prompt_and_answer() -> None:
    async def main() -> EngineSnapshot:
        async with serving(toy_engine(eos=False)) as engine:
            await collect(engine.submit(ask("a", tuple(range(1, 10)), max_tokens=6)))
            return engine.snapshot()

    now = asyncio.run(main())
    assert sum(now.step_tokens) == now.steps
    assert now.tokens_of_steps == now.prompt_tokens + now.generated_tokens
    assert sum(now.accepted_lengths) == now.drafts
    held = sum(length * rows for length, rows in enumerate(now.accepted_lengths))
    assert held == now.accepted_draft_tokens
    assert (now.kv_units, now.kv_unit_tokens) == (96, 4)
