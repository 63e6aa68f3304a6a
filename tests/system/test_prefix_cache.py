"""The disk tier of a real daemon: killed and started again, it begins where it was."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from services import Service, Services, run_tidegate, until
from streams import chat

pytestmark = pytest.mark.system

SAID = "the tide tables of the north harbour, by heart: " + "one two three " * 30


def asked(device: Service, said: str, **fields: object) -> dict[str, object]:
    body = chat(SAID + said, max_tokens=5, **fields)
    response = httpx.post(f"{device.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


def cached(answer: dict[str, object]) -> int:
    usage = answer["usage"]
    assert isinstance(usage, dict)
    return int(usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("executor", ["onnx", "openvino"])
def test_a_daemon_that_was_killed_loads_what_it_computed_before(
    bundle: Path, tmp_path: Path, executor: str
) -> None:
    folder = tmp_path / "prefixes"
    flags = ("--executor", executor, "--prefix-cache", str(folder), "--exact")
    with Services(tmp_path) as services:
        first = services.serve(bundle, *flags)
        before = asked(first, "a")
        assert cached(before) == 0
        until(lambda: first.metric("tidegate_prefix_disk_units") >= 14, "prefixes are written")
        refused = run_tidegate("serve", str(bundle), "--listen", "127.0.0.1:0", *flags)
        assert refused.returncode == 1
        assert "must be a folder of its own" in refused.stderr
        first.kill()
        second = services.serve(bundle, *flags)
        private = asked(second, "a", tidegate={"cache": False})
        assert cached(private) == 0
        after = asked(second, "a")
        assert cached(after) >= 448
        assert after["choices"] == before["choices"]
        assert second.metric("tidegate_prefix_disk_hit_tokens_total") == cached(after)
        assert second.stop() == 0
        assert "Traceback" not in second.log.read_text()


def test_a_daemon_without_prefix_cache_computes_every_prompt(bundle: Path, tmp_path: Path) -> None:
    with Services(tmp_path) as services:
        device = services.serve(bundle, "--no-prefix-cache")
        assert [cached(asked(device, text)) for text in "ab"] == [0, 0]
        done = run_tidegate(
            "serve", str(bundle), "--no-prefix-cache", "--prefix-cache", str(tmp_path / "x")
        )
        assert done.returncode == 1
        assert "prefix_cache" in done.stderr
