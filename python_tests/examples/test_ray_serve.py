"""Two replicas under Ray Serve give what the pipeline gives. Runs where Ray is installed, which is too big for CI."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import flashu_ext as fx

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve", reason="ray[serve] is not installed")

FILE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    import ray
    from ray import cloudpickle, serve

    spec = importlib.util.spec_from_file_location("ray_serve_example", FILE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    cloudpickle.register_pickle_by_value(example)  # replicas cannot import it
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(example.deployment(replicas=2, cpus=0.5))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def post(url: str, path: str, fields: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url + path, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        assert text.startswith(b"{"), (error.code, text)
        return error.code, json.loads(text)


def test_two_replicas_give_what_the_pipeline_gives(url: str) -> None:
    from ray import serve
    from support.serving import chat, data_url

    status = serve.status().applications["default"].deployments["flashu"]
    assert status.replica_states == {"RUNNING": 2}
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    with pipe.accelerate(fx.FlashUConfig.exact()):
        images = [pipe.generate("a red circle", seed, 6) for seed in range(4)]
        answer = pipe.answer(images[0], "what color is the circle ?")

    def draw(seed: int) -> bytes:
        code, reply = post(url, IMAGES, {"prompt": "a red circle", "seed": seed % 4, "steps": 6})
        assert code == 200, reply
        return Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"]))).tobytes()

    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(draw, range(16)))
    assert drawn == [image.tobytes() for image in images] * 4
    question = chat("what color is the circle ?", data_url(images[0]))
    code, reply = post(url, "/v1/chat/completions", question)
    assert code == 200 and reply["choices"][0]["message"]["content"] == answer
    code, reply = post(url, IMAGES, {"prompt": "a red circle", "stepz": 6})
    assert code == 400 and reply["error"]["param"] == "stepz"
    body = json.dumps(question | {"stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as stream:
        events = [line[6:] for line in stream.read().decode().splitlines() if line]
    assert events[-1] == "[DONE]"
    words = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(words) == answer


def test_a_client_that_vanishes_frees_its_replica(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a red circle", "steps": 200, "n": 4}).encode()
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)
    ends = time.monotonic() + 60
    given_up = 0.0
    while not given_up:  # /metrics is of one replica, whichever is asked
        assert time.monotonic() < ends
        text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
        lines = [line for line in text.splitlines() if line.startswith('flashu_given_up_total{kind="image"}')]
        given_up = float(lines[0].rsplit(" ", 1)[1])
    assert given_up == 4
