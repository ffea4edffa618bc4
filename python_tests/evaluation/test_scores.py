"""Results of the benchmarks' tools as scores with intervals, and the page made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from flashu_ext.batch.folder import open_folder
from flashu_ext.cli.main import cli
from flashu_ext.evaluation.drawing import write_record
from flashu_ext.evaluation.lists import PromptList, read_dpg, read_geneval
from flashu_ext.evaluation.scores import difference, dpg_scores, geneval_scores, question_scores
from flashu_ext.evaluation.understanding import file_digest, is_there, read_results
from flashu_ext.planning.intervals import bootstrap, paired_bootstrap, wilson

TAGS = ["single_object", "single_object", "two_object", "two_object"]
RIGHT = [[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
SETTINGS = {
    "model": "DIR", "weights": "a" * 64, "dtype": "bfloat16", "device": "cuda", "preset": "", "steps": 50, "guidance": 5.0,
    "batch": 4, "branches": "together", "config": None, "plan": None,
}  # fmt: skip


def as_jobs(prompts: PromptList) -> list[dict[str, Any]]:
    return [vars(job) for job in prompts.jobs]


@pytest.fixture
def geneval(tmp_path: Path) -> PromptList:
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": tag, "include": [], "prompt": f"prompt {index}"} for index, tag in enumerate(TAGS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_geneval(path, seed=7)


@pytest.fixture
def dpg(tmp_path: Path) -> PromptList:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("1", "2", "3"):
        (folder / f"{name}.txt").write_text(f"prompt {name}")
    return read_dpg(folder)


def geneval_lines(right: list[list[int]] = RIGHT, folder: str = "/somewhere/images") -> list[dict[str, Any]]:
    return [
        {"filename": f"{folder}/{index:05}/samples/{sample:04}.png", "tag": TAGS[index], "prompt": f"prompt {index}",
         "correct": bool(value), "reason": "", "metadata": "{}", "details": "{}"}
        for index, row in enumerate(right) for sample, value in enumerate(row)
    ]  # fmt: skip


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


DPG_TEXT = (
    "/a, b/images/1.png, 1.0, 1.0, 0.5, 0.5, 0.75\n"
    "/a, b/images/3.png, 0.0, 0.0, 0.0, 1.0, 0.25\n"
    "/a, b/images/2.png, 1.0, 1.0, 1.0, 1.0, 1.0\n"
    "Model: images\nL1 category scores:\n\tentity: 90.1\nImage path: images\nDPG-Bench score: 66.66666666666667\n"
)

# ---- intervals


def test_intervals() -> None:
    low, high = wilson(0.8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Wilson's formula, worked by hand
    assert wilson(1.0, 50)[1] == 1.0 and 0.92 < wilson(1.0, 50)[0] < 0.93 and wilson(float("nan"), 0) == (0.0, 1.0)
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, 400)
    interval = bootstrap([[(value, 1.0) for value in values]])
    assert interval is not None
    expected = 1.96 * values.std(ddof=1) / 20  # the mean's normal interval
    assert np.allclose(interval, (values.mean() - expected, values.mean() + expected), atol=0.03)
    assert bootstrap([[(value, 1.0) for value in values]]) == interval, "the same seed, the same interval"
    # Four equal values of a cluster say no more than one: the interval is as wide as for the clusters alone.
    assert np.allclose(bootstrap([[(4 * value, 4.0) for value in values]]), interval)  # type: ignore[arg-type]
    assert bootstrap([[(1.0, 1.0)], [(1.0, 1.0), (2.0, 1.0)]]) is None and bootstrap([]) is None
    assert bootstrap([[(4.0, 4.0), (1.0, 1.0)], [(0.0, 2.0)] * 9]) is None, "an interval without width says nothing"


def test_paired_intervals() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.normal(5, 2, 400)
    first, second = (prompts + rng.normal(mean, 0.1, 400) for mean in (0.05, 0.0))
    interval = paired_bootstrap([[(value, 1.0) for value in first]], [[(value, 1.0) for value in second]])
    change = first - second
    half = 1.96 * change.std(ddof=1) / 20  # the normal interval of the mean of differences, not of two runs' means
    assert interval is not None
    assert np.allclose(interval, (change.mean() - half, change.mean() + half), atol=0.002)
    same = [[(1.0, 1.0), (0.0, 1.0)]]
    assert paired_bootstrap(same, same) is None and paired_bootstrap([], []) is None
    assert paired_bootstrap(same, [[(2.0, 1.0), (1.0, 1.0)]]) is None, "all differ by the same"


# ---- differences


def test_a_difference_is_of_the_prompts_that_both_have(geneval: PromptList, tmp_path: Path) -> None:
    jobs = as_jobs(geneval)
    other = geneval_scores(written(tmp_path / "a.jsonl", geneval_lines()), jobs)
    lines = geneval_lines([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])[:12]  # not the last prompt
    score = geneval_scores(written(tmp_path / "b.jsonl", lines[::-1]), jobs)
    found = difference(score[0], other[0])
    assert found is not None
    # Of one object 5/8 less 7/8, of two (the third prompt) 1 less 1/4; overall the mean of both tasks.
    assert found.value == pytest.approx(((5 / 8 - 7 / 8) + (1 - 1 / 4)) / 2)
    assert (found.name, found.n, found.unit, found.interval) == ("overall", 3, "prompts", None)
    back = difference(other[0], score[0])
    assert back is not None and (back.value, back.n) == (-found.value, 3)
    same = difference(other[0], other[0])
    assert same is not None and (same.value, same.interval, same.n) == (0.0, None, 4)
    mine, others = ([[(4, 4), (1, 4)]], [[(4, 4), (3, 4)]])
    single = {each.name: each for each in score}["single_object"]
    found = difference(single, other[1])
    assert found is not None and found.interval == paired_bootstrap(mine, others)


def test_there_is_no_difference_of_scores_whose_questions_do_not_give_them() -> None:
    samples = [{"number": number, "metrics": {"right": value}} for number, value in enumerate((1.0, 0.0))]
    (known,) = question_scores({"right,none": 0.5}, samples)
    (unknown,) = question_scores({"right,none": 0.75}, samples)
    (elsewhere,) = question_scores({"right,none": 0.5}, [each | {"number": 9 + each["number"]} for each in samples])
    assert difference(known, unknown) is None and difference(known, elsewhere) is None


# ---- GenEval


def test_genevals_scores(geneval: PromptList, tmp_path: Path) -> None:
    path = written(tmp_path / "results.jsonl", geneval_lines())
    overall, single, two = geneval_scores(path, as_jobs(geneval))
    assert (overall.name, overall.value, overall.n) == ("overall", (7 / 8 + 1 / 8) / 2, 16)  # the mean over tasks
    assert (single.name, single.value, single.n, two.value) == ("single_object", 7 / 8, 8, 1 / 8)
    assert single.interval == wilson(7 / 8, 2), "the prompts are the independent trials"
    assert overall.interval is not None and overall.interval[0] <= overall.value <= overall.interval[1]
    assert overall.interval == bootstrap([[(4, 4), (3, 4)], [(1, 4), (0, 4)]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "/x/00009/samples/0000.png"}, ":2: filename: expected an image that was drawn here"),
        ({"filename": "/x/00000/samples/0004.png"}, ":2: filename: expected an image that was drawn here"),
        ({"filename": "/x/00000/samples/0000.png"}, ":2: filename: expected every image once"),
        ({"filename": "grid.png"}, ":2: filename: expected an image that was drawn here"),
        ({"prompt": "another"}, ":2: prompt: expected 'prompt 0', got 'another'"),
        ({"correct": 1}, ":2: expected an object with filename, tag, prompt and correct"),
    ],
)
def test_results_of_geneval_that_are_none(
    change: dict[str, Any], message: str, geneval: PromptList, tmp_path: Path
) -> None:
    lines = geneval_lines()
    lines[1] |= change
    path = written(tmp_path / "results.jsonl", lines)
    with pytest.raises(ValueError) as refused:
        geneval_scores(path, as_jobs(geneval))
    assert str(refused.value).startswith(f"{path}{message}")


# ---- DPG-Bench


def test_dpgs_score(dpg: PromptList, tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    path.write_text(DPG_TEXT)
    (score,) = dpg_scores(path, as_jobs(dpg))
    assert score.value == pytest.approx(200 / 3) and score.n == 3 and score.unit == "prompts"
    assert score.interval == bootstrap([[(75.0, 1.0), (25.0, 1.0), (100.0, 1.0)]])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("/images/3.png", "/images/4.png", ":2: expected a picture that was drawn here, got '4'"),
        ("/images/3.png", "/images/1.png", ":2: expected every picture once, got '1' again"),
        ("0.5, 0.75", "0.5, 0.76", ":1: expected the scores of 4 images and their mean"),
        ("1.0, 1.0, 0.5, 0.5, 0.75", "1.0, 0.5, 0.75", ":1: expected the scores of 4 images and their mean"),
        (
            "66.66666666666667",
            "70.0",
            ":8: DPG-Bench score: expected 66.666667, the mean of the pictures above, got 70.0",
        ),
        ("0.0, 0.0, 0.0, 1.0, 0.25", "0.0, 0.0, 0.0, 1e999, 0.25", ":2: expected finite numbers"),
    ],
)
def test_results_of_dpg_that_are_none(old: str, new: str, message: str, dpg: PromptList, tmp_path: Path) -> None:
    path = tmp_path / "results.txt"
    assert old in DPG_TEXT
    path.write_text(DPG_TEXT.replace(old, new, 1))
    with pytest.raises(ValueError) as refused:
        dpg_scores(path, as_jobs(dpg))
    assert str(refused.value).startswith(f"{path}{message}")


# ---- lmms-eval


def test_scores_of_questions() -> None:
    right = [1.0, 0.0, 1.0, 1.0]
    samples = [{"number": number, "metrics": {"right": value}} for number, value in enumerate(right)]
    (score,) = question_scores({"alias": "t", "right,none": 0.75, "right_stderr,none": 0.2}, samples)
    assert (score.name, score.value, score.n) == ("right", 0.75, 4) and score.interval == wilson(0.75, 4)
    (other,) = question_scores({"right,none": 0.5}, samples)
    assert other.interval is None, "not the mean of its questions: no interval is made up"


def test_scores_of_mme_and_mmstar() -> None:
    # Two pictures of 'color' (both right; one of two), two of 'count' (both right twice): 150 + 50/2 ...
    mme = {("color", "a"): (1, 1), ("color", "b"): (1, 0), ("count", "c"): (1, 1), ("count", "d"): (0, 0)}
    samples = [
        {"number": 2 * at + half, "metrics": {"p": {"category": category, "question_id": name, "score": float(score)}}}
        for at, ((category, name), pair) in enumerate(mme.items())
        for half, score in enumerate(pair)
    ]
    value = (200 + 50) / 2 + (200 + 0) / 2
    (score,) = question_scores({"p,none": value}, samples)
    assert score.n == 8 and score.interval == bootstrap([[(200, 1), (50, 1)], [(200, 1), (0, 1)]], np.sum)
    star = [("x", 1), ("x", 0), ("x", 0), ("y", 1), ("y", 1)]
    samples = [
        {"number": at, "metrics": {"average": {"question_id": 1, "l2_category": group, "score": float(s)}}}
        for at, (group, s) in enumerate(star)
    ]
    (score,) = question_scores({"average,none": (1 / 3 + 1) / 2}, samples)
    assert score.interval == bootstrap([[(1, 1), (0, 1), (0, 1)], [(1, 1), (1, 1)]])


# ---- the page


def drawn(out: Path, preset: str, prompts: PromptList, **settings: Any) -> Path:
    """A benchmark's folder as after drawing, without its images."""
    folder = out / preset / prompts.benchmark
    (folder / "drawn").mkdir(parents=True)
    open_folder(folder / "drawn", SETTINGS | {"preset": preset} | settings, prompts.jobs)
    write_record(prompts, folder, 7, len(prompts.jobs))
    return folder


