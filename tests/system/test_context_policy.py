"""A daemon that cuts long prompts by default, and callers who would rather hear of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from services import Services

from tidegate.client import Client, Message, RequestError
from tidegate.edge.settings import EdgeSettings
from tidegate.errors import ConfigError

pytestmark = pytest.mark.system

TALK = [
    Message(role="user" if place % 2 == 0 else "assistant", content="which lamp is on in the hall?")
    for place in range(41)
]


def test_a_long_conversation_is_cut_by_default_and_refused_on_demand(
    bundle: Path, tmp_path: Path
) -> None:
    with Services(tmp_path) as services:
        flags = ("--context", "256", "--context-policy", "truncate_oldest")
        device = services.serve(bundle, *flags)
        with Client(device.url) as client:
            answer = client.chat(TALK, max_tokens=8, temperature=0)
            assert answer.dropped_messages > 0
            assert answer.dropped_messages % 2 == 0, "turns go whole"
            assert answer.usage.prompt_tokens <= 256 - 8
            with client.stream(TALK, max_tokens=8, temperature=0) as stream:
                assert "".join(stream) == answer.text
            assert stream.answer.dropped_messages == answer.dropped_messages
            raw = client.complete("a lamp is on " * 200, max_tokens=8)
            assert raw.dropped_tokens > 0
            assert raw.usage.prompt_tokens == 256 - 8
            with pytest.raises(RequestError) as refused:
                client.chat(TALK, max_tokens=8, context_policy="error")
            assert refused.value.status in (413, 422)


def test_a_policy_that_there_is_not_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"context_policy = 'cut': must be one of error, trunc"):
        EdgeSettings(bundle=tmp_path, context_policy="cut")  # type: ignore[arg-type]
