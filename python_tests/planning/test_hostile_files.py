"""Small hostile files: every reader answers with one short error that names the file, and a full disk changes nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.models import small_model

from flashu_ext import FlashUConfig, TaskPlan
from flashu_ext.batch.folder import MANIFEST, complete_png, open_folder
from flashu_ext.batch.prompts import make_jobs, read_prompts
from flashu_ext.calibration.data import folder_samples, read_folder
from flashu_ext.calibration.state import load_states
from flashu_ext.cli.main import cli
from flashu_ext.cli.support import read_config
from flashu_ext.models.showo2 import Pipeline, Showo2
from flashu_ext.models.showo2.config import _LLM_OPTIONS, Showo2Config
from flashu_ext.planning.reading import printable, read_image, refusal, shown, strict_json
from flashu_ext.planning.safe_files import load_safetensors, save_safetensors

LIMIT = 20
"""Seconds after which a reader that waits is interrupted, and its test fails."""

SETTINGS = {"tasks": ["generation"], "times": [0.5], "seed": 0, "layers": 2, "intermediate": 4}


@pytest.fixture(autouse=True)
def no_reader_waits() -> Iterator[None]:
    def end(*_: Any) -> None:
        pytest.fail(f"still reading after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_data(path: Path) -> Any:
    """The reader of `calibrate --data`, of the folder that the file lies in."""
    return read_folder(path.parent)


def load_model(path: Path) -> Any:
    return Showo2.from_pretrained(path.parent)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "plan": ("plan.safetensors", TaskPlan.load),
    "tensors": ("x.safetensors", load_safetensors),
    "state": ("state.safetensors", lambda path: load_states(path, SETTINGS, torch.device("cpu"))),
    "settings": ("config.json", read_config),
    "prompts": ("prompts.txt", read_prompts),
    "prompts in JSON": ("prompts.jsonl", read_prompts),
    "samples": ("generation.jsonl", read_data),
    "image": ("image.png", read_image),
    "manifest": (MANIFEST, lambda path: open_folder(path.parent, {}, make_jobs(["a"]))),
    "model's configuration": ("config.json", load_model),
    "weights": ("model.safetensors", load_model),
    "pickled weights": ("pytorch_model.bin", load_model),
    "index": ("model.safetensors.index.json", load_model),
}
JSON_READERS = ("settings", "prompts in JSON", "samples", "manifest", "model's configuration", "index")
HEADER_READERS = ("plan", "tensors", "state", "weights")


def refused(read: Callable[[Path], Any], path: Path, text: str = "") -> None:
    """The reader raises an error that names the file, is short, and holds nothing that a terminal takes for a command."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message and text in message and len(message) <= 500 and message.isprintable(), message


def prepare(name: str, folder: Path) -> tuple[Callable[[Path], Any], Path]:
    """A reader with the path of its file, which is still to be made."""
    file, read = READERS[name]
    if name in ("weights", "pickled weights", "index"):
        (folder / "config.json").write_text("{}")
    if name == "model's configuration":
        header(folder / "model.safetensors", {})
    return read, folder / file


def header(path: Path, content: Any, body: bytes = b"", length: int | None = None) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)


# ---- what is no file


STANDS_IN: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a directory": os.mkdir,
    "a character device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", STANDS_IN)
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    read, path = prepare(name, tmp_path)
    STANDS_IN[kind](path)
    refused(read, path, f"expected a regular file, got {kind}")


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("plan.safetensors")
        refused(TaskPlan.load, Path("plan.safetensors"), "got a socket")


