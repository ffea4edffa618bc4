"""What OpenAI's client gets is what the pipeline gives; wrong requests are named."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from support.serving import Running, chat, data_url, held, running, until  # noqa: E402

from flashu_ext.models.folders import load_pipeline  # noqa: E402
from flashu_ext.server.arguments import image_arguments, read_object  # noqa: E402
from flashu_ext.server.limits import Limits  # noqa: E402

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
QUESTIONS = ("what color is the circle ?", "how many objects are there ?", "describe the image")


def client(server: Running, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def drawn(reply: Any, index: int = 0) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(reply.data[index].b64_json))).tobytes()


# ---- the same as without a server


def test_images_are_those_of_the_pipeline(server: Running, pipe: Any) -> None:
    prompt = "a red circle above a blue square"
    reply = client(server).images.generate(prompt=prompt, n=2, extra_body={"seed": 6, "steps": 5})
    assert [drawn(reply, index) for index in range(2)] == [pipe.generate(prompt, seed, 5).tobytes() for seed in (6, 7)]
    size = f"{pipe.pixels}x{pipe.pixels}"
    reply = client(server).images.generate(
        model="nano", prompt=prompt, size=size, response_format="b64_json", user="me"
    )
    assert drawn(reply) == pipe.generate(prompt, seed=0).tobytes()
    reply = client(server).images.generate(prompt=prompt, extra_body={"steps": 5, "guidance_scale": 0})
    assert drawn(reply) == pipe.generate(prompt, 0, 5, 0.0).tobytes()


def test_answers_are_those_of_the_pipeline(server: Running, pipe: Any, picture: Any) -> None:
    for question in QUESTIONS:
        reply = client(server).chat.completions.create(**chat(question, data_url(picture)))
        assert reply.choices[0].message.content == pipe.answer(picture, question)
        assert reply.choices[0].finish_reason == "stop"
    wide = Image.effect_noise((90, 61), 80).convert("RGB")
    reply = client(server).chat.completions.create(**chat(QUESTIONS[1], data_url(picture), data_url(wide)))
    assert reply.choices[0].message.content == pipe.answer([picture, wide], QUESTIONS[1])


def test_sampled_answers_are_those_of_the_pipeline(server: Running, pipe: Any, picture: Any) -> None:
    settings = {"temperature": 5.0, "top_p": 0.95, "seed": 3}
    alone = pipe.answer(picture, QUESTIONS[2], 9, **settings)
    reply = client(server).chat.completions.create(**chat(QUESTIONS[2], data_url(picture)), max_tokens=9, **settings)
    assert reply.choices[0].message.content == alone != pipe.answer(picture, QUESTIONS[2], 9)
    tokens: list[int] = []
    told = {"on_token": lambda _, token: tokens.append(token)}
    pipe.answer_batch([picture], [QUESTIONS[2]], 9, temperature=5.0, top_p=0.95, seeds=[3], **told)
    assert reply.usage.completion_tokens == len(tokens)
    assert reply.choices[0].finish_reason == ("stop" if tokens[-1] == pipe.layout.eos else "length")


def test_streamed_words_are_the_answer(server: Running, pipe: Any, picture: Any) -> None:
    settings = {"temperature": 5.0, "seed": 3, "max_completion_tokens": 9}
    whole = client(server).chat.completions.create(**chat(QUESTIONS[2], data_url(picture)), **settings)
    chunks = list(
        client(server).chat.completions.create(
            **chat(QUESTIONS[2], data_url(picture)), **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    words = [chunk.choices[0].delta.content for chunk in chunks[:-2]]
    assert len([word for word in words if word]) > 3
    assert "".join(words) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


def test_tokens_are_counted(server: Running, pipe: Any, picture: Any) -> None:
    asked = chat(QUESTIONS[0], data_url(picture), max_tokens=1)
    _, reply = server.post(CHAT, asked)
    count = len(pipe.layout.encode(QUESTIONS[0]))
    assert reply["usage"] == {"prompt_tokens": count, "completion_tokens": 1, "total_tokens": count + 1}
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("family", ["janusflow", "bagel"])
def test_other_families_are_served(family: str) -> None:
    own = load_pipeline("nano", family=family)
    with own.accelerate(*own.preset("exact")), running(own, Limits()) as server:
        drawn_alone = own.generate("a red circle", 3, 4)
        reply = client(server).images.generate(prompt="a red circle", extra_body={"seed": 3, "steps": 4})
        assert drawn(reply) == drawn_alone.tobytes()
        answer = client(server).chat.completions.create(**chat(QUESTIONS[0], data_url(drawn_alone)))
        assert answer.choices[0].message.content == own.answer(drawn_alone, QUESTIONS[0])
        status, param, said = server.error(IMAGES, {"prompt": "a red circle", "size": "7x7"})
        assert (status, param) == (400, "size"), said
        if family == "janusflow":
            status, param, said = server.error(CHAT, chat("?", *[data_url(drawn_alone)] * 2))
            assert (status, param) == (400, "messages") and "expected one image" in said


def test_many_clients_at_once_get_what_each_gets_alone(server: Running, pipe: Any, picture: Any) -> None:
    images = {seed: pipe.generate("a green triangle", seed, 4).tobytes() for seed in range(2)}
    answers = {question: pipe.answer(picture, question) for question in QUESTIONS}

    def ask(number: int) -> bool:
        if number % 2:
            seed = number // 2 % 2
            reply = client(server).images.generate(prompt="a green triangle", extra_body={"seed": seed, "steps": 4})
            return drawn(reply) == images[seed]
        question = QUESTIONS[number // 2 % 3]
        answer = client(server).chat.completions.create(**chat(question, data_url(picture)))
        return bool(answer.choices[0].message.content == answers[question])

    with ThreadPoolExecutor(10) as pool:  # five of each kind: fewer than may wait
        assert all(pool.map(ask, range(10)))


def test_sizes_are_width_by_height() -> None:
    fields = read_object(b'{"prompt": "a", "size": "640x480"}')
    assert image_arguments(fields, ["nano"], Limits()).size == (480, 640)


def test_a_model_s_name_may_be_an_adapter(picture: Any) -> None:
    pytest.importorskip("peft")
    from support.adapters import adapted, fill, second

    own = load_pipeline("nano")
    wrapped = adapted(own.model, seed=1)
    second(wrapped, "mine")
    fill(wrapped, "mine", std=0.3)
    asked: dict[str, Any] = {"temperature": 4.0, "seed": 3, "max_tokens": 8}
    with own.accelerate(*own.preset("exact")), running(own, Limits()) as server:
        wrapped.set_adapter("mine")
        image = own.generate("a red circle", 3, 4).tobytes()
        answer = own.answer(picture, QUESTIONS[2], 8, temperature=4.0, seed=3)
        wrapped.set_adapter("default")
        assert image != own.generate("a red circle", 3, 4).tobytes()
        assert [model.id for model in client(server).models.list()] == ["nano", "default", "mine"]
        assert client(server).models.retrieve("mine").id == "mine"
        settings = {"seed": 3, "steps": 4}
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(
                lambda model: client(server).images.generate(model=model, prompt="a red circle", extra_body=settings),
                ("mine", "nano", "mine", "default"),
            )
            images = [drawn(reply) for reply in replies]
        assert images[0] == images[2] == image and images[1] == images[3] != image
        reply = client(server).chat.completions.create(
            **chat(QUESTIONS[2], data_url(picture)) | {"model": "mine"} | asked
        )
        assert reply.model == "mine" and reply.choices[0].message.content == answer
        status, param, said = server.error(IMAGES, {"prompt": "a", "model": "yours"})
        assert (status, param) == (404, "model") and "expected 'nano' or 'default' or 'mine', got 'yours'" in said
        wrapped.merge_adapter()
        status, param, said = server.error(IMAGES, {"prompt": "a", "model": "mine"})
        assert (status, param) == (400, "model") and "merged" in said


# ---- wrong requests


def test_wrong_requests_are_named(server: Running, picture: Any) -> None:
    url = data_url(picture)
    png = base64.b64decode(url.partition(",")[2])
    huge = io.BytesIO()
    Image.new("1", (20000, 1000)).save(huge, "PNG")
    gif = io.BytesIO()
    picture.save(gif, "GIF")

    def sent(content: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(content).decode()

    message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    for fields, param, words in (
        (b"{", None, "body: not valid JSON"),
        (b"\xff", None, "body: "),
        (b'{"prompt": "a", "prompt": "b"}', None, "'prompt' appears twice"),
        (b'{"prompt": "a", "guidance_scale": NaN}', None, "NaN is not allowed"),
        (b"[" * 100_000, None, "body: "),
        (b"[1]", "body", "expected a JSON object, got [1]"),
        ({}, "prompt", "expected a string, got none"),
        ({"prompt": 3}, "prompt", "expected a string, got 3"),
        ({"prompt": " "}, "prompt", "expected a text"),
        ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
        ({"prompt": "a " * 9}, "prompt", "expected at most 8 tokens, got 9"),
        ({"prompt": "a" * 9000}, "prompt", "expected at most 8000 characters, got 9000"),
        ({"prompt": "a", "n": 5}, "n", "expected an integer in [1, 4], got 5"),
        ({"prompt": "a", "n": True}, "n", "expected an integer in [1, 4], got True"),
        ({"prompt": "a", "seed": -1}, "seed", "got -1"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed", "expected an integer in"),
        ({"prompt": "a", "steps": 1}, "steps", "expected an integer in [2, 2000], got 1"),
        ({"prompt": "a", "guidance_scale": "5"}, "guidance_scale", "expected a number in [0, 100]"),
        ({"prompt": "a", "size": "64"}, "size", "expected 'auto', or width x height"),
        ({"prompt": "a", "size": "64x64"}, "size", "expected 48 x 48 pixels"),
        ({"prompt": "a", "size": "9999x64"}, "size", "expected sides of 1 to 2048 pixels"),
        ({"prompt": "a", "response_format": "url"}, "response_format", "expected 'b64_json' or none"),
        ({"prompt": "a", "stream": True}, "stream", "expected False or none"),
        ({"prompt": "a", "style": "vivid"}, "style", "unknown argument"),
        ({"prompt": "a", "x" * 9999: 1}, "x" * 60, "unknown argument"),
    ):
        status, named, said = server.error(IMAGES, fields)
        assert status == 400 and words in said and (named or "").startswith(param or ""), (fields, said)
        assert (param is None) == (named is None)
    for fields, param, words in (
        (chat("?", url, n=2), "n", "expected 1 or none"),
        (chat("?", url, n=True), "n", "expected 1 or none"),
        (chat("?", url, stop=["x"]), "stop", "expected [] or none"),
        (chat("?", url, tools=[{}]), "tools", "expected [] or none"),
        (chat("?", url, frequency_penalty=0.5), "frequency_penalty", "expected 0 or none"),
        (chat("?", url, min_p=0.5), "min_p", "unknown argument"),
        (chat("?", url, temperature=-1), "temperature", "expected a number in [0, 100], got -1"),
        (chat("?", url, top_p=0), "top_p", "expected a number in (0, 1], got 0"),
        (chat("?", url, max_tokens=0), "max_tokens", "expected an integer in [1, 512], got 0"),
        (chat("?", url, max_tokens=3, max_completion_tokens=4), "max_tokens", "expected max_completion_tokens or this"),
        (chat("?", url, stream="yes"), "stream", "expected true or false"),
        (chat("?", url, stream_options={}), "stream_options", "expected with stream only"),
        ({"model": "nano"}, "messages", "expected a list of messages"),
        ({"model": "nano", "messages": [message, message]}, "messages", "expected one message of the user"),
        ({"model": "nano", "messages": [{"role": "system", "content": "x"}]}, "messages[0].role", "expected 'user'"),
        (
            {"model": "nano", "messages": [{"role": "user", "content": "x"}]},
            "messages[0].content",
            "at least one image",
        ),
        ({"model": "nano", "messages": [message]}, "messages[0].content", "expected 1 to 8 images, got 0"),
        ({"model": "nano", "messages": [message | {"tool_calls": []}]}, "messages[0].tool_calls", "unknown argument"),
        (chat("?", *[url] * 9), "messages[0].content", "at most 8 images"),
        (chat("", url), "messages[0].content[1].text", "expected a text"),
        (chat("?", "https://example.com/a.png"), "messages[0].content[0].image_url.url", "this server fetches nothing"),
        (chat("?", "file:///etc/passwd"), "messages[0].content[0].image_url.url", "this server fetches nothing"),
        (chat("?", "data:image/png;base64,%%%"), "messages[0].content[0].image_url.url", "expected base64"),
        (chat("?", url, sent(b"no image")), "messages[0].content[1].image_url.url", "not an image"),
        (chat("?", sent(gif.getvalue())), "messages[0].content[0].image_url.url", "not an image"),
        (chat("?", sent(png[: len(png) // 2])), "messages[0].content[0].image_url.url", "not a whole image"),
        (chat("?", sent(huge.getvalue())), "messages[0].content[0].image_url.url", "at most 1048576 pixels, got 20000"),
        (chat("?", sent(bytes(1 << 18))), "messages[0].content[0].image_url.url", "at most 131072 bytes"),
        (chat("?", data_url(Image.new("RGB", (1, 100_000)))), "messages", "sides of a like length"),
        (
            chat("?", *[data_url(Image.new("L", (800, 800)))] * 2),
            "messages[0].content[1].image_url.url",
            "at most 408576 pixels, got 800 x 800",
        ),
    ):
        status, named, said = server.error(CHAT, fields)
        assert status == 400 and words in said and named == param, (fields, named, said)
    assert server.error(CHAT, chat("?", url) | {"model": "gpt-4"})[:2] == (404, "model")
    assert server.error("/v1/nothing", {})[0] == 404
    assert server.request("GET", CHAT)[0] == 405
    assert server.post(IMAGES, {"prompt": "a", "steps": 2, "seed": None})[0] == 200


def test_the_client_raises_what_it_was_told(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client(server).images.generate(prompt="a red circle", n=9)
    assert raised.value.param == "n" and raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client(server).chat.completions.create(**chat("?", "") | {"model": "other"})
    assert missing.value.code == "model_not_found"


def test_a_wrong_request_leaves_those_of_its_step_alone(server: Running, pipe: Any, picture: Any) -> None:
    """It is refused where answers begin: so many images have no positions."""
    alone = [pipe.answer(picture, question) for question in QUESTIONS]
    config = pipe.model.showo.config
    before = config.max_position_embeddings
    config.max_position_embeddings = 200
    try:
        with ThreadPoolExecutor(4) as pool:
            with held(server.service.answering):
                good = [pool.submit(server.post, CHAT, chat(question, data_url(picture))) for question in QUESTIONS]
                bad = pool.submit(server.error, CHAT, chat("?", *[data_url(picture)] * 8))
                until(lambda: server.service.answering.asked == 4)
            status, param, said = bad.result()
            assert status == 400 and param is None and "language model has positions for" in said
            assert [reply.result()[1]["choices"][0]["message"]["content"] for reply in good] == alone
    finally:
        config.max_position_embeddings = before


# ---- models, keys, health, metrics


def test_models_and_health(server: Running) -> None:
    assert [model.id for model in client(server).models.list()] == ["nano"]
    assert json.loads(server.request("GET", "/health")[2]) == {"status": "ok"}


def test_keys(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    key = "a-secret-key"
    with running(pipe, Limits(at_once=1), key) as server:
        assert [model.id for model in client(server, key).models.list()] == ["nano"]
        for wrong in ("a-secret-kez", "a-secret-key2", "a", "x" * 9000):
            with pytest.raises(openai.AuthenticationError):
                client(server, wrong).models.list()
        assert server.request("GET", "/metrics")[0] == 401
        assert server.request("GET", "/v1/models", headers={"Authorization": key})[0] == 401
        assert server.request("GET", "/health")[0] == 200
        status, headers, body = server.request("POST", IMAGES, b"{}")
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key" and key not in body.decode()
    assert key not in caplog.text


def test_metrics_count(server: Running) -> None:
    names = (
        f'flashu_requests_total{{route="{IMAGES}",status="200"}}',
        f'flashu_requests_total{{route="{IMAGES}",status="400"}}',
        "flashu_images_total",
        f'flashu_request_seconds_count{{route="{IMAGES}"}}',
    )
    before = [server.metric(name) for name in names]
    assert server.post(IMAGES, {"prompt": "a", "steps": 2, "n": 2})[0] == 200
    assert server.post(IMAGES, {"prompt": "a", "n": 0})[0] == 400
    assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 2, 2]
    assert server.metric('flashu_asked{kind="image"}') == 0
