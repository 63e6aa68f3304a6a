"""Requests made from the OpenAPI document, and some made to break it, against real services.

Every answer must be one that the document has for it, good or bad; what the document forbids must
be refused; nothing may be a 5xx. The draws are the same in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from services import Service, Services, run_tidegate
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
EXAMPLES = 25
"""Of each kind for each call: together both ends take about a minute."""
MOST_FIELDS = 4
"""Of a good body beside those that it needs: of more, two are sure to contradict each other."""
SCHEMA = schemathesis.openapi.from_dict(document())


@dataclass(frozen=True, kw_only=True)
class Ends:
    device: Service
    cloud: Service


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    folder = tmp_path_factory.mktemp("schemathesis")
    checkpoint = write_word_checkpoint(folder / "words", context=128)
    for name, source in (("bundle", checkpoint),):
        done = run_tidegate("convert", str(source), "--out", str(folder / name), "--quiet")
        assert done.returncode == 0, done.stderr
    with Services(folder) as services:
        device = services.serve(folder / "bundle")
        yield Ends(device=device, cloud=services.cloud(checkpoint))


def shorter(body: Any, kept: frozenset[str], operation: Operation) -> Any:
    """A good body with fewer fields, and a short answer."""
    assert operation.body is not None
    needed = {field.name for field in operation.body.fields if field.required}
    few = {name: value for name, value in body.items() if name in kept | needed}
    if operation.event is not None:
        few["max_tokens"] = 3
        few.pop("max_completion_tokens", None)
    return few


def send(case: Any, service: Service) -> int:
    """Ask, check the answer; its status."""
    response = case.call(base_url=service.url, timeout=20)
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400: print(response.json()["error"]["message"][:150])
    return int(response.status_code)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("end", ["device", "cloud"])
def test_what_the_document_allows_is_answered_as_it_says(
    ends: Ends, end: str, operation: Operation
) -> None:
    service: Service = getattr(ends, end)
    made = SCHEMA[operation.path][operation.method.upper()].as_strategy(
        generation_mode=GenerationMode.POSITIVE
    )
    names = () if operation.body is None else sorted(operation.body.names)
    statuses: Counter[int] = Counter()

    @hypothesis.seed(7)
    @hypothesis.settings(
        max_examples=EXAMPLES if names else 3,
        deadline=None,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(case=made, kept=st.frozensets(st.sampled_from(names or ["x"]), max_size=MOST_FIELDS))
    def run(case: Any, kept: frozenset[str]) -> None:
        if operation.body is not None:
            case.body = shorter(case.body, kept, operation)
        statuses[send(case, service)] += 1

    run()
    print(end, operation.name, statuses)


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.body is not None], ids=lambda one: one.name
)
@pytest.mark.parametrize("end", ["device", "cloud"])
def test_what_the_document_forbids_is_refused_as_it_says(
    ends: Ends, end: str, operation: Operation
) -> None:
    service: Service = getattr(ends, end)
    made = SCHEMA[operation.path][operation.method.upper()].as_strategy(
        generation_mode=GenerationMode.NEGATIVE
    )
    statuses: Counter[int] = Counter()

    @hypothesis.seed(7)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(case=made)
    def run(case: Any) -> None:
        statuses[send(case, service)] += 1

    run()
    print(end, operation.name, statuses)
