"""`flashu-ext serve`: how it begins and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from flashu_ext.cli.main import cli
from flashu_ext.cli.serve import LIMITS

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from flashu_ext.server.limits import Limits
from flashu_ext.server.run import GIVES_WAY

KEY = "a-key-of-the-tests"


@contextlib.contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], http.client.HTTPConnection]]:
    command = [sys.executable, "-m", "flashu_ext.cli", "serve", "--port", "0", "--api-key", KEY, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        assert host == "127.0.0.1"
        yield process, http.client.HTTPConnection(host, int(port), timeout=120)
    finally:
        process.kill()
        process.communicate()


def post(connection: http.client.HTTPConnection, steps: int) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request(
        "POST", "/v1/images/generations", json.dumps({"prompt": "a red circle", "steps": steps}), headers
    )
    return connection.getresponse()


def begun(connection: http.client.HTTPConnection) -> None:
    """Wait until an image is in progress."""
    other = http.client.HTTPConnection(connection.host, connection.port, timeout=120)
    while True:
        other.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        if b'flashu_in_progress{kind="image"} 1.0' in other.getresponse().read():
            return


def niceness(process: int) -> dict[int, int]:
    """Of each thread of a process."""
    return {
        int(path.name): os.getpriority(os.PRIO_PROCESS, int(path.name))
        for path in Path(f"/proc/{process}/task").iterdir()
    }


def test_the_event_loop_gives_way_to_the_model() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with started() as (process, _):
        nice = niceness(process.pid)
    assert nice.pop(process.pid) == min(19, own + GIVES_WAY)
    assert own in nice.values(), "the model's thread"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_it(number: signal.Signals) -> None:
    given_up = number == signal.SIGTERM  # here it has no time; with SIGINT it has
    options = ("--max-steps", "5000", "--grace", "1" if given_up else "60")
    with started(*options) as (process, connection):
        replies: list[int | type[Exception]] = []

        def ask() -> None:
            try:
                replies.append(post(connection, 5000 if given_up else 100).status)
            except (http.client.HTTPException, OSError) as error:
                replies.append(type(error))

        client = threading.Thread(target=ask)
        client.start()
        begun(connection)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        client.join(120)
    assert out == "" and KEY not in err
    if given_up:
        assert process.returncode == 1, err
        assert "1 requests were given up: they had not ended 1 s after the signal" in err
        assert replies == [503]
    else:
        assert process.returncode == 0, err
        assert replies == [200] and '"POST /v1/images/generations HTTP/1.1" 200' in err


def test_a_port_in_use_is_said_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "--port", str(port), "--model", "/no/such/folder"])
    assert result.exit_code == 1 and result.output.startswith(f"Error: [Errno 98] 127.0.0.1 port {port}: ")


def test_wrong_options_are_2() -> None:
    for options, words in (
        (("--at-once", "0"), "Invalid value for '--at-once': 0 is not in the range x>=1"),
        (("--max-n", "99"), "--max-n: expected at most 40, which is at_once + waiting, got 99"),
        (("--body-bytes", "9999999999"), "--bodies-bytes: expected at least body_bytes"),
        (("--read-seconds", "0"), "read-seconds"),
        (("--family", "bagel", "--model", "/no/such/folder"), "--family: expected with 'nano' alone"),
        (("--api-key", "", "--port", "0"), "--api-key: expected printable ASCII"),
        (("--api-key", "tröt", "--port", "0"), "--api-key: expected printable ASCII"),
    ):
        result = CliRunner().invoke(cli, ["serve", *options])
        assert result.exit_code == 2 and words in result.output, result.output
        assert "tröt" not in result.output
    result = CliRunner().invoke(cli, ["serve"], env={"FLASHU_API_KEY": ""})
    assert result.exit_code == 2 and "FLASHU_API_KEY: expected a key, got an empty one" in result.output


def test_what_is_no_pipeline_is_refused() -> None:
    from flashu_ext.server.app import application

    with pytest.raises(TypeError, match="pipe: expected a pipeline of flashu_ext, got object"):
        application(object())


def test_limits_are_options() -> None:
    assert list(LIMITS) == list(Limits.__dataclass_fields__)
