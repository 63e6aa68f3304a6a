"""An embedder whose vectors a test chooses: letters counted, so that equal texts are equal."""

from __future__ import annotations

import numpy as np

from tidegate.api.backend import ModelCard
from tidegate.api.embeddings import Embedded, Text
from tidegate.errors import RequestError

LETTERS = 26


class LetterEmbedder:
    """How often each letter occurs, [26]; texts with the same letters mean the same to it."""

    def __init__(self, *, longest: int = 400) -> None:
        self.longest = longest
        self.calls: list[tuple[Text, ...]] = []

    @property
    def card(self) -> ModelCard:
        return ModelCard(id="letters", created_s=5, context_tokens=self.longest)

    @property
    def dimensions(self) -> int:
        return LETTERS

    async def embed(self, inputs: tuple[Text, ...]) -> Embedded:
        self.calls.append(inputs)
        vectors = np.zeros((len(inputs), LETTERS), np.float32)
        for number, text in enumerate(inputs):
            if len(text) > self.longest:
                raise RequestError(f"input[{number}]", "is too long", status=413)
            codes = [ord(one.lower()) - 97 for one in text] if isinstance(text, str) else text
            for code in codes:
                if 0 <= code < LETTERS:
                    vectors[number, code] += 1
        return Embedded(vectors=vectors, tokens=sum(map(len, inputs)))