@pytest.mark.parametrize("name", READERS)
def test_other_bytes(name: str, tmp_path: Path) -> None:
    read, path = prepare(name, tmp_path)
    for content in (b"", b"\xff\xfe\x00\x1b[31m", b"PK\x03\x04\xff", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        refused(read, path)


def test_a_name_with_nul() -> None:
    with pytest.raises(ValueError, match=r"plan.*null byte") as caught:
        TaskPlan.load("plan\0")
    assert str(caught.value).isprintable()


def test_names_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a" * 5000, "/x" * 3000 + "/plan", "\x1b\n" * 2000, "plan\x1b", "\udcff", "plan" * 1000 + "\0"):
        for read in (TaskPlan.load, read_config):
            with pytest.raises((OSError, ValueError)) as caught:
                read(name)  # type: ignore[operator]
            message = str(caught.value)
            assert repr(name)[1:5] in message.replace("\\\\", "\\") and len(message) <= 500, message
            assert message.isprintable(), message


def test_what_can_be_opened_and_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    path.symlink_to("/proc/self/mem")
    for read in (TaskPlan.load, read_config):
        with pytest.raises(OSError, match=r"Input/output error: '.*plan\.safetensors'"):
            read(path)


@pytest.mark.parametrize("path", [None, 5, b"plan", ["plan"]])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path: expected a string or a path, got"):
        TaskPlan.load(path)


# ---- JSON

HOSTILE_JSON = {
    "nested lists": ("[" * 200_000, "not valid JSON"),
    "nested objects": ('{"a":' * 100_000, "not valid JSON"),
    "nested within the parser's limit": ("[" * 500 + "]" * 500, "within each other"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' appears twice"),
    "NaN": ('{"a": NaN}', "NaN is not allowed"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not allowed"),
    "infinity by its size": ('{"a": 1e999}', "expected finite numbers"),
    "10^400": ('{"a": 1' + 400 * "0" + "}", "at most 308 digits"),
    "10^5000": ('{"a": -1' + 5000 * "0" + "}", "at most 308 digits"),
    "control codes": ('{"\\u001b[2J\\u0000": 1}', ""),
    "a long key": ('{"' + 100_000 * "k" + '": 1}', ""),
    "a lone surrogate": ('{"\\ud800": 1}', ""),
    "a list": ("[]", ""),
}


@pytest.mark.parametrize("content", HOSTILE_JSON)
@pytest.mark.parametrize("name", JSON_READERS)
def test_hostile_json(name: str, content: str, tmp_path: Path) -> None:
    read, path = prepare(name, tmp_path)
    text, message = HOSTILE_JSON[content]
    path.write_text(text)
    refused(read, path, message)


@pytest.mark.parametrize("content", HOSTILE_JSON)
@pytest.mark.parametrize("name", HEADER_READERS)
def test_hostile_headers_of_json(name: str, content: str, tmp_path: Path) -> None:
    read, path = prepare(name, tmp_path)
    text, message = HOSTILE_JSON[content]
    header(path, text.encode())
    refused(read, path, message)


@pytest.mark.parametrize("length", [2 * 2**20 + 1, 99 * 2**20])
def test_long_json_is_refused_by_its_length(length: int, tmp_path: Path) -> None:
    for name in ("plan", "settings", "model's configuration"):
        folder = tmp_path / name
        folder.mkdir()
        read, path = prepare(name, folder)
        body = b"[" + b"[]," * (length // 3) + b"]"
        header(path, body) if name == "plan" else path.write_bytes(body)
        refused(read, path, "at most 2097152 bytes")


def tensor(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


HOSTILE_HEADERS: dict[str, tuple[Any, str]] = {
    "2^62 fifty thousand times": (tensor(shape=[2**62] * 50_000, data_offsets=[0, 0]), "at most 64 dimensions"),
    "2^62 sixty-four times": (tensor(shape=[2**62] * 64, data_offsets=[0, 0]), "needs"),
    "a hundred thousand dimensions": (tensor(shape=[1] * 100_000), "at most 64 dimensions"),
    "2^63": (tensor(shape=[2**63]), "integers in [0, 2^63)"),
    "a negative size": (tensor(shape=[-1]), "integers in [0, 2^63)"),
    "a size as a float": (tensor(shape=[1.0]), "integers in [0, 2^63)"),
    "dtype as a list": (tensor(dtype=["F32"]), "unknown dtype ['F32']"),
    "dtype as an object": (tensor(dtype={}), "unknown dtype {}"),
    "an unknown dtype": (tensor(dtype="F" * 5000), "unknown dtype"),
    "offsets of three": (tensor(data_offsets=[0, 4, 8]), "[begin, end]"),
    "offsets backwards": (tensor(data_offsets=[4, 0]), "[begin, end]"),
    "a gap": (tensor(data_offsets=[4, 8]), "overlap or gap"),
    "an entry that is a list": ({"\x1b[31m": []}, "expected dtype, shape and data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "object of strings"),
}


@pytest.mark.parametrize("content", HOSTILE_HEADERS)
@pytest.mark.parametrize("name", HEADER_READERS)
def test_hostile_headers(name: str, content: str, tmp_path: Path) -> None:
    read, path = prepare(name, tmp_path)
    header(path, HOSTILE_HEADERS[content][0], b"\0" * 4)
    refused(read, path, HOSTILE_HEADERS[content][1])


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 5])
def test_lengths_of_headers(length: int, tmp_path: Path) -> None:
    header(tmp_path / "plan.safetensors", b"{}", length=length)
    refused(TaskPlan.load, tmp_path / "plan.safetensors", f"header claims {length} bytes")


@given(st.recursive(st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False,
       allow_infinity=False) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_json_is_read_as_the_library_reads_it(value: Any) -> None:
    assert strict_json(json.dumps(value), "x") == value


# ---- settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": 10**300}, "FlashUConfig.steps: expected None or an integer >= 2"),
        ({"steps": [2]}, "FlashUConfig.steps"),
        ({"ffn": {"ratio": 10**300}}, "FfnPruning.ratio"),
        ({"ffn": {"ratio": "x" * 10_000}}, "FfnPruning.ratio"),
        ({"ffn_prune_ratio": [[[]]]}, "FlashUConfig.ffn_prune_ratio"),
        ({"guidance": [[1, 10**300, 2]]}, "FlashUConfig.guidance"),
        ({"answers": 3}, "FlashUConfig.answers"),
    ],
)
def test_hostile_settings(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    refused(read_config, path, message)
    result = CliRunner().invoke(cli, ["schedule", "--config", str(path)])
    assert result.exit_code == 1 and "config.json: " in result.output and len(result.output) < 520


def test_numbers_that_no_float_holds() -> None:
    for value in (10**400, -(10**5000)):
        with pytest.raises(ValueError, match=r"FlashUConfig.ffn_prune_ratio: expected a number in \[0, 1\)"):
            FlashUConfig(ffn_prune_ratio=value)
        with pytest.raises(ValueError, match=r"ratio: expected a number in \[0, 1\)"):
            TaskPlan.from_scores(generation=[torch.rand(4)], ratio=value)
    assert shown(10**5000) == "an unprintable int"


def test_notes_that_could_not_be_read_again_are_not_written(tmp_path: Path) -> None:
    plan = TaskPlan.from_scores(generation=[torch.rand(4)])
    for notes in ({"a": 10**400}, {"a": "x" * 5 * 2**20}, {1: "a", "1": "b"}):
        with pytest.raises(ValueError):
            TaskPlan(plan.scores, 0.2, 1, notes=notes).save(tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match=r"plan\.safetensors: could not be read again"):
        save_safetensors(tmp_path / "plan.safetensors", {"x": torch.zeros(1)}, {"a": "x" * 5 * 2**20})
    assert list(tmp_path.iterdir()) == []


# ---- checkpoints


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(order=(0, 1))


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, group: str | None, name: str, value: Any) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    (fields if group is None else fields[group])[name] = value
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("llm", "num_attention_heads", 0),
        ("llm", "num_key_value_heads", 0),
        ("llm", "num_key_value_heads", "2"),
        ("llm", "num_hidden_layers", 99_999_999),
        ("llm", "hidden_size", 2**62),
        ("llm", "vocab_size", True),
        ("llm", "rope_theta", "x"),
        ("llm", "rope_theta", 0),
        ("llm", "rope_theta", -1e6),
        ("llm", "rms_norm_eps", -1e-6),
        ("llm", "rms_norm_eps", "1e-6"),
        ("llm", "tie_word_embeddings", "no"),
        ("llm", "hidden_act", "\x1b[31m"),
        ("llm", "num_labels", 10**9),
        ("vision", "num_attention_heads", 0),
        ("vision", "num_attention_heads", 7),
        ("vision", "num_hidden_layers", 10**300),
        ("vision", "patch_size", 0),
        ("vision", "layer_norm_eps", -1),
        ("head", "num_layers", 500),
        ("head", "head_dim", 0),
        ("head", "num_attention_heads", [2]),
        (None, "image_latent_height", 10**9),
        (None, "image_latent_height", [4]),
        (None, "patch_size", 0),
        (None, "llm", []),
        (None, "add_time_embeds", 1),
    ],
)
def test_hostile_fields_of_our_own_format(checkpoint: Path, group: str | None, name: str, value: Any) -> None:
    change(checkpoint, group, name, value)
    refused(load_model, checkpoint / "config.json", name)


@pytest.mark.parametrize(
    ("own", "fields", "message"),
    [
        ({"num_attention_heads": 0}, {}, "num_attention_heads 0"),
        ({"num_attention_heads": True}, {}, "num_attention_heads True"),
        ({"rope_theta": "x"}, {}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": [1]}}, {}, "rope_theta"),
        ({"rms_norm_eps": -1}, {}, "rms_norm_eps"),
        ({"max_position_embeddings": "x"}, {}, "max_position_embeddings"),
        ({}, {"image_latent_height": "x"}, "image_latent_height"),
        ({}, {"image_latent_height": [[]]}, "image_latent_height"),
        ({}, {"patch_size": 10**300}, "patch_size"),
        ({}, {"_class_name": ["x"]}, "_class_name"),
        ({}, {"clip_pretrained_model_path": "nowhere\0"}, "clip_pretrained_model_path"),
    ],
)
def test_hostile_fields_of_upstreams_format(checkpoint: Path, own: Any, fields: Any, message: str) -> None:
    (checkpoint / "llm").mkdir()
    (checkpoint / "llm" / "config.json").write_text(json.dumps({"num_attention_heads": 4} | own))
    config = {
        "_class_name": "Showo2Qwen2_5",
        "llm_model_path": "llm",
        "image_latent_height": 4,
        "image_latent_width": 4,
    }
    (checkpoint / "config.json").write_text(json.dumps(config | fields))
    refused(load_model, checkpoint / "config.json", message)


@pytest.mark.parametrize("number", ["99999999", "007", "9" * 5000, "٣"])
@pytest.mark.parametrize("name", ["showo.model.layers.{}.x", "und_trans.layers.{}.x", "diffusion_head_a.{}.x"])
def test_a_layer_far_off_builds_none(checkpoint: Path, name: str, number: str) -> None:
    tensors, _ = load_safetensors(checkpoint / "model.safetensors")
    save_safetensors(checkpoint / "model.safetensors", {**tensors, name.format(number): torch.zeros(1)})
    refused(load_model, checkpoint / "config.json", "expected layers 0 to")


HOSTILE_TENSORS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "expected a floating dtype of"),
    "integers": (lambda x: x.long(), "expected a floating dtype of"),
    "complex": (lambda x: x.to(torch.complex64), "expected a floating dtype of"),
    "meta": (lambda x: x.to("meta"), "expected a dense tensor"),
    "sparse": (lambda x: x.to_sparse(), "expected a dense tensor"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8), "expected a floating dtype of"),
    "one number repeated": (lambda x: torch.zeros(1).expand(2**40), "expected a number for every element"),
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_hostile_tensors_in_a_pickle(checkpoint: Path, kind: str) -> None:
    tensors, _ = load_safetensors(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    make, message = HOSTILE_TENSORS[kind]
    name = "showo.model.layers.0.mlp.up_proj.weight"
    torch.save({**tensors, name: make(tensors[name])}, checkpoint / "pytorch_model.bin")
    refused(load_model, checkpoint / "pytorch_model.bin", message)


def test_float8_in_safetensors(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors, _ = load_safetensors(path)
    save_safetensors(path, {name: value.to(torch.float8_e5m2) for name, value in tensors.items()})
    refused(load_model, path, "expected a floating dtype of")


def test_a_compressed_pickle(checkpoint: Path) -> None:
    tensors, _ = load_safetensors(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    path, plain = checkpoint / "pytorch_model.bin", checkpoint / "plain"
    torch.save(tensors, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    refused(load_model, path, "got a compressed one")


@pytest.mark.parametrize("file", ["a" * 100_000 + ".bin", "a\x1b.bin", ["a.bin"], "x.bin"])
def test_hostile_indices(checkpoint: Path, file: Any) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"\x1b[31m" + "n" * 1000: file}}))
    refused(load_model, path)


