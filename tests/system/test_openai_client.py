"""The official OpenAI client, unchanged, against a device daemon and a cloud service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from services import Service, Services, run_tidegate

pytestmark = pytest.mark.system

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "which lamp is on?"}]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """A device that trusts its port, and a cloud that wants `key`."""

    device: Service
    cloud: Service
    key: str

    def client(self, end: str, key: str | None = None) -> openai.OpenAI:
        service = self.device if end == "device" else self.cloud
        return openai.OpenAI(
            base_url=f"{service.url}/v1", api_key=key or self.key, max_retries=0, timeout=30
        )


@pytest.fixture(scope="module")
def ends(
    bundle: Path, cloud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ends]:
    folder = tmp_path_factory.mktemp("openai")
    made = run_tidegate("keys", "api")
    (folder / "keys.txt").write_text(f"# who may call\n\n{made.stdout}")
    with Services(folder) as services:
        device = services.serve(bundle)
        cloud = services.cloud(cloud_checkpoint, "--api-key-file", str(folder / "keys.txt"))
        yield Ends(device=device, cloud=cloud, key=made.stderr.split()[-1])


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_chats(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0
        )
    assert answer.model == model == ("edge" if end == "device" else "cloud")
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_streams_what_it_also_gets_whole(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        whole = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=24, temperature=1, seed=11
        )
        stream = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=24,
            temperature=1,
            seed=11,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    reasons = [one.choices[0].finish_reason for one in chunks if one.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_completes_a_raw_prompt(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="a lamp", max_tokens=8)
    assert answer.choices[0].text


def test_a_wrong_key_is_an_authentication_error(ends: Ends) -> None:
    with ends.client("cloud", key="tg-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(model="cloud", messages=MESSAGES)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_openai_errors_keep_their_class_and_name_the_field(ends: Ends) -> None:
    with ends.client("device") as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="edge", messages=MESSAGES, temperature=7)
        assert wrong.value.param == "temperature"


def test_probes_and_scrapers_of_a_cloud_with_keys_bring_none(ends: Ends) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{ends.cloud.url}{path}", timeout=10).status_code == 200
    assert httpx.get(f"{ends.cloud.url}/v1/models", timeout=10).status_code == 401
    assert httpx.get(f"{ends.cloud.url}/status", timeout=10).status_code == 401
