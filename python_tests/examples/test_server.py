"""The example server under load: many clients at once get what each would get alone; wrong requests are named."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import flashu_ext as fx

SERVER = Path(__file__).parents[2] / "examples" / "server.py"
PROMPTS = ("a red circle above a blue square", "a green triangle")
QUESTIONS = ("what color is the circle ?", "how many objects are there ?")
CLIENTS = 9


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, str(SERVER), "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(30)


def post(url: str, fields: Any) -> bytes:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=300) as reply:
        return bytes(reply.read())


def refused(url: str, fields: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(url, fields)
    return raised.value.code, json.loads(raised.value.read())["error"]


def test_many_clients_get_what_each_gets_alone(url: str) -> None:
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    with pipe.accelerate(fx.FlashUConfig.exact()):
        images = [pipe.generate(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
        answers = {(i, q): pipe.answer(image, q) for i, image in enumerate(images) for q in QUESTIONS}
    sent = []
    for image in images:
        png = io.BytesIO()
        image.save(png, "PNG")
        sent.append(base64.b64encode(png.getvalue()).decode())

    def client(number: int) -> None:
        which = number % len(PROMPTS)
        if number % 3 == 0:
            drawn = Image.open(io.BytesIO(post(f"{url}/generate", {"prompt": PROMPTS[which], "seed": which})))
            assert drawn.tobytes() == images[which].tobytes()
        for question in QUESTIONS * 2:
            got = json.loads(post(f"{url}/answer", {"image": sent[which], "question": question}))
            assert got == {"answer": answers[which, question]}

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))


def test_wrong_requests_are_named_and_the_next_one_works(url: str) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 100).save(file, "PNG")
    png = file.getvalue()
    assert refused(f"{url}/nothing", {})[0] == 404
    for path, fields, words in (
        ("generate", b"{", "body: "),
        ("generate", b"\xff", "body: "),
        ("generate", [1], "body: expected a JSON object"),
        ("generate", {}, "'prompt' is missing"),
        ("generate", {"prompt": "a red circle", "seed": -1}, "seed: "),
        ("generate", {"prompt": "a red circle", "seed": "1"}, "seed: "),
        ("generate", {"prompt": 3}, "prompt: "),
        ("generate", {"prompt": "a", "steps": 2}, "'steps': unknown field; expected prompt, seed"),
        ("answer", {"image": "", "question": "?", "x" * 999: 1}, ": unknown field; expected image, question"),
        ("answer", {"image": "no base64!", "question": "?"}, "image: expected base64"),
        ("answer", {"image": 3, "question": "?"}, "image: expected a string of base64, got int"),
        (
            "answer",
            {"image": base64.b64encode(b"no image").decode(), "question": "?"},
            "image: not a whole image: cannot",
        ),
        ("answer", {"image": base64.b64encode(png[:-30]).decode(), "question": "?"}, "image: not a whole image"),
        ("answer", {"image": base64.b64encode(png).decode(), "question": 3}, "question: "),
        ("answer", {"image": base64.b64encode(png).decode()}, "'question' is missing"),
    ):
        code, error = refused(f"{url}/{path}", fields)
        assert code == 400 and words in error and len(error) <= 500, (path, error)
    huge = io.BytesIO()
    Image.new("1", (20000, 1000)).save(huge, "PNG")
    assert (
        "at most" in refused(f"{url}/answer", {"image": base64.b64encode(huge.getvalue()).decode(), "question": "?"})[1]
    )
    host, port = url.removeprefix("http://").split(":")
    for raw in (b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(raw)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert post(f"{url}/generate", {"prompt": PROMPTS[0]})[:4] == b"\x89PNG"


def test_help_has_an_example() -> None:
    shown = subprocess.run([sys.executable, str(SERVER), "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "curl" in shown.stdout and "/answer" in shown.stdout
