"""Requests made from the OpenAPI document, and some made to break it, against real services.

Every answer must be one that the document has for it, good or bad; what the document forbids must
be refused; nothing may be a 5xx. The draws are the same in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import schemathesis
from encodermodels import CLASSIFIER, TINY, write_encoder_bundle
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from services import Service, Services, run_tidegate
from tinymodel import RandomWeights
from wordmodel import write_word_checkpoint

from tidegate.api.openapi import document
from tidegate.api.openapi_operations import OPERATIONS, Operation

pytestmark = pytest.mark.system

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
EXAMPLES = 15
"""Of each kind for each call: both ends together take about a minute."""
MOST_FIELDS = 3
"""Of a good body beside those that it needs: of more, two are sure to contradict each other."""
SCHEMA = schemathesis.openapi.from_dict(document())
# The other paths of a call lead to the same endpoint.
CALLS = [one for one in OPERATIONS if one.body is not None and not one.name.endswith("V1")]
ONLY_CLOUD = "reload"
SHOWN = [one for one in OPERATIONS if one.body is None]
LINK = ("listAnswers", "showAnswer", "forgetAnswer", "showModel")
"""Of a device with a link, or of a model that is not served: 404."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    device: Service
    cloud: Service


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    folder = tmp_path_factory.mktemp("schemathesis")
    checkpoint = write_word_checkpoint(folder / "words", context=128)
    done = run_tidegate("convert", str(checkpoint), "--out", str(folder / "bundle"), "--quiet")
    assert done.returncode == 0, done.stderr
    write_encoder_bundle(folder / "vectors", TINY, RandomWeights(TINY))
    write_encoder_bundle(folder / "labels", CLASSIFIER, RandomWeights(CLASSIFIER))
    encoders = ("--embedder", str(folder / "vectors"), "--classifier", str(folder / "labels"))
    with Services(folder) as services:
        device = services.serve(folder / "bundle", *encoders)
        yield Ends(device=device, cloud=services.cloud(checkpoint))


def made(operation: Operation, mode: GenerationMode) -> st.SearchStrategy[Any]:
    found: st.SearchStrategy[Any] = SCHEMA[operation.path][operation.method.upper()].as_strategy(
        generation_mode=mode
    )
    return found


def settings(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],
    )


def shorter(operation: Operation, body: Any, kept: frozenset[str]) -> Any:
    """A good body with fewer fields, a short answer, and what no schema can say mended."""
    assert operation.body is not None
    needed = {field.name for field in operation.body.fields if field.required}
    names = operation.body.names
    names |= frozenset() if operation.or_body is None else operation.or_body.names
    needed |= {"prompt", "messages"} & names
    few = {name: value for name, value in body.items() if name in kept | needed}
    if operation.event is not None:
        few["max_tokens"] = 3
        for name in ("max_completion_tokens", "min_tokens"):
            few.pop(name, None)
    for message in few.get("messages") or ():
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = "{}"
    return few


def send(case: Any, service: Service) -> int:
    """Ask, check the answer; its status."""
    response = case.call(base_url=service.url, timeout=20)
    case.validate_response(response, checks=CHECKS)
    return int(response.status_code)


@pytest.mark.parametrize("operation", CALLS, ids=lambda one: one.name)
@pytest.mark.parametrize("end", ["device", "cloud"])
def test_what_the_document_allows_is_answered_as_it_says(
    ends: Ends, end: str, operation: Operation
) -> None:
    assert operation.body is not None
    service: Service = getattr(ends, end)
    names = st.sampled_from(sorted(operation.body.names))
    statuses: Counter[int] = Counter()

    @settings(EXAMPLES)
    @hypothesis.given(
        case=made(operation, GenerationMode.POSITIVE),
        kept=st.frozensets(names, max_size=MOST_FIELDS),
    )
    def run(case: Any, kept: frozenset[str]) -> None:
        case.body = shorter(operation, case.body, kept)
        statuses[send(case, service)] += 1

    run()
    only_device = ("embed", "classify", "explainRoute")
    absent = {"cloud": only_device, "device": (ONLY_CLOUD,)}[end]
    assert statuses[404 if operation.name in absent else 200] >= 2, statuses


@pytest.mark.parametrize("operation", CALLS, ids=lambda one: one.name)
@pytest.mark.parametrize("end", ["device", "cloud"])
def test_what_the_document_forbids_is_refused_as_it_says(
    ends: Ends, end: str, operation: Operation
) -> None:
    service: Service = getattr(ends, end)

    @settings(EXAMPLES)
    @hypothesis.given(case=made(operation, GenerationMode.NEGATIVE))
    def run(case: Any) -> None:
        assert send(case, service) >= 400

    run()


@pytest.mark.parametrize("operation", SHOWN, ids=lambda one: one.name)
@pytest.mark.parametrize("end", ["device", "cloud"])
def test_what_is_shown_looks_as_the_document_says(
    ends: Ends, end: str, operation: Operation
) -> None:
    service: Service = getattr(ends, end)

    @settings(3)
    @hypothesis.given(case=made(operation, GenerationMode.POSITIVE))
    def run(case: Any) -> None:
        assert send(case, service) == (404 if operation.name in LINK else 200)

    run()
