"""docs/api.md is true: its limits are those of the code, its stages are in the sampler's order."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
from openai.types import completion_create_params as completion_params
from openai.types import embedding_create_params as embedding_params
from openai.types.chat import completion_create_params as chat_params

from tidegate.api import door, server
from tidegate.api.connection import MOST_HEAD_BYTES, PatientProtocol
from tidegate.api.embeddings import EMBEDDING
from tidegate.api.field_table import Field, Ignored, Neutral, Table
from tidegate.api.lifecycle import STUCK_STATUS
from tidegate.api.schema import CHAT, COMPLETION, MOST_CHOICES, read_chat, read_completion
from tidegate.api.settings import HttpSettings
from tidegate.api.tokens import MOST_TOKENS
from tidegate.cloud.service import CloudSettings
from tidegate.engine.logprobs import LEAST
from tidegate.engine.request import MOST_BIASED, MOST_TOP_LOGPROBS
from tidegate.errors import RequestError

PAGE = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text(encoding="utf-8")
HELLO = [{"role": "user", "content": "hello"}]


def test_the_limits_it_names_are_those_of_the_code() -> None:
    assert f"at most {MOST_BIASED}" in PAGE
    assert f"`top_logprobs` (0 to {MOST_TOP_LOGPROBS})" in PAGE
    assert f"`n` up to {MOST_CHOICES}" in PAGE
    assert f"told as {LEAST:g}" in PAGE
    assert f"up to {MOST_TOKENS} tokens" in PAGE


def test_the_bounds_on_clients_are_those_of_the_code() -> None:
    settings, patience = HttpSettings(), PatientProtocol
    rows = PAGE.partition("## Bounds on clients")[2].partition("\n## ")[0]
    told = f"{MOST_HEAD_BYTES >> 10} KiB, {door._MOST_HEADERS} headers, {patience.head_s:g} s"
    assert told in rows
    body = f"{settings.body_limit_bytes >> 20} MiB, {settings.body_timeout_s:g} s | 413, 408"
    assert body in rows
    assert f"connection without a request | {patience.idle_s:g} s" in rows
    assert f"calls being answered | {settings.max_calls} " in rows
    assert f"a stream's reader takes nothing | {settings.write_timeout_s:g} s" in rows
    assert f"a whole answer's reader takes nothing | {patience.idle_s:g} s" in rows
    assert f"{server._SEND_BUFFER_BYTES >> 9} KiB in the system" in rows  # which doubles it
    assert f"after {settings.heartbeat_s:g} s without one" in rows
    cloud = {one.name: one.default for one in dataclasses.fields(CloudSettings)}
    assert f"`--drain` seconds ({cloud['drain_s']:g})" in PAGE
    assert f"`--stall-after` seconds ({cloud['stall_after_s']:g})" in PAGE
    assert f"ends with status {STUCK_STATUS}" in PAGE


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("repetition_penalty", 0.01, 10),
        ("frequency_penalty", -2, 2),
        ("presence_penalty", -2, 2),
        ("temperature", 0, 2),
    ],
)
def test_the_ranges_it_names_are_those_of_the_code(field: str, least: float, most: float) -> None:
    row = next(line for line in PAGE.splitlines() if f"`{field}`" in line and line[0] == "|")
    assert f"{least:g} to {most:g}" in row
    for value in (least, most):
        read_chat({"messages": HELLO, field: value})
    for value in (least - 0.01, most + 0.01):
        with pytest.raises(RequestError, match=field):
            read_chat({"messages": HELLO, field: value})


def test_every_field_of_its_table_is_read() -> None:
    rows = re.findall(r"^\| \d [^|]+\|([^|]+)\|", PAGE, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) == 10
    for name in names:
        for read, said in ((read_chat, {"messages": HELLO}), (read_completion, {"prompt": "x"})):
            with pytest.raises(RequestError, match=name):
                read({**said, name: "no such value"})


def decided(table: Table) -> list[Field]:
    """The fields that are not served, those of the objects in it too."""
    inner = [one for field in table.fields for held in field.tables for one in decided(held)]
    return [one for one in (*table.fields, *inner) if isinstance(one, Ignored | Neutral)]


def rows() -> dict[str, str]:
    """What the page says that a field which is not served may be."""
    section = PAGE.split("## Fields that are not served")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for fields, may_be, _ in re.findall(
        r"^\| (`.*?) \| *(.*?) *\| *(.*?) *\|$", section, re.MULTILINE
    ):
        found |= dict.fromkeys(re.findall(r"`([\w.]+)`", fields), may_be)
    return found


def test_every_field_that_is_not_served_is_on_it_with_the_values_that_may_come() -> None:
    told, names = rows(), set()
    for field in (*decided(CHAT), *decided(COMPLETION)):
        row = next((row for row in told if row.split(".")[-1] == field.name), None)
        if isinstance(field, Neutral) and (field.values or row):
            assert row is not None, field.name
            names.add(row)
            values = [json.dumps(one) for one in field.values]
            assert all(f"`{value}`" in told[row] for value in values), (row, values)
        else:
            assert f"`{field.name}`" in PAGE or field.name == "description", field.name
    assert names == told.keys() - {"best_of"}


OFFICIAL: list[tuple[Table, type]] = [
    (CHAT, chat_params.CompletionCreateParamsBase),
    (COMPLETION, completion_params.CompletionCreateParamsBase),
    (EMBEDDING, embedding_params.EmbeddingCreateParams),
]


@pytest.mark.parametrize(("table", "params"), OFFICIAL)
def test_every_field_of_the_official_client_is_decided(table: Table, params: type) -> None:
    names = {*inspect.get_annotations(params)} | {"stream"}
    if table is EMBEDDING:
        names.remove("stream")
    assert names <= table.names
