"""Traces of a real service over OTLP: the caller's trace goes on, and logs know it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from otlpreceiver import otlp_receiver
from services import Services, run_tidegate

pytestmark = pytest.mark.system

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAID = "the confidential heron nests"
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": SAID}],
    "max_tokens": 12,
    "ignore_eos": True,
    "stream": True,
}


def test_a_streamed_answer_of_the_service_is_traced_to_a_collector(
    tmp_path: Path, edge_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    key = run_tidegate("keys", "api", "add", str(state), "team").stdout.strip()
    with otlp_receiver() as receiver, Services(tmp_path) as services:
        flags = ("--state", str(state), "--otlp-traces-endpoint", receiver.url)
        service = services.cloud(edge_checkpoint, *flags, "--name", "m", "--log-format", "json")
        heads = {
            "Authorization": f"Bearer {key}",
            "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
        }
        url = f"{service.url}/v1/chat/completions"
        assert httpx.post(url, json=ASK, headers=heads, timeout=60).status_code == 200
        assert httpx.post(url, json={}, headers=heads, timeout=60).status_code == 400
        assert service.stop() == 0  # what waits is sent before it ends
        log = service.log.read_text()
    *phases, request, refused = receiver.spans
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert {span.parent_id for span in phases} == {request.span_id}
    assert {span.trace_id for span in receiver.spans} == {TRACE}
    assert {span.service for span in receiver.spans} == {"tidegate-cloud"}
    assert (request.name, request.parent_id) == ("chat m", "00f067aa0ba902b7")
    assert request.attributes["gen_ai.usage.output_tokens"] == 12
    assert request.attributes["http.response.status_code"] == 200
    assert refused.attributes["http.response.status_code"] == 400
    for span in phases:
        assert request.began_ns <= span.began_ns <= span.ended_ns <= request.ended_ns
    for word in ("confidential", "heron", "nests", key):
        assert word.encode() not in receiver.raw
        assert word not in log
    lines = [json.loads(line) for line in (state / "audit.jsonl").read_text().splitlines()]
    assert [line["trace_id"] for line in lines] == [TRACE] * 2