@pytest.mark.parametrize("value", [0.0, "x", None, float("nan"), float("inf"), -1e-6, 10**400])
def test_epsilons_of_a_configuration(value: Any) -> None:
    llm = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    vision = {key: size for key, size in llm.items() if key != "vocab_size"}
    if value in (0.0, None):
        assert Showo2Config({**llm, "rms_norm_eps": value}, vision).llm.get("rms_norm_eps") == value
    else:
        with pytest.raises(ValueError, match=r"llm\['rms_norm_eps'\]: expected a finite number >= 0"):
            Showo2Config({**llm, "rms_norm_eps": value}, vision)


@pytest.mark.parametrize("name", sorted(_LLM_OPTIONS))
def test_an_option_that_is_none_is_the_default(name: str) -> None:
    llm = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    vision = {key: size for key, size in llm.items() if key != "vocab_size"}
    with torch.device("meta"):
        model = Showo2(Showo2Config({**llm, name: None}, vision))
        plain = Showo2(Showo2Config(llm, vision))
    assert model.config == plain.config and model.showo.model.layers[0].self_attn.k_proj.out_features == 16


# ---- calibration


@pytest.mark.parametrize(
    "change", [{"samples": 0}, {"samples": 10**300}, {"tokens": -1}, {"kind": []}, {"digest": 1}, {"tokens": True}]
)
def test_hostile_calibration_states(change: Any, tmp_path: Path) -> None:
    record = {"kind": "generation", "samples": 1, "tokens": 1, "digest": ""} | change
    content = {"format": "flashu_ext.calibration", "version": 1, "settings": SETTINGS, "tasks": {"generation": record}}
    path = tmp_path / "state.safetensors"
    save_safetensors(path, {"x": torch.zeros(1)}, {"calibration": json.dumps(content)})
    refused(READERS["state"][1], path, "not valid")


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