def page(out: Path) -> Result:
    return CliRunner().invoke(cli, ["evaluate", "page", "--out", str(out)])


def test_results_of_another_text_of_a_task_are_not_taken_for_its_own(tmp_path: Path) -> None:
    task, utils = tmp_path / "mine.yaml", tmp_path / "utils.py"
    task.write_text("task: mine\n")
    before = file_digest(task)
    utils.write_text("def right(): ...\n")
    between = file_digest(task)
    task.write_text("task: mine\ndoc_to_text: other\n")
    assert len({before, between, file_digest(task)}) == 3
    record = {"version": 1, "task": "mine", "settings": {"batch": 1, "file": before}, "task_settings": {}, "runs": [],
              "results": {}, "questions": 0, "samples": []}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(record))
    assert is_there(tmp_path, "mine", {"batch": 1}, before)
    with pytest.raises(ValueError, match=r"mine\.json: of other settings: file: was '"):
        is_there(tmp_path, "mine", {"batch": 1}, between)


def test_any_picture_in_dpgs_folder_would_be_scored(dpg: PromptList, tmp_path: Path) -> None:
    for name in ("1.png", "1.PNG", "1.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in dpg.leftovers(tmp_path)] == ["1.PNG", "1.jpg"]


def test_the_page(geneval: PromptList, dpg: PromptList, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(drawn(out, "dense", geneval) / "results.jsonl", geneval_lines())
    folder = drawn(out, "paper", geneval, steps=35, weights="b" * 64)
    written(folder / "results.jsonl", geneval_lines()[:-1])
    os.utime(folder / "results.jsonl", (1, 1))
    (drawn(out, "dense", dpg) / "results.txt").write_text(DPG_TEXT)
    drawn(out, "exact", dpg)
    question = {"number": 0, "question": "<b>?", "expected": "a", "answer": ["a"], "metrics": {"right": 1.0}}
    results = {
        "version": 1, "task": "mine", "settings": {"model": "DIR", "weights": "a" * 64, "limit": 1, "tool": "lmms-eval 1"},
        "task_settings": {}, "runs": [{"command": "run <it>", "machine": {"commit": "abc with local changes"}}],
        "results": {"right,none": 1.0}, "questions": 9, "samples": [question],
    }  # fmt: skip
    written(out / "fast" / "understanding" / "mine.json", [results])

    result = page(out)
    assert result.exit_code == 0, result.output
    html, record = (out / "evaluation.html").read_text(), json.loads((out / "evaluation.json").read_text())
    for text in (
        "published by others: dense", "published by others: Flash-Unified", "0.73", "0.71", "86.14", "84.39", "1620.5",
        "1560.5", "56.6", "48.3", "0.500 (", "66.67 (", "n = 16 images", "n = 15 images of 16", "n = 1 questions of 9",
        "only 15 of 16 images were scored", "not the whole benchmark: 4 prompts, it has 553",
        "results.jsonl is older than the last run that drew images", "a run&#39;s sources had local changes", "run &lt;it&gt;",
        "+0.009 (no interval) against dense, 4 prompts of both",
        f"The presets differ in weights: dense {'a' * 60}, paper {'b' * 60}", "lmms-eval 1",
    ):  # fmt: skip
        assert text in html, text
    (change,) = [r["changes"][0] for r in record["benchmarks"][0]["results"] if r["preset"] == "paper"]
    assert (change["name"], change["n"]) == ("overall", 4) and "values" not in str(record)
    assert "differ in steps" not in html, "a preset's own settings may differ"
    missing = record["missing"]
    assert "GenEval, overall, exact: not drawn" in missing and "MME, perception, dense: not run" in missing
    assert f"DPG-Bench, exact: drawn, not scored: no {out / 'exact/dpg/results.txt'}" in missing
    assert all(f"missing: {line}" in result.output for line in missing)
    assert html.count('<span class="no">missing</span>') == len(missing)
    scores = {b["name"]: {r["preset"]: r["scores"] for r in b["results"]} for b in record["benchmarks"]}
    assert scores["geneval"]["dense"][0]["value"] == 0.5 and scores["geneval"]["fast"] == []
    assert record["published"]["geneval"]["dense"] == 0.73 and scores["mine"]["fast"][0]["value"] == 1.0


def test_samples_that_share_a_number_are_refused(tmp_path: Path) -> None:
    record = {"version": 1, "task": "mine", "settings": {}, "task_settings": {}, "runs": [], "results": {},
              "questions": 2, "samples": [{"number": 3, "metrics": {}}] * 2}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"samples\[1\]: number: expected an integer of its own, got 3"):
        read_results(tmp_path / "mine.json")


def test_the_page_says_what_was_done_by_hand(geneval: PromptList, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    command = "flashu-ext evaluate geneval --steps 6 --guidance=2.5 --model 'a b' --seed 1"
    monkeypatch.setattr("flashu_ext.ops.machine.command_line", lambda: command)
    written(drawn(out, "dense", geneval, steps=6) / "results.jsonl", geneval_lines())
    config = {
        "layer_skip_ratio": 0.0,
        "head_cache_interval": 5,
        "prune_multiple": 16,
        "guidance": [[24, 0.75], [11, 1.0]],
    }
    written(drawn(out, "paper", geneval, config=config) / "results.jsonl", geneval_lines())
    assert page(out).exit_code == 0
    html = (out / "evaluation.html").read_text()
    for text in (
        "dense: by hand, not as the preset or the benchmark has it: --steps 6, --guidance 2.5</p>",
        "paper: other settings than the published ones: layer_skip_ratio 0.0 (published: 0.2)</p>",
        'remarks, <a href="#geneval">below</a>', "Show-o2 1.5B", "as dense on each of 4 prompts",
    ):  # fmt: skip
        assert text in html, text


def test_results_of_another_presets_images_are_told(geneval: PromptList, dpg: PromptList, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for preset, scored in (("dense", "dense"), ("paper", "dense"), ("exact", "elsewhere/exact"), ("fast", "")):
        folder = f"/data/{scored}/geneval/images" if scored else "."
        written(drawn(out, preset, geneval) / "results.jsonl", geneval_lines(folder=folder))
    (drawn(out, "dense", dpg) / "results.txt").write_text(DPG_TEXT)
    assert page(out).exit_code == 0
    html = (out / "evaluation.html").read_text()
    assert (
        "paper: results.jsonl is of images in /data/dense/geneval/images, and not of paper/geneval/images</p>" in html
    )
    assert "dense: results.txt is of images in /a, b/images, and not of dense/dpg/images</p>" in html
    assert html.count("is of images in") == 2, "on another machine, or by a relative path, they are the same"


def test_a_result_of_another_task_is_refused(geneval: PromptList, tmp_path: Path) -> None:
    lines = geneval_lines()
    metadata = tmp_path / "images" / "00000" / "metadata.jsonl"
    written(metadata, [{"tag": TAGS[0], "prompt": "prompt 0"}])
    path = written(tmp_path / "results.jsonl", lines)
    assert geneval_scores(path, as_jobs(geneval))[0].n == 16
    written(path, [lines[0] | {"tag": "counting"}, *lines[1:]])
    with pytest.raises(ValueError, match=r":1: tag: expected 'single_object', got 'counting'"):
        geneval_scores(path, as_jobs(geneval))


def test_a_page_of_nothing_or_of_other_images_is_refused(geneval: PromptList, tmp_path: Path) -> None:
    nothing = page(tmp_path / "none")
    assert nothing.exit_code == 1 and "expected a folder of `flashu-ext evaluate`" in nothing.output
    folder = drawn(tmp_path / "out", "paper", geneval)
    path = written(folder / "results.jsonl", [geneval_lines()[0] | {"prompt": "of another list"}])
    other = page(tmp_path / "out")
    assert other.exit_code == 1 and f"{path}:1: prompt: expected 'prompt 0'" in other.output, other.output
    assert not (tmp_path / "out" / "evaluation.html").exists()
    (folder / "drawing.json").write_text('{"version": 1}')
    broken = page(tmp_path / "out")
    assert broken.exit_code == 1 and f"{folder / 'drawing.json'}: expected a record of version 1" in broken.output
