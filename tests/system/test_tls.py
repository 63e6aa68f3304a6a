"""HTTPS in the real service: its page as written, curl and the openai client, new certificates."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pemfiles import Authority
from services import Service, Services, free_port, run_tidegate, until

pytestmark = pytest.mark.system

PAGE = (Path(__file__).resolve().parents[2] / "docs/deploy/tls.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def test_every_command_of_the_page_runs(tmp_path: Path, edge_checkpoint: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "tidegate").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m tidegate.cli "$@"\n')
    (tools / "tidegate").chmod(0o755)
    commands = "\n".join(BLOCK.findall(PAGE)).replace(":8090", f":{free_port()}")
    commands = commands.replace("examples/assistant/cloud", str(edge_checkpoint))
    done = subprocess.run(
        ["bash", "-c", f"set -eum\ntrap 'kill $(jobs -p) 2> jobs.log || true' EXIT\n{commands}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"object":"chat.completion"' in done.stdout
    assert done.stdout.endswith("nobody gets in without one\n")
    assert "TLS: the certificate was loaded again" in done.stderr


def serial(service: Service, ca: Authority) -> str:
    """Of the certificate that a new connection is shown."""
    with httpx.Client(verify=ca.trusting()) as client:
        stream = client.get(f"{service.url}/health").extensions["network_stream"]
        return str(stream.get_extra_info("ssl_object").getpeercert()["serialNumber"])


def test_a_stream_goes_on_while_its_servers_certificate_is_exchanged(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    ca = Authority.make(tmp_path)
    files = ca.certify("server")
    with Services(tmp_path) as services:
        service = services.cloud(
            cloud_checkpoint, "--tls-cert", str(files.certificate), "--tls-key", str(files.key)
        )
        assert service.url.startswith("https://")
        before = serial(service, ca)
        http: Any = httpx.Client(verify=ca.trusting())
        with openai.OpenAI(
            base_url=f"{service.url}/v1", api_key="none", http_client=http
        ) as client:
            asking: Any = client.chat.completions
            body = ASK | {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
            stream = asking.create(model="cloud", stream=True, **body)
            chunks = [next(stream)]
            following = ca.certify("next")
            shutil.copy(following.key, files.key)
            shutil.copy(following.certificate, files.certificate)
            service.process.send_signal(signal.SIGHUP)
            until(lambda: serial(service, ca) != before, "the new certificate is shown")
            assert len(chunks) == 1, "the stream is still being read"
            chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert service.process.poll() is None
        assert service.stop() == 0


def test_the_device_serves_clients_with_certificates_only(tmp_path: Path, bundle: Path) -> None:
    ca = Authority.make(tmp_path)
    files, known = ca.certify("server"), ca.certify("known")
    flags = ("--tls-cert", str(files.certificate), "--tls-key", str(files.key))
    with Services(tmp_path) as services:
        service = services.serve(bundle, *flags, "--tls-client-ca", str(ca.path))
        shown = ("--cert", str(known.certificate), "--key", str(known.key))
        curl = ("curl", "-sS", "--cacert", str(ca.path), f"{service.url}/health")
        good = subprocess.run([*curl, *shown], capture_output=True, text=True, check=True)
        assert '"healthy":true' in good.stdout
        bad = subprocess.run(curl, capture_output=True, text=True, check=False)
        assert (bad.returncode != 0, bad.stdout) == (True, "")  # curls say it in their own words


def test_files_that_cannot_be_used_end_the_start_in_one_line(
    tmp_path: Path, edge_checkpoint: Path
) -> None:
    ca = Authority.make(tmp_path)
    late = ca.certify("late", days=(-9, -1))
    flags = ("--tls-cert", str(late.certificate), "--tls-key", str(late.key))
    done = run_tidegate("cloud", str(edge_checkpoint), *flags)
    assert done.returncode == 1
    assert "valid now, not only from" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    done = run_tidegate("cloud", str(edge_checkpoint), *flags[2:])
    assert "tls-cert = None: must be a PEM file" in done.stderr