HOSTILE_IMAGES = {
    "a bomb": (png(2**31 - 1, 2**31 - 1), "pixel"),
    "a bomb just below PIL's own limit": (png(9000, 9000), "at most 67108864 pixels"),
    "a line": (png(60_000_000, 1), ""),
    "no data": (png(4, 4), "not a whole image"),
    "cut off": (png(40, 40, os.urandom(40 * 121))[:-100], "not a whole image"),
    "no image": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "empty": (b"", "not an image"),
}


@pytest.mark.parametrize("kind", HOSTILE_IMAGES)
def test_an_image_is_named_with_its_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(4, 4, b"\0" * 52))
    (tmp_path / "bad.png").write_bytes(HOSTILE_IMAGES[kind][0])
    names = ("good.png", "bad.png")
    (tmp_path / "generation.jsonl").write_text("\n".join(json.dumps({"image": n, "prompt": "a"}) for n in names))
    samples = iter(folder_samples(Pipeline.from_pretrained("nano"), tmp_path)["generation"])
    next(samples)
    with pytest.raises(ValueError) as caught:
        next(samples)
    message = str(caught.value)
    assert "generation.jsonl:2: " in message and "bad.png" in message and len(message) <= 500, message
    assert HOSTILE_IMAGES[kind][1] in message


def test_a_picture_that_is_a_line_is_not_scaled(tmp_path: Path) -> None:
    from PIL import Image

    with pytest.raises(ValueError, match="image: expected sides of a like length, got 1 x 200000"):
        Pipeline.from_pretrained("nano").answer(Image.new("RGB", (1, 200_000)), "what color is the circle ?")


@pytest.mark.parametrize("content", [png(2**31 - 1, 2**31 - 1), png(9000, 9000)[:-1], b"\x89PNG\r\n\x1a\n"])
def test_a_folder_misses_what_is_no_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert not complete_png(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert not complete_png(tmp_path / "b.png")


# ---- texts of errors


@given(st.text(max_size=3000), st.integers(20, 500))
def test_any_text_is_one_printable_line_of_limited_length(text: str, limit: int) -> None:
    line = printable(text, limit)
    assert len(line) <= limit and line.isprintable()
    if len(text) <= limit and text.isprintable():
        assert line == text


def test_a_long_path_leaves_room_for_the_reason() -> None:
    message = str(refusal("/deep" * 800 + "/plan.safetensors", "expected " + "x" * 5000))
    assert "/plan.safetensors: expected x" in message and len(message) == 500
