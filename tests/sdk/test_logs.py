"""The log on stderr: a record is a line of JSON, and no form has the message of an exception."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import pytest

from tidegate.api.log_context import LogContext, logged_as
from tidegate.cli.logs import LOG_FORMATS, JsonFormatter, log_stray

SAID = "".join(("a pr", "ompt"))  # frames quote their lines of source


def failed() -> logging.LogRecord:
    """A record of an exception whose message quotes what was said."""
    try:
        raise ValueError(SAID)
    except ValueError as error:
        facts = (type(error), error, error.__traceback__)
        return logging.LogRecord("tidegate", logging.ERROR, "f", 1, "two\nlines", (), facts)


@pytest.mark.parametrize("name", ["text", "json"])
def test_of_an_exception_there_are_its_type_and_frames_alone(name: str) -> None:
    record = failed()
    logging.Formatter().format(record)  # another handler put it into words before
    line = LOG_FORMATS[name]().format(record)
    assert "ValueError" in line
    assert "test_logs.py" in line
    assert SAID not in line


def test_a_record_is_one_line_of_json() -> None:
    line = JsonFormatter().format(failed())
    told = json.loads(line)
    assert "\n" not in line
    assert (told["level"], told["message"]) == ("ERROR", "two\nlines")
    assert told["defect"].startswith("ValueError")
    assert "request_id" not in told


def test_a_line_names_its_request_and_its_trace() -> None:
    record = logging.LogRecord("tidegate", logging.INFO, "f", 1, "hello", (), None)
    with logged_as(LogContext(request_id="r", trace_id="t")):
        told = json.loads(JsonFormatter().format(record))
    assert (told["request_id"], told["trace_id"]) == ("r", "t")
    with logged_as(LogContext(request_id="r", trace_id=None)):
        assert "trace_id" not in json.loads(JsonFormatter().format(record))


def test_what_nobody_caught_in_the_event_loop_is_logged_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_stray)

        def fail() -> None:
            raise ValueError(SAID)

        loop.call_soon(fail)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert "ValueError" in caplog.text
    assert SAID not in caplog.text


@pytest.mark.parametrize("name", ["text", "json"])
def test_warnings_and_last_words_go_the_same_way(name: str) -> None:
    code = (
        "import warnings\n"
        "from tidegate.cli.logs import LOG_FORMATS, start_log\n"
        f"start_log(LOG_FORMATS[{name!r}]())\n"
        "warnings.warn('of a library')\n"
        "raise ValueError(''.join(['a pr', 'ompt']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "of a library" in done.stderr
    assert "ValueError" in done.stderr
    assert SAID not in done.stderr
    if name == "json":
        assert [json.loads(line)["level"] for line in done.stderr.splitlines()] == [
            "WARNING",
            "CRITICAL",
        ]
