"""Encoders whose outputs a test can tell: letters counted, so that equal texts are equal."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from tidegate.api.backend import ModelCard
from tidegate.api.classify import Classified
from tidegate.api.embeddings import Embedded, Text
from tidegate.api.texts import Counted, uncounted
from tidegate.errors import RequestError

LETTERS = 26


class LetterEmbedder:
    """How often each letter occurs, [26]; texts with the same letters mean the same to it."""

    def __init__(self, *, longest: int = 400, smaller: Collection[int] = ()) -> None:
        self.longest, self.smaller = longest, smaller
        self.name = "letters"
        self.timeouts: list[float | None] = []
        self.calls: list[tuple[Text, ...]] = []

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created_s=5, context_tokens=self.longest)

    @property
    def dimensions(self) -> int:
        return LETTERS

    @property
    def smaller_dimensions(self) -> Collection[int]:
        return self.smaller

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        counted(sum(map(len, inputs)))
        self.calls.append(inputs)
        self.timeouts.append(timeout_s)
        vectors = np.zeros((len(inputs), LETTERS), np.float32)
        for number, text in enumerate(inputs):
            if len(text) > self.longest:
                raise RequestError(f"input[{number}]", "is too long", status=413)
            codes = [ord(one.lower()) - 97 for one in text] if isinstance(text, str) else text
            for code in codes:
                if 0 <= code < LETTERS:
                    vectors[number, code] += 1
        return Embedded(vectors=vectors[:, :dimensions], tokens=sum(map(len, inputs)))


class VowelClassifier:
    """Which part of a text's characters are vowels: its two labels' probabilities."""

    labels = ("consonants", "vowels")

    @property
    def card(self) -> ModelCard:
        return ModelCard(id="vowels", created_s=5, context_tokens=400)

    async def classify(
        self,
        inputs: tuple[Text, ...],
        *,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Classified:
        counted(sum(map(len, inputs)))
        parts = [sum(one in "aeiou" for one in str(text)) / len(text) for text in inputs]
        probs = np.array([[1 - part, part] for part in parts], np.float32)
        return Classified(probs=probs, tokens=sum(map(len, inputs)))
