"""Clients that vanish, are slow, are too many, or send anything at all: the others get their results."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from fastapi.responses import StreamingResponse
from support.serving import LIMITS, PATIENCE, Running, chat, data_url, held, running, until

from flashu_ext.server.arguments import chat_arguments, image_arguments, read_object
from flashu_ext.server.errors import ApiError
from flashu_ext.server.limits import Limits

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SMALL = {"prompt": "a red circle", "steps": 2}


def raw(path: str, fields: Any) -> bytes:
    """A whole request."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def ended(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    try:
        while chunk := connection.recv(1 << 16):
            received += chunk
    except ConnectionError:
        pass
    return received


def received(connection: socket.socket, words: bytes) -> bytes:
    """What comes until some words have come."""
    data = b""
    while words not in data:
        chunk = connection.recv(1 << 16)
        assert chunk, data
        data += chunk
    return data


def served(server: Running) -> bool:
    return server.post(IMAGES, SMALL)[0] == 200


# ---- who vanishes


def test_an_image_whose_client_vanishes_is_given_up(server: Running) -> None:
    drawing = server.service.drawing
    given_up, images = 'flashu_given_up_total{kind="image"}', "flashu_images_total"
    before, drawn = server.metric(given_up), server.metric(images)
    with server.connect() as connection:
        connection.sendall(raw(IMAGES, {"prompt": "a red circle", "steps": 2000, "n": 2}))
        until(lambda: drawing.under_way == 2)
        images_under_way = list(drawing._many._live)
    until(lambda: drawing.asked == 0 and drawing.under_way == 0)
    assert all(each.done < each.work.evaluations for each in images_under_way)
    assert server.metric(given_up) == before + 2 and server.metric(images) == drawn
    assert not drawing._many._cancelled or served(server)
    assert drawing._many._cancelled == set(), "it is not remembered"


