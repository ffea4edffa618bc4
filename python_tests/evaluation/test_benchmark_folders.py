"""GenEval's and DPG-Bench's prompts drawn into the folders of their tools: exact layouts, resumed runs, ranks, hostile lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.ranks import torchrun

from flashu_ext.cli.main import cli

LINES = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
    {
        "tag": "counting",
        "include": [{"class": "square", "count": 1}],
        "exclude": [{"class": "square", "count": 2}],
        "prompt": "a blue square",
    },
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "whoops3.txt").write_text("a blue square on the left\n", encoding="utf-8")
    (folder / "11.txt").write_bytes("\ufeffa red circle".encode())
    (folder / "notes.md").write_text("no prompt")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def picture(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


# ---- layouts


def test_genevals_folder(geneval: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "out"
    result = run("geneval", "--prompts", geneval, "--out", out, "--steps", 3, "--batch", 8, "--seed", 5)
    assert result.exit_code == 0 and "8 images, 8 of them drawn now" in result.output, result.output
    folder = out / "exact" / "geneval"
    assert f"next: python evaluation/evaluate_images.py {folder / 'images'} --outfile {folder / 'results.jsonl'}" in (
        result.output
    )
    own = files(folder / "images")
    samples = [f"{prompt:05}/samples/{sample:04}.png" for prompt in range(2) for sample in range(4)]
    assert sorted(own) == sorted([*samples, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    assert [json.loads(own[f"0000{prompt}/metadata.jsonl"]) for prompt in range(2)] == LINES
    manifest = json.loads((folder / "drawn" / "manifest.json").read_text())
    assert [(image["prompt"], image["seed"]) for image in manifest["images"]] == [
        (LINES[index // 4]["prompt"], 5 + index) for index in range(8)
    ]
    drawn = files(folder / "drawn")
    assert [own[name] for name in samples] == [drawn[image["name"]] for image in manifest["images"]]
    assert len({own[name] for name in samples}) == 8, "every image has noise of its own"


def test_dpgs_folder(dpg: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "out"
    result = run("dpg", "--prompts", dpg, "--out", out, "--steps", 3, "--batch", 8, "--preset", "dense")
    assert result.exit_code == 0 and "8 images, 8 of them drawn now" in result.output, result.output
    folder = out / "dense" / "dpg"
    assert sorted(files(folder / "images")) == ["11.png", "whoops3.png"], "the tool opens every file in it"
    assert f"--image-root-path {folder / 'images'} --resolution 48 --pic-num 4" in result.output
    grid = picture(folder / "images" / "whoops3.png")
    assert grid.size == (96, 96)
    # The tool's crops, in its order: left and right above, then below.
    crops = [(0, 0, 48, 48), (48, 0, 96, 48), (0, 48, 48, 96), (48, 48, 96, 96)]
    for index, crop in enumerate(crops):
        single = picture(folder / "drawn" / f"whoops3-{index}.png")
        assert grid.crop(crop).tobytes() == single.tobytes(), index
    manifest = json.loads((folder / "drawn" / "manifest.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == ["a red circle"] * 4 + ["a blue square on the left"] * 4


# ---- resumed runs, ranks


def test_a_resumed_run_draws_what_is_missing(geneval: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "out"
    command = ("geneval", "--prompts", geneval, "--out", out, "--steps", 3, "--samples", 1)
    assert run(*command).exit_code == 0
    folder = out / "exact" / "geneval"
    before = files(folder)
    again = run(*command)
    assert "2 images, 0 of them drawn now" in again.output and files(folder) == before, again.output

    kept = (folder / "images/00000/samples/0000.png").stat()
    (folder / "drawn/00001-0000.png").unlink()
    (folder / "images/00001/samples/0000.png").write_bytes(before["images/00001/samples/0000.png"][:-9])
    resumed = run(*command)
    assert "2 images, 1 of them drawn now" in resumed.output, resumed.output
    changed = files(folder)
    assert {name for name in changed if changed[name] != before[name]} == {
        "drawing.json"
    } and changed.keys() == before.keys()
    assert (folder / "images/00000/samples/0000.png").stat().st_mtime_ns == kept.st_mtime_ns
    assert [each["missing"] for each in json.loads(changed["drawing.json"])["runs"]] == [2, 1]

    other = run(*command, "--seed", 3)
    assert other.exit_code == 1 and "was {'prompt': 'a red circle', 'seed': 0" in other.output, other.output
    assert files(folder) == changed


def test_an_interruption_leaves_no_part_of_a_file(
    dpg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from PIL import Image

    out, save = tmp_path / "out", Image.Image.save
    command = ("dpg", "--prompts", dpg, "--out", out, "--steps", 3, "--batch", 8)

    def save_half(image: Any, target: Any, *arguments: Any, **options: Any) -> None:
        save(image, target, *arguments, **options)
        if image.width == 96:  # a grid
            Path(target).write_bytes(Path(target).read_bytes()[:100])
            raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_half)
        failed = run(*command)
    folder = out / "exact" / "dpg"
    assert failed.exit_code == 1 and "No space left on device" in failed.output, failed.output
    assert not files(folder / "images") and not list((folder / "images").iterdir())
    done = run(*command)
    assert "8 images, 0 of them drawn now" in done.output and len(files(folder / "images")) == 2, done.output


def test_a_shorter_list_leaves_no_picture_of_the_longer_one(geneval: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "out"
    command = ("geneval", "--prompts", geneval, "--out", out, "--steps", 3)
    assert run(*command, "--samples", 2, "--batch", 4).exit_code == 0
    folder = out / "exact" / "geneval"
    before = files(folder)
    geneval.write_text(json.dumps(LINES[1]) + "\n")
    refused = run(*command, "--samples", 1)
    assert refused.exit_code == 1 and "00000/samples/0001.png: not of this list (and 2 more)" in refused.output
    assert files(folder) == before
    assert run(*command, "--samples", 1, "--overwrite").exit_code == 0
    assert sorted(files(folder / "images")) == ["00000/metadata.jsonl", "00000/samples/0000.png"]
    assert not (folder / "images" / "00001").exists()
    record = json.loads((folder / "drawing.json").read_text())
    assert record["images"] == 1 and len(record["runs"]) == 1


def test_ranks_share_the_list(geneval: Path, tmp_path: Path, one_thread: None) -> None:
    arguments = ["--prompts", str(geneval), "--steps", "3", "--samples", "2", "--batch", "2"]
    alone = run("geneval", *arguments, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    shared = torchrun(["evaluate", "geneval", *arguments, "--out", str(tmp_path / "shared")])
    assert shared.returncode == 0 and shared.stdout.count("4 images, 4 of them drawn now") == 1, shared.stderr
    own = [files(tmp_path / name / "exact" / "geneval") for name in ("alone", "shared")]
    assert {name: own[0][name] for name in own[0] if name != "drawing.json"} == {
        name: own[1][name] for name in own[1] if name != "drawing.json"
    }


# ---- hostile lists


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": expected at least one prompt, got none"),
        (json.dumps(LINES[0]) + "\n{", ":2: not valid JSON"),
        ("[]", ":1: expected an object with tag, include and prompt, got []"),
        ('{"prompt": "a", "tag": "t"}', ":1: expected an object with tag, include and prompt"),
        ('{"prompt": "", "tag": "t", "include": []}', ":1: prompt: expected a non-empty string, got ''"),
        ('{"prompt": "a", "tag": 3, "include": []}', ":1: tag: expected the name of a task, got 3"),
        ('{"prompt": "a", "tag": "t", "include": {}}', ":1: include: expected a list of objects with class and count"),
        ('{"prompt": "a", "tag": "t", "include": [{"class": "x"}]}', ":1: include: expected a list of objects"),
        ('{"prompt": "a", "tag": "t", "tag": "u", "include": []}', ":1: key 'tag' appears twice"),
        ('{"prompt": "a", "tag": "t", "include": [], "exclude": [3]}', ":1: exclude: expected a list of objects"),
    ],
)
def test_lines_of_geneval_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(content)
    result = run("geneval", "--prompts", path, "--out", tmp_path / "out")
    assert result.exit_code == 1 and f"{path}{message}" in result.output, result.output
    assert result.output.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ":1: not valid JSON"),
        ('{"prompt": "a"}', ":1: expected an object with prompt and name"),
        ('{"prompt": "a", "name": "../a"}', ":1: name: expected a file name without a path"),
        ('{"prompt": "a", "name": "b/a"}', ":1: name: expected a file name without a path"),
        ('{"prompt": "a", "name": "a.b"}', ":1: name: expected one without a dot, which DPG-Bench's tool cuts there"),
        ('{"prompt": "a", "name": 3}', ":1: name: expected a file name without a path"),
        ('{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "X.png"}', "name: expected a unique name, "),
        ('{"prompt": " ", "name": "a"}', ":1: prompt: expected a non-empty string"),
    ],
)
def test_lines_of_dpg_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(content)
    result = run("dpg", "--prompts", path, "--out", tmp_path / "out")
    assert result.exit_code == 1 and str(path) in result.output and message in result.output, result.output
    assert result.output.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_of_dpg_that_are_none(dpg: Path, tmp_path: Path) -> None:
    def refused(message: str, prompts: Path = dpg) -> None:
        result = run("dpg", "--prompts", prompts, "--out", tmp_path / "out")
        assert result.exit_code == 1 and message in result.output, result.output
        assert not (tmp_path / "out").exists()

    (dpg / "WHOOPS3.txt").write_text("another")
    refused("name: expected a unique name, 'whoops3' is also that of")
    (dpg / "WHOOPS3.txt").unlink()
    (dpg / "v1.5.txt").write_text("a circle")
    refused(f"{dpg / 'v1.5.txt'}: name: expected one without a dot")
    (dpg / "v1.5.txt").unlink()
    (dpg / "empty.txt").write_text("\n")
    refused(f"{dpg / 'empty.txt'}: prompt: expected a non-empty string")
    (dpg / "empty.txt").write_bytes(b"\xff")
    refused(f"{dpg / 'empty.txt'}: not UTF-8")
    (tmp_path / "none").mkdir()
    refused("expected at least one prompt in a .txt file, got none", tmp_path / "none")
    (tmp_path / "list.csv").write_text("a,b")
    refused("expected a folder of .txt files, or a .jsonl file", tmp_path / "list.csv")


def test_wrong_usage(dpg: Path, tmp_path: Path) -> None:
    wide = run("dpg", "--prompts", dpg, "--out", tmp_path / "out", "--size", "48x96")
    assert wide.exit_code == 2 and "--size: expected a square" in wide.output
    assert run("geneval", "--out", tmp_path / "out").exit_code == 2
    assert run("understanding", "--tasks", " , ").exit_code == 2
