"""The board's queries and the alerts against a real Prometheus that scrapes real services."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheusserver import PrometheusServer, prometheus_server, promtool
from services import Service, Services, run_tidegate, until

from tidegate.link.fleet import pair

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cloud" / "deploy" / "grafana"
BOARD = json.loads((FOLDER / "board.json").read_text(encoding="utf-8"))
WINDOW = "10s"

FOR_VLLM: tuple[str, ...] = (
    # KEDA and KServe scale on the first, llm-d routes by the three after it.
    'sum(vllm:num_requests_waiting{model_name="one"})',
    'avg(vllm:kv_cache_usage_perc{model_name="one"})',
    'vllm:num_requests_running{engine="0"}',
    'vllm:cache_config_info{block_size!=""}',
    # Of the dashboards that vLLM comes with.
    f"rate(vllm:prompt_tokens_total[{WINDOW}])",
    f"rate(vllm:generation_tokens_total[{WINDOW}])",
    f"sum by (finished_reason) (increase(vllm:request_success_total[{WINDOW}]))",
    f"rate(vllm:request_queue_time_seconds_sum[{WINDOW}])",
    f"rate(vllm:request_prefill_time_seconds_sum[{WINDOW}])",
    f"rate(vllm:request_decode_time_seconds_sum[{WINDOW}])",
    f"sum by (le) (increase(vllm:request_prompt_tokens_bucket[{WINDOW}]))",
    f"sum by (le) (increase(vllm:request_params_max_tokens_bucket[{WINDOW}]))",
)

FOR_VLLM += tuple(
    f"histogram_quantile({share}, sum by (le) (rate(vllm:{name}_seconds_bucket[{WINDOW}])))"
    for share in (0.5, 0.99)
    for name in ("e2e_request_latency", "inter_token_latency", "time_to_first_token")
)

WITHOUT_DATA = {
    "Texts per run of an encoder": "the services of this test have no encoder",
    "Guessed tokens that held": "whether anything is guessed hangs on how fast steps are here",
    **dict.fromkeys(
        (
            "Power drawn",
            "Watts by where they went",
            "Power mode",
            "Temperature",
            "Battery",
            "Joules beyond the battery's plan",
            "Requests held",
            "Sensors and scheduling",
        ),
        "the services of this test are clouds; energy is a device's",
    ),
}
"""Panels whose queries need not answer in this test, and why; they are asked all the same."""

LOAD: tuple[dict[str, Any], ...] = (
    {"max_tokens": 24, "stream": True},
    {"max_tokens": 8, "n": 2},
    {"max_tokens": 12, "messages": [{"role": "user", "content": "hello again " * 40}]},
    {"max_tokens": 0},
)


def panels() -> dict[str, list[str]]:
    """Every panel's queries, with its variables as Grafana fills them in."""
    return {
        panel["title"]: [_filled(target["expr"]) for target in panel["targets"]]
        for panel in BOARD["panels"]
        if panel["type"] != "row"
    }


def _filled(expression: str) -> str:
    expression = expression.replace("$__rate_interval", WINDOW)
    return re.sub(r"\$(job|instance|model|key)\b", ".*", expression)


@contextmanager
def load(services: list[Service], key: str) -> Iterator[None]:
    """Good calls, bad calls and calls without a key, until the block ends."""
    stop = threading.Event()

    def ask(service: Service) -> None:
        url = f"{service.url}/v1/chat/completions"
        heads = {"Authorization": f"Bearer {key}"}
        hello = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True}
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                for body in LOAD:
                    client.post(url, json=hello | body, headers=heads)
                client.post(url, json=hello)
                stop.wait(0.1)

    threads = [threading.Thread(target=ask, args=(one,)) for one in services for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, edge_checkpoint: Path
) -> Iterator[PrometheusServer]:
    """Two services of two models under load, one with a link, and Prometheus beside them."""
    folder = tmp_path_factory.mktemp("watched")
    pair(folder / "device", folder / "gateway")
    keys: list[str] = []
    for name in ("one", "two"):
        flags = () if name == "one" else ("--requests", "1/day")
        made = run_tidegate("keys", "api", "add", str(folder / name), "team", *flags)
        assert made.returncode == 0, made.stderr
        keys.append(made.stdout.strip())
    with ExitStack() as stack:
        services = stack.enter_context(Services(folder))
        broker = services.mosquitto()
        link = ("--link", broker.url, "--keys", str(folder / "gateway"))
        flags = ("--metrics-per-key", "--name")
        one, two = (
            services.cloud(edge_checkpoint, "--state", str(folder / name), *flags, name, *more)
            for name, more in (("one", link), ("two", ()))
        )
        server = stack.enter_context(
            prometheus_server(folder, [one.url, two.url], rules=FOLDER / "alerts.yml")
        )
        stack.enter_context(load([one], keys[0]))
        stack.enter_context(load([two], keys[1]))
        yield server


def test_every_query_of_the_board_has_data(watched: PrometheusServer) -> None:
    assert WITHOUT_DATA.keys() <= panels().keys()
    for title, queries in panels().items():
        for query in queries:
            if title in WITHOUT_DATA:
                watched.query(query)
            else:
                until(partial(watched.finite, query), f"data for {title}: {query}", within_s=40)


def test_queries_that_were_made_for_vllm_have_data(watched: PrometheusServer) -> None:
    for query in FOR_VLLM:
        until(partial(watched.finite, query), f"data for {query}", within_s=40)


def test_variables_of_the_board_offer_what_is_there(watched: PrometheusServer) -> None:
    until(lambda: watched.finite("tidegate_key_calls_total"), "a key was used")
    for label, name, values in (
        ("model_name", "tidegate_num_requests_running", ["one", "two"]),
        ("job", "tidegate_num_requests_running", ["tidegate"]),
        ("key", "tidegate_key_calls_total", ["team"]),
    ):
        assert watched.get(f"label/{label}/values", **{"match[]": name}) == values


def test_rules_of_alerts_are_loaded_and_none_fires_on_services_that_are_well(
    watched: PrometheusServer,
) -> None:
    def evaluated() -> list[dict[str, Any]]:
        (group,) = watched.get("rules")["groups"]
        rules: list[dict[str, Any]] = group["rules"]
        return rules

    until(lambda: all(rule["health"] == "ok" for rule in evaluated()), "every rule was evaluated")
    assert [rule["name"] for rule in evaluated() if rule["state"] == "firing"] == []


def test_every_alert_fires_on_what_it_is_for_and_not_before() -> None:
    promtool("check", "rules", str(FOLDER / "alerts.yml"))
    told = promtool("test", "rules", str(FOLDER / "alerts-test.yml"))
    assert "SUCCESS" in told
    names = re.findall(r"- alert: (\w+)", (FOLDER / "alerts.yml").read_text())
    tested = re.findall(r"alertname: (\w+)", (FOLDER / "alerts-test.yml").read_text())
    assert set(names) == set(tested)
