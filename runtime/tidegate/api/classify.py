"""`/classify`: texts or token ids in, for each a label and how likely every label is.

The shapes are vLLM's. `probs` has the labels in the order that the model's card of `/v1/models`
and its config have them; of a model whose numbers are no probabilities it holds those numbers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from tidegate.api.answers import Json
from tidegate.api.backend import ModelCard
from tidegate.api.field_table import Neutral, Table
from tidegate.api.schema import MODEL
from tidegate.api.texts import (
    TEXT_FIELDS,
    Answered,
    Counted,
    Text,
    TextsCall,
    TextsEndpoint,
    read_inputs,
    read_timeout_s,
    uncounted,
)

CLASSIFICATION: Final = Table(
    name="ClassificationCall",
    told="Texts that are sorted into classes.",
    fields=(
        *TEXT_FIELDS,
        Neutral(name="use_activation", values=(True,), told="Probabilities are told."),
        Neutral(name="activation", values=(True,), told="The old name of use_activation."),
        Neutral(name="softmax", values=(True,), told="An older one."),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Classified:
    """Probabilities float32 [inputs, labels], and how many tokens were read."""

    probs: npt.NDArray[np.float32]
    tokens: int


class Classifier(Protocol):
    """Turns texts into probabilities of labels. Used concurrently from one event loop."""

    @property
    def card(self) -> ModelCard:
        """Its entry of `/v1/models`; `context_tokens` is the longest text."""

    @property
    def labels(self) -> Sequence[str]:
        """The names of its classes."""

    async def classify(
        self,
        inputs: tuple[Text, ...],
        *,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Classified:
        """The probabilities of every label for each of `inputs`; raises what `embed` does."""


def read_classification(data: object) -> TextsCall:
    """The body of `/classify`, as parsed JSON.

    Raises:
        RequestError: a field is wrong, or one of vLLM's that is not served.
    """
    fields = CLASSIFICATION.open(data)
    return TextsCall(
        inputs=read_inputs(fields), model=MODEL.read(fields), timeout_s=read_timeout_s(fields)
    )


def classification_object(
    found: Classified, labels: Sequence[str], *, model: str, name: str, created_s: int
) -> Json:
    """The answer object, as vLLM has it; of equally likely labels the first is told."""
    usage = {
        "prompt_tokens": found.tokens,
        "total_tokens": found.tokens,
        "completion_tokens": 0,
    }
    return {
        "id": name,
        "object": "list",
        "created": created_s,
        "model": model,
        "data": [
            {
                "index": index,
                "label": labels[int(np.argmax(probs))],
                "probs": probs.tolist(),
                "num_classes": len(labels),
            }
            for index, probs in enumerate(found.probs)
        ],
        "usage": usage,
    }


class ClassifyEndpoint(TextsEndpoint[TextsCall, Classifier]):
    """See `TextsEndpoint`."""

    none_served = "no classifier is served: give one with --classifier"

    def read(self, data: object) -> TextsCall:
        """See `TextsEndpoint.read`."""
        return read_classification(data)

    def check(self, call: TextsCall, model: Classifier) -> None:
        """Any call will do."""

    async def answer(self, call: TextsCall, model: Classifier, counted: Counted) -> Answered:
        """See `TextsEndpoint.answer`."""
        found = await model.classify(call.inputs, timeout_s=call.timeout_s, counted=counted)
        body = partial(
            classification_object,
            found,
            model.labels,
            model=model.card.id,
            name=f"classify-{secrets.token_hex(8)}",
            created_s=int(time.time()),
        )
        return Answered(tokens=found.tokens, body=body)
