"""Lists of prompts in one process: files of prompts, resuming a folder, other settings, interruptions."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flashu_ext.batch.folder import MANIFEST, complete_png, missing, open_folder
from flashu_ext.batch.prompts import make_jobs, read_prompts, slug
from flashu_ext.cli.main import cli

PROMPTS = ["a red circle", "a blue square", "a green triangle on the left"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# three\n" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def run(prompts: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(
        cli, ["generate", "--prompts", str(prompts), "--out", str(out), "--steps", "3", *map(str, more)]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- files of prompts


def test_text_and_jsonl(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_bytes("\ufeffein Kreis\r\n\r\n  # no prompt\n 红色的圆 \n???".encode())
    assert [(job.prompt, job.seed, job.name) for job in read_prompts(text, 5)] == [
        ("ein Kreis", 5, "0000-ein-kreis.png"),
        ("红色的圆", 6, "0001-红色的圆.png"),
        ("???", 7, "0002.png"),
    ]
    lines = tmp_path / "p.jsonl"
    lines.write_text(
        '{"prompt": "# a"}\n\n{"prompt": "b\u2028c", "seed": 0, "name": "mine"}\n{"prompt": "c", "name": "x.png"}'
    )
    assert [(job.prompt, job.seed, job.name) for job in read_prompts(lines, 5)] == [
        ("# a", 5, "0000-a.png"),
        ("b\u2028c", 0, "mine.png"),
        ("c", 7, "x.png"),
    ]
    assert len(slug("word " * 100)) <= 48 and slug("A_b!") == "a-b"
    assert len({len(job.name) for job in make_jobs(["x"] * 10_001)}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": expected at least one prompt, got none"),
        ("{", ":1: not valid JSON"),
        ('\n{"prompt": "a"}\n3', ":3: expected an object with prompt"),
        ('{"seed": 1}', ":1: expected an object with prompt"),
        ('{"prompt": "a", "steps": 3}', ":1: unknown key 'steps'; known keys: prompt, seed, name"),
        ('{"prompt": "a", "prompt": "b"}', ":1: key 'prompt' appears twice"),
        ('{"prompt": " "}', ":1: prompt: expected a non-empty string, got ' '"),
        ('{"prompt": 3}', ":1: prompt: expected a non-empty string, got 3"),
        ('{"prompt": "\\ud800"}', ":1: prompt: expected text that UTF-8 can encode"),
        ('{"prompt": "a", "seed": -1}', ":1: seed: expected an integer in [0, 2^63), got -1"),
        ('{"prompt": "a", "seed": true}', ":1: seed: expected an integer in [0, 2^63), got True"),
        ('{"prompt": "a", "seed": NaN}', ":1: NaN is not allowed"),
        ('{"prompt": "a", "name": "../a"}', ":1: name: expected a file name without a path"),
        ('{"prompt": "a", "name": ".png"}', ":1: name: expected a file name without a path"),
        ('{"prompt": "a", "name": "a\\u0000"}', ":1: name: expected a file name without a path"),
        ('{"prompt": "a", "name": "' + 201 * "n" + '"}', ":1: name: expected a file name without a path, of at most 200"),
        ('{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "X.png"}', ":2: name: expected a unique name, 'X.png'"),
        ('{"prompt": "a"}\n{"prompt": "b", "name": "0000-a"}', ":2: name: expected a unique name"),
    ],
)  # fmt: skip
def test_malformed_files_are_named_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(content, encoding="utf-8")
    result = run(path, tmp_path / "out")
    assert result.exit_code == 1 and f"{path}{message}" in result.output, result.output
    assert result.output.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_bytes_than_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(TypeError, match="prompts: expected a list"):
        make_jobs("a circle")
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt: expected a non-empty"):
        make_jobs(["a circle", ""])


def test_seeds_end_with_their_range(prompts: Path) -> None:
    last = 2**63 - 1
    assert [job.seed for job in read_prompts(prompts, last - 2)] == [last - 2, last - 1, last]
    with pytest.raises(ValueError, match=rf"prompts.txt:6: seed: expected an integer in \[0, 2\^63\), got {last + 1}"):
        read_prompts(prompts, last - 1)
    with pytest.raises(ValueError, match=r"prompts\[1\]: seed: expected an integer in \[0, 2\^63\)"):
        make_jobs(["a", "b"], last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PROMPT, --prompts: expected one of them"),
        (["a circle", "--prompts", __file__, "--out", "x"], "PROMPT, --prompts: expected one of them"),
        (["--prompts", __file__], "--out: expected a folder with --prompts"),
        (["--prompts", __file__, "--out", "x", "-o", "x.png"], "--out: expected a folder with --prompts, got -o"),
        (["a circle", "--out", "x"], "--out: expected --prompts with it"),
        (["a circle", "--batch", "2"], "--batch: expected --prompts with it"),
        (["a circle", "--overwrite"], "--overwrite: expected --prompts with it"),
        (["--prompts", "/no/such/file", "--out", "x"], "does not exist"),
        (["--prompts", __file__, "--out", "x", "--parallel", "guidance"], "--parallel guidance: expected 2 ranks"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["generate", *arguments])
    assert result.exit_code == 2 and message in result.output, result.output


# ---- the folder


def test_an_interrupted_list_is_resumed(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "images"
    first = run(prompts, out, "--batch", "2", "--seed", "4")
    assert first.exit_code == 0 and "3 images, 3 of them generated now" in first.output, first.output
    drawn = contents(out)
    assert list(drawn) == [f"{i:04}-{slug(prompt)}.png" for i, prompt in enumerate(PROMPTS)] + [MANIFEST]
    record = json.loads(drawn[MANIFEST])
    assert record["images"][2] == {"prompt": PROMPTS[2], "seed": 6, "name": "0002-a-green-triangle-on-the-left.png"}
    settings = record["settings"]
    assert (settings["model"], settings["preset"], settings["steps"], settings["guidance"]) == ("nano", "exact", 3, 2.5)

    kept, broken, gone = (out / name for name in list(drawn)[:3])
    before = kept.stat()
    broken.write_bytes(drawn[broken.name][:-9])
    gone.unlink()
    again = run(prompts, out, "--batch", "2", "--seed", "4")
    assert again.exit_code == 0 and "2 of them generated now" in again.output, again.output
    # The batch of the broken image was generated as a whole: same bits as in the first run. The intact file was not touched.
    assert contents(out) == drawn and kept.stat() == before

    for more, message in (
        (["--seed", "5"], "images[0]: was {'prompt': 'a red circle', 'seed': 4"),
        (["--seed", "4", "--preset", "dense"], "preset: was 'exact', now 'dense'"),
        (["--seed", "4", "--guidance", "3"], "guidance: was 2.5, now 3.0"),
        (["--seed", "4", "--batch", "1"], "batch: was 2, now 1"),
    ):
        other = run(prompts, out, "--batch", "2", *more)
        assert other.exit_code == 1 and message in other.output and other.output.count("\n") == 1, other.output
        assert contents(out) == drawn
    prompts.write_text("a yellow circle\n")
    fewer = run(prompts, out, "--batch", "2", "--seed", "4", "--overwrite")
    assert fewer.exit_code == 0 and list(contents(out)) == ["0000-a-yellow-circle.png", MANIFEST], fewer.output


def test_ranks_started_anew_do_not_overwrite_what_their_first_attempt_drew(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "images"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    for attempt, drawn in (("0", 3), ("1", 1), ("0", 3)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        result = run(prompts, out, "--overwrite")
        assert result.exit_code == 0 and f"3 images, {drawn} of them generated now" in result.output, result.output
        (out / "0001-a-blue-square.png").unlink()


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    jobs = make_jobs(PROMPTS)
    (tmp_path / jobs[1].name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"exists already, without a {MANIFEST}"):
        open_folder(tmp_path, {"batch": 1}, jobs)
    assert contents(tmp_path) == {jobs[1].name: b"mine"}
    assert open_folder(tmp_path, {"batch": 1}, jobs, overwrite=True) == [0, 1, 2] == missing(tmp_path, jobs)
    assert list(contents(tmp_path)) == [MANIFEST]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: "[]", "expected an object with version, settings, images"),
        (lambda record: "{", "not valid JSON"),
        (lambda record: json.dumps(record | {"version": 3}), "expected version 2, got 3"),
        (lambda record: json.dumps(record | {"settings": 3}), "settings: expected an object, got 3"),
        (lambda record: json.dumps(record | {"images": {}}), "images: expected a list"),
        (lambda record: json.dumps(record | {"images": [3]}), r"images\[0\]: expected prompt, seed, name, got 3"),
        (
            lambda record: json.dumps(record | {"images": [{"prompt": "a", "seed": 0, "name": "../x.png"}]}),
            r"images\[0\]: name: expected a file name without a path",
        ),
    ],
)
def test_malformed_manifests(tmp_path: Path, change: Any, message: str) -> None:
    jobs = make_jobs(["a"])
    (tmp_path.parent / "x.png").write_bytes(b"outside")
    open_folder(tmp_path, {"batch": 1}, jobs)
    path = tmp_path / MANIFEST
    path.write_text(change(json.loads(path.read_text())))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path, {"batch": 1}, jobs)
    assert contents(tmp_path) == before
    assert open_folder(tmp_path, {"batch": 1}, jobs, overwrite=True) == [0]
    assert (tmp_path.parent / "x.png").read_bytes() == b"outside"


def test_a_complete_png(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.effect_noise((20, 20), 50).convert("RGB").save(path)
    whole = path.read_bytes()
    assert complete_png(path) and not complete_png(tmp_path / "b.png") and not complete_png(tmp_path)
    for length in (*range(0, len(whole), 97), len(whole) - 1, len(whole) - 12):
        path.write_bytes(whole[:length])
        assert not complete_png(path), length
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert not complete_png(path)
    Image.new("RGB", (4, 4)).save(path, format="JPEG")
    assert not complete_png(path)


# ---- interruptions


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "error"])
def test_an_interruption_keeps_what_is_finished(
    end: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashu_ext.models.showo2 import Pipeline

    whole, drawn = Pipeline.generate_batch, []

    def generate_batch(self: Any, *arguments: Any, **options: Any) -> Any:
        drawn.append(arguments[0])
        if len(drawn) == 2:
            if end == "Ctrl-C":
                raise KeyboardInterrupt
            if end == "error":
                raise RuntimeError("no memory")
            os.kill(os.getpid(), signal.SIGTERM)  # the batch in progress is finished
        return whole(self, *arguments, **options)

    before, out = signal.getsignal(signal.SIGTERM), tmp_path / "images"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate_batch", generate_batch)
        result = run(prompts, out)
    assert result.exit_code == 1 and signal.getsignal(signal.SIGTERM) == before
    says = {
        "Ctrl-C": "1 of 3 images are there; the same command generates the rest",
        "SIGTERM": f"stopped by SIGTERM; {out}: 1 of 3 images are missing (0002-a-green-triangle-on-the-left.png)",
        "error": f"no memory; {out}: 2 of 3 images are missing (0001-a-blue-square.png, 0002-a-green",
    }
    assert says[end] in result.output, result.output
    assert len(list(out.iterdir())) == 1 + (2 if end == "SIGTERM" else 1)
    rest = run(prompts, out)
    assert rest.exit_code == 0 and f"{3 - (2 if end == 'SIGTERM' else 1)} of them generated now" in rest.output
