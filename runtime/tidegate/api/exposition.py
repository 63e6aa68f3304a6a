"""What `/metrics` says: the parts of a service as one text, and told again under vLLM's names.

Several engines in one service tell the same families; a family has one head here, however many
tell it. Under vLLM's names are the same numbers with vLLM's labels and buckets, so that dashboards
and autoscalers (KEDA, KServe, llm-d) that know vLLM work as they are. Names from vLLM's
v1/metrics/loggers.py and v1/spec_decode/metrics.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from tidegate.api.metrics_buckets import VLLM_REQUEST_S, VLLM_TOKEN_S, Buckets

OURS: Final = "tidegate_"
VLLM: Final = "vllm:"
ENGINE: Final = 'engine="0"'
"""vLLM numbers the engines of one model; here a model has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """One of our families under another name. `buckets` None tells them all."""

    ours: str
    theirs: str
    buckets: Buckets | None = None


def _same(name: str, buckets: Buckets | None = None) -> Alias:
    return Alias(ours=name, theirs=name, buckets=buckets)


ALIASES: Final = (
    _same("num_requests_running"),
    _same("num_requests_waiting"),
    _same("kv_cache_usage_perc"),
    _same("cache_config_info"),
    _same("prefix_cache_queries_total"),
    _same("prefix_cache_hits_total"),
    _same("num_preemptions_total"),
    _same("prompt_tokens_total"),
    _same("prompt_tokens_cached_total"),
    _same("generation_tokens_total"),
    _same("request_success_total"),
    _same("iteration_tokens_total"),
    _same("request_prompt_tokens"),
    _same("request_generation_tokens"),
    _same("request_max_num_generation_tokens"),
    _same("request_prefill_kv_computed_tokens"),
    _same("request_params_n"),
    _same("request_params_max_tokens"),
    _same("time_to_first_token_seconds"),
    _same("inter_token_latency_seconds", VLLM_TOKEN_S),
    _same("request_time_per_output_token_seconds", VLLM_TOKEN_S),
    _same("e2e_request_latency_seconds", VLLM_REQUEST_S),
    _same("request_queue_time_seconds", VLLM_REQUEST_S),
    _same("request_inference_time_seconds", VLLM_REQUEST_S),
    _same("request_prefill_time_seconds", VLLM_REQUEST_S),
    _same("request_decode_time_seconds", VLLM_REQUEST_S),
    _same("spec_decode_num_drafts_total"),
    _same("spec_decode_num_draft_tokens_total"),
    _same("spec_decode_num_accepted_tokens_total"),
    _same("spec_decode_num_accepted_tokens_per_pos_total"),
    # Older names that recipes still ask for.
    Alias(ours="kv_cache_usage_perc", theirs="gpu_cache_usage_perc"),
    Alias(ours="prefix_cache_queries_total", theirs="gpu_prefix_cache_queries_total"),
    Alias(ours="prefix_cache_hits_total", theirs="gpu_prefix_cache_hits_total"),
    Alias(
        ours="inter_token_latency_seconds",
        theirs="time_per_output_token_seconds",
        buckets=VLLM_TOKEN_S,
    ),
)

_BOUND = re.compile(r'\ble="([^"]+)"')


@dataclass(slots=True)
class _Family:
    """The lines of one name."""

    help: str = ""
    type: str = ""
    samples: list[str] = field(default_factory=list)

    def lines(self, name: str) -> list[str]:
        return [f"# HELP {name} {self.help}", f"# TYPE {name} {self.type}", *self.samples]


def exposition(text: bytes, *, vllm: bool) -> bytes:
    """Prometheus text with each family once.

    Args:
        text: the texts of all parts, one after the other.
        vllm: tell those that vLLM has under its names as well.
    """
    families = _families(text.decode())
    lines = [line for name, family in families.items() for line in family.lines(name)]
    if vllm:
        for alias in ALIASES:
            family = families.get(OURS + alias.ours)
            if family is not None:
                lines += _renamed(family, alias)
    return "".join(line + "\n" for line in lines).encode()


def _families(text: str) -> dict[str, _Family]:
    found: dict[str, _Family] = {}
    current = _Family()
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        if mark != "#":
            if line:
                current.samples.append(line)
            continue
        kind, name, said = rest.split(" ", 2)
        # When a series began is a series of its own in this format, and tells nobody anything.
        current = _Family() if name.endswith("_created") else found.setdefault(name, _Family())
        if kind == "HELP":
            current.help = said
        else:
            current.type = said
    return found


def _renamed(family: _Family, alias: Alias) -> list[str]:
    ours, theirs = OURS + alias.ours, VLLM + alias.theirs
    known = None
    if alias.buckets is not None:
        known = {*map(str, alias.buckets), "+Inf"}
    samples = []
    for line in family.samples:
        bound = _BOUND.search(line)
        if known is not None and bound is not None and bound[1] not in known:
            continue
        rest = line.removeprefix(ours)
        suffix, _, labels = rest.partition("{")
        samples.append(f"{theirs}{suffix}{{{ENGINE},{labels}")
    return _Family(family.help, family.type, samples).lines(theirs)