def test_an_image_that_waits_is_given_up(server: Running) -> None:
    drawing = server.service.drawing
    with ThreadPoolExecutor(5) as pool:
        with held(drawing):
            others = [pool.submit(server.post, IMAGES, SMALL | {"seed": seed}) for seed in range(4)]
            until(lambda: drawing.asked == 4)
            with server.connect() as connection:
                connection.sendall(raw(IMAGES, SMALL))
                until(lambda: drawing.asked == 5)
            until(lambda: server.metric(f'flashu_requests_total{{route="{IMAGES}",status="499"}}') > 0)
        assert [other.result()[0] for other in others] == [200] * 4
    until(lambda: drawing.asked == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_client_vanishes_is_given_up(server: Running, picture: Any, stream: bool) -> None:
    answering = server.service.answering
    before = server.metric('flashu_given_up_total{kind="answer"}')
    with server.connect() as connection:
        with held(answering):
            connection.sendall(raw(CHAT, chat("describe the image", data_url(picture), stream=stream)))
            until(lambda: answering.asked == 1)
            connection.close()
            until(lambda: server.metric('flashu_given_up_total{kind="answer"}') == before + 1)
    until(lambda: answering.asked == 0 and answering.under_way == 0)


def test_a_stream_whose_client_vanishes_in_its_midst_is_given_up(
    server: Running, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = server.service.answering
    step = answering._many.step

    def slow() -> Any:
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(answering._many, "step", slow)
    monkeypatch.setattr(server.service.pipe, "layout", _endless(server.service.pipe.layout))
    before = server.metric('flashu_given_up_total{kind="answer"}')
    asked = chat("describe the image", data_url(picture), stream=True, max_tokens=500, temperature=9.0, seed=1)
    with server.connect() as connection:
        connection.sendall(raw(CHAT, asked))
        received = b""
        while received.count(b"data: ") < 3:  # the role and two words
            received += connection.recv(1 << 16)
        assert answering.under_way == 1
    until(lambda: answering.under_way == 0)
    until(lambda: server.metric('flashu_given_up_total{kind="answer"}') == before + 1)


def _endless(layout: Any) -> Any:
    """The layout without an end of answers."""
    import dataclasses

    return dataclasses.replace(layout, eos=layout.pad)


# ---- who is slow


def test_slow_heads_and_bodies_end_and_others_are_served(server: Running) -> None:
    began = time.monotonic()
    heads = [server.connect() for _ in range(20)]
    bodies = [server.connect() for _ in range(20)]
    for each in heads:
        each.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nX-")
    for each in bodies:
        each.sendall(raw(IMAGES, {"prompt": "a" * 100})[:-20])
    assert served(server)
    further = server.connect()  # its second head is slow
    further.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert received(further, b'"ok"}').startswith(b"HTTP/1.1 200 ")
    further.sendall(b"GET /health HT")
    for each in (*heads, *bodies):
        each.settimeout(60)
    assert [ended(each) for each in heads] == [b""] * 20
    assert time.monotonic() - began > LIMITS.read_seconds * 0.9
    assert all(received(each, b'"code":"timeout"').startswith(b"HTTP/1.1 408 ") for each in bodies)
    assert ended(further) == b""
    for each in (*heads, *bodies, further):
        each.close()
    assert served(server) and server.service.bodies._held == 0


@pytest.mark.parametrize("piece", [50 << 20, 1 << 20], ids=["at once", "in pieces"])
def test_a_client_that_takes_nothing_is_cut_off(pipe: Any, piece: int) -> None:
    """Of a reply that is written at once, the server waits with the connection; of one in pieces with the reply."""

    def big(app: Any) -> None:
        app.add_api_route("/big", lambda: StreamingResponse(iter([bytes(piece)] * ((50 << 20) // piece))))

    with running(pipe, LIMITS, change=big) as server, server.connect() as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        until(lambda: not server.server.server_state.connections)
        assert len(ended(connection)) < 50 << 20
        assert served(server)


def test_late_results_are_504(pipe: Any, picture: Any) -> None:
    with running(pipe, Limits(request_seconds=0.2)) as server:
        with held(server.service.drawing), held(server.service.answering):
            for path, fields in ((IMAGES, SMALL), (CHAT, chat("?", data_url(picture), stream=True))):
                status, param, said = server.error(path, fields)
                assert (status, param) == (504, None) and "within 0.2 s" in said
        until(lambda: server.service.drawing.asked == server.service.answering.asked == 0)
        assert server.request("GET", "/health")[0] == 200


def test_who_waits_to_be_looked_at_may_leave_and_is_not_looked_at(pipe: Any, picture: Any) -> None:
    """Bodies are looked at by two threads; here both are taken, as by large images of others."""
    with running(pipe, Limits(request_seconds=0.5)) as server:
        service, go = server.service, threading.Event()
        looked: list[str] = []
        service._chat_arguments = lambda _: looked.append("at an image")  # type: ignore[method-assign,assignment,return-value]
        taken = [service._threads.submit(go.wait, PATIENCE) for _ in range(2)]
        try:
            with server.connect() as connection:
                connection.sendall(raw(CHAT, chat("?", data_url(picture))))
                until(lambda: service.bodies._held > 0)
            until(lambda: server.metric(f'flashu_requests_total{{route="{CHAT}",status="499"}}') == 1)
            assert server.error(CHAT, chat("?", data_url(picture)))[0] == 504
            assert service.bodies._held == 0 and server.metric('flashu_given_up_total{kind="answer"}') == 0
        finally:
            go.set()
        assert all(each.result(PATIENCE) for each in taken)
        assert served(server) and looked == []


# ---- who sends too much


def test_too_many_requests_are_429_and_the_others_are_served(server: Running, pipe: Any) -> None:
    most = LIMITS.at_once + LIMITS.waiting
    with ThreadPoolExecutor(most) as pool:
        with held(server.service.drawing):
            asked = [pool.submit(server.post, IMAGES, SMALL | {"seed": seed}) for seed in range(most - 1)]
            until(lambda: server.service.drawing.asked == most - 1)
            assert server.error(IMAGES, SMALL | {"n": 2})[0] == 429, "all of a request, or none"
            asked.append(pool.submit(server.post, IMAGES, SMALL | {"seed": most - 1}))
            until(lambda: server.service.drawing.asked == most)
            status, headers, body = server.request("POST", IMAGES, json.dumps(SMALL).encode())
            assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
            assert json.loads(body)["error"] | {"message": ""} == {
                "message": "",
                "type": "rate_limit_error",
                "param": None,
                "code": "rate_limit_exceeded",
            }
        images = [reply.result()[1]["data"][0]["b64_json"] for reply in asked]
    for seed, image in enumerate(images):
        assert _pixels(image) == pipe.generate("a red circle", seed, 2).tobytes()


def _pixels(text: str) -> bytes:
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(text))).tobytes()


def test_bodies_are_bounded(server: Running) -> None:
    most = LIMITS.body_bytes
    assert server.error(IMAGES, b" " * (most + 1))[0] == 413
    assert server.error(IMAGES, b" " * most)[0] == 400
    with server.connect() as connection:  # without a length
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        for _ in range(most // 0x10000 + 1):
            connection.sendall(chunk)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    slow = [server.connect() for _ in range(3)]  # together more than is held
    for each in slow:
        each.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % most)
        each.sendall(bytes(most - 1))
    replies = [each.recv(1000)[:13] for each in slow]
    assert sorted(replies) == [b"HTTP/1.1 408 ", b"HTTP/1.1 408 ", b"HTTP/1.1 429 "]
    for each in slow:
        each.close()
    assert served(server)


def test_other_types_and_broken_http_are_refused(server: Running) -> None:
    status, _, body = server.request("POST", IMAGES, json.dumps(SMALL).encode(), {"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in json.loads(body)["error"]["message"]
    for broken in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 20_000, b"\r\n" * 9000):
        with server.connect() as connection:
            connection.sendall(broken)
            assert ended(connection)[:13] in (b"HTTP/1.1 400 ", b"")
    assert served(server)


def test_what_is_no_http_in_the_midst_of_a_body_ends_it_quietly(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """A chunk without a size: while the server waits for more of the body, after it has refused it, and before it could."""
    log = logging.getLogger("uvicorn.error")
    before_level = log.level
    log.addHandler(caplog.handler)
    log.setLevel(logging.ERROR)
    line = f'flashu_requests_total{{route="{IMAGES}",status="%d"}}'
    before = server.metric(line % 499), server.metric(line % 415)
    head = HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\n'
    with server.connect() as connection:
        connection.sendall(head)
        until(lambda: server.service.bodies._held > 0)
        connection.sendall(b"ZZZ\r\n")
        assert ended(connection).startswith(b"HTTP/1.1 400 ")
    with server.connect() as connection:
        connection.sendall(head.replace(b"application/json", b"text/plain"))
        assert received(connection, b"expected application/json").startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"ZZZ\r\n")
        ended(connection)
    with server.connect() as connection:
        connection.sendall(head.replace(b"application/json", b"text/plain") + b"ZZZ\r\n")
        assert ended(connection).startswith(b"HTTP/1.1 400 ")
    until(lambda: (server.metric(line % 499), server.metric(line % 415)) == (before[0] + 1, before[1] + 2))
    assert server.service.bodies._held == 0 and served(server)
    log.removeHandler(caplog.handler)
    log.setLevel(before_level)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR], caplog.text


# ---- a step that fails


def test_a_step_that_fails_ends_its_requests_and_no_later_ones(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = server.service.drawing
    failures = drawing.failures

    def fails() -> Any:
        monkeypatch.undo()
        raise ValueError("prompt: looks like a wrong argument")

    monkeypatch.setattr(drawing._many, "step", fails)
    status, param, said = server.error(IMAGES, SMALL)
    assert (status, param) == (500, None) and "looks like" not in said
    assert drawing.failures == failures + 1
    assert served(server)


# ---- anything

NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def some(**fields: Any) -> Any:
    """Objects with any of these members, or any JSON in their place."""
    return st.fixed_dictionaries({}, optional={name: value | JSON for name, value in fields.items()}) | JSON


def named(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), NUMBERS)


URL = some(url=st.sampled_from(["data:image/png;base64,AAAA", "x"]), detail=st.just("auto"))
PART = some(type=st.sampled_from(["text", "image_url", "video"]), text=st.just("?"), image_url=URL)
MESSAGES = st.lists(some(role=st.just("user"), content=st.lists(PART, max_size=3), name=st.just("me")), max_size=2)
DRAWING = named("n seed steps size guidance_scale stream response_format quality")
SAMPLING = named("max_tokens max_completion_tokens temperature top_k top_p seed stream_options stop n logit_bias")
BODIES = some(prompt=st.text(), model=st.just("nano"), **DRAWING) | some(
    messages=MESSAGES, model=st.just("nano"), **SAMPLING
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BODIES)
def test_any_json_is_read_or_refused_by_name(fields: Any) -> None:
    body = json.dumps(fields).encode()
    for read in (image_arguments, chat_arguments):
        try:
            read(read_object(body), ["nano"], LIMITS)
        except ApiError as error:
            told = error.body()["error"]
            assert 400 <= error.status < 500 and len(told["message"]) <= 500 and json.dumps(told).encode()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(BODIES.map(lambda fields: json.dumps(fields).encode()) | st.binary(max_size=40), st.sampled_from([IMAGES, CHAT]))
def test_anything_sent_is_no_failure_of_the_server(server: Running, body: bytes, path: str) -> None:
    status, reply = server.post(path, body)
    assert status == 200 or (status in (400, 404) and set(reply["error"]) == {"message", "type", "param", "code"})


def test_nothing_is_left(server: Running) -> None:
    """After all of the above."""
    service = server.service
    until(lambda: service.drawing.asked == service.answering.asked == 0)
    assert service.bodies._held == 0 and service.metrics.unanswered == 0
    assert served(server)
