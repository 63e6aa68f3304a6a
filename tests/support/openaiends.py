"""A device daemon and a cloud service, and the official OpenAI client of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services import Service

if TYPE_CHECKING:  # a second to import, and only some tests need it
    import openai


@dataclass(frozen=True, kw_only=True)
class Ends:
    """A device that trusts its port, and a cloud that wants `key`."""

    device: Service
    cloud: Service
    key: str

    def client(self, end: str, key: str | None = None) -> openai.OpenAI:
        """One that waits; `end` is `device` or `cloud`."""
        import openai

        return openai.OpenAI(
            base_url=self.url(end), api_key=key or self.key, max_retries=0, timeout=30
        )

    def awaiting(self, end: str) -> openai.AsyncOpenAI:
        """One that is awaited."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url(end), api_key=self.key, max_retries=0, timeout=30
        )

    def url(self, end: str) -> str:
        """What clients call their base URL."""
        service = self.device if end == "device" else self.cloud
        return f"{service.url}/v1"


def end_model(end: str) -> str:
    """The model that an end serves."""
    return "edge" if end == "device" else "cloud"
