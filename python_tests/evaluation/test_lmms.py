"""lmms-eval's tasks on the embedded model: our class alone, and both ways into the tool where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ranks import ROOT, environment

import flashu_ext as fx
from flashu_ext.evaluation.likelihood import answer_likelihood
from flashu_ext.models.folders import load_pipeline
from flashu_ext.nano.world import questions, render, scenes

HAVE = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not HAVE, reason="lmms-eval is not installed: pip install 'flashu_ext[evaluate]'")

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function own_world_utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
doc_to_choice: "{{{{choices}}}}"
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
{metrics}
metadata:
  - version: 0.0
"""
OWN = """process_results: !function own_world_utils.right
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true"""
CHOICE = """metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true"""
UTILS = """
from PIL import Image
def visual(doc): return [Image.open(doc["picture"]).convert("RGB")]
def right(doc, results): return {"right": float(results[0] == doc["answer"])}
"""


def asked(count: int) -> list[tuple[Any, Any]]:
    """(picture, question) of held-out scenes."""
    from PIL import Image

    rng = random.Random(0)
    found = []
    for scene in scenes(True)[:count]:
        picture = Image.fromarray(render(scene, rng))
        found += [(picture, question) for question in questions(scene, rng)[:2]]
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks in lmms-eval's own format, on local data: answers, and a choice by likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for index, (picture, question) in enumerate(asked(3)):
        picture.save(folder / f"{index}.png")
        lines.append({"picture": str(folder / f"{index}.png"), "question": question.text, "answer": question.answer,
                      "choices": ["pizza", question.answer], "index": 1})  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "own_world_utils.py").write_text(UTILS)
    for name, kind, target, metrics in (
        ("own_world", "generate_until", "answer", OWN),
        ("own_choice", "multiple_choice", "index", CHOICE),
    ):
        text = TASK.format(folder=folder, name=name, kind=kind, target=target, metrics=metrics)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def python(*arguments: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", **more),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# ---- likelihoods


@pytest.mark.parametrize("preset", ["dense", "exact", "paper"])
def test_likelihoods_are_those_of_the_answering_model(preset: str, one_thread: None) -> None:
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    picture, question = asked(1)[0]
    dense = pipe.answer(picture, question.text)
    config, plan = pipe.preset(preset)
    handle = pipe.accelerate(config, plan) if config is not None else None
    own = pipe.answer(picture, question.text)
    likely = answer_likelihood(pipe, picture, question.text, own)
    unlikely = answer_likelihood(pipe, picture, question.text, "left right above")
    assert likely.greedy and not unlikely.greedy and unlikely.logprob < likely.logprob < 0
    # Oracle: one pass of the dense model over the question and the answer.
    if handle is not None:
        handle.remove()
    from flashu_ext.models.masks import additive
    from flashu_ext.models.showo2.understanding import prompt_embeds

    latents, before, after = pipe.question_inputs(picture, question.text)
    for text, found in ((dense, likely), ("left right above", unlikely)):
        tokens = torch.tensor([pipe.layout.encode(text)])
        with torch.no_grad():
            embeds, allowed = prompt_embeds(pipe.model, latents, before, torch.cat([after, tokens], dim=1))
            hidden = pipe.model.showo.model(
                inputs_embeds=embeds, attention_mask=additive(allowed, embeds.dtype)[None, None]
            ).last_hidden_state
            count = tokens.shape[1]
            chances = torch.log_softmax(pipe.model.showo.lm_head(hidden[0, -count - 1 : -1]).double(), dim=-1)
        expected = float(chances.gather(1, tokens.T).sum())
        if preset != "paper":
            assert found.tokens == count and abs(found.logprob - expected) < 1e-3
    assert unlikely.tokens > 1, "each token of an answer counts"
    with pytest.raises(ValueError, match="answer: expected at least one token"):
        answer_likelihood(pipe, picture, question.text, "")


@pytest.mark.parametrize("family", ["janusflow", "bagel"])
def test_likelihoods_of_other_families(family: str, one_thread: None) -> None:
    pipe = load_pipeline("nano", family=family)
    picture, question = asked(1)[0]
    with pytest.raises(TypeError, match="pipe: expected an accelerated model, as by the preset exact"):
        answer_likelihood(pipe, picture, question.text, question.answer)
    with pipe.accelerate(*pipe.preset("exact")):
        own = pipe.answer(picture, question.text, 4)
        likely = answer_likelihood(pipe, picture, question.text, own)
        other = answer_likelihood(pipe, picture, question.text, "above")
        assert likely.greedy and not other.greedy and other.logprob < likely.logprob < 0
        assert likely.tokens == len(pipe.layout.encode(own))


# ---- the class


@needs_lmms_eval
def test_the_class_answers_as_the_pipeline(one_thread: None) -> None:
    from flashu_ext.evaluation.lmms import FlashU

    rows = asked(2)
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    model = FlashU(pipe=pipe, batch_size="3")
    model.task_dict = {"t": {"test": [picture for picture, _ in rows]}}

    def request(number: int, **settings: Any) -> Any:
        return SimpleNamespace(args=(rows[number][1].text, settings, lambda picture: [picture], number, "t", "test"))

    plain = [pipe.answer(picture, question.text, 4) for picture, question in rows]
    greedy = {"max_new_tokens": 4, "temperature": 0, "num_beams": 1}
    assert model.generate_until([request(number, **greedy) for number in range(len(rows))]) == plain
    first = plain[0].split()[0]
    assert model.generate_until([request(0, until=[first], **greedy)]) == [""]
    assert model.generate_until([request(0, **{**greedy, "max_new_tokens": 1})]) == [first]
    # Settings of a question are its own, also between others.
    mixed = [request(0, **greedy), request(1, **{**greedy, "max_new_tokens": 1}), request(2, **greedy)]
    assert model.generate_until(mixed) == [plain[0], plain[1].split()[0], plain[2]]
    sampled = {"max_new_tokens": 4, "temperature": 5.0, "do_sample": True}
    drawn = model.generate_until([request(number, **sampled) for number in range(len(rows))])
    assert drawn == [
        pipe.answer(picture, question.text, 4, temperature=5.0, seed=number)
        for number, (picture, question) in enumerate(rows)
    ]
    with pytest.warns(UserWarning, match=r"t\[0\]: generation_kwargs that do nothing here: image_aspect_ratio"):
        model.generate_until([request(0, image_aspect_ratio="pad", **greedy)])
    with pytest.raises(ValueError, match=r"t\[1\]: num_beams: expected 1, got 4"):
        model.generate_until([request(1, num_beams=4)])
    model.task_dict["t"]["test"][0] = []
    with pytest.raises(ValueError, match=r"t\[0\]: expected at least one image"):
        model.generate_until([request(0, **greedy)])
    with pytest.raises(TypeError, match="model_args: expected none but the arguments of FlashU, got"):
        FlashU(pipe=pipe, pretraind="x")
    with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got 'auto'"):
        FlashU(pipe=pipe, batch_size="auto")


# ---- the whole way


@needs_lmms_eval
def test_evaluate_understanding(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["-m", "flashu_ext.cli", "evaluate", "understanding", "--out", str(out), "--preset", "paper"]
    command += ["--tasks", f"{tasks / 'own_world.yaml'},{tasks / 'own_choice.yaml'}", "--batch", "2"]
    first = python(*command)
    assert "2 tasks, 2 of them run now" in first and "own_choice: acc" in first, first
    record = json.loads((out / "paper" / "understanding" / "own_world.json").read_text())
    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    with pipe.accelerate(*pipe.preset("paper")):
        expected = [pipe.answer(picture, question.text, 4) for picture, question in asked(3)]
    assert [sample["answer"] for sample in record["samples"]] == [[answer] for answer in expected]
    right = [answer == question.answer for answer, (_, question) in zip(expected, asked(3), strict=True)]
    assert record["results"]["right,none"] == sum(right) / 6 and record["questions"] == 6
    assert record["settings"]["preset"] == "paper" and record["settings"]["plan"] is not None
    choice = json.loads((out / "paper" / "understanding" / "own_choice.json").read_text())
    assert choice["results"]["acc,none"] == 1.0, "a right answer is likelier than an unknown word"
    page = python("-m", "flashu_ext.cli", "evaluate", "page", "--out", str(out))
    assert "own_world" in page and "own_choice" in page
    again = python(*command)
    assert "2 tasks, 0 of them run now" in again, again


@needs_lmms_eval
def test_lmms_eval_finds_the_class_by_its_entry_point(tasks: Path, tmp_path: Path) -> None:
    """As the tool is used by itself, with this package's entry points as pyproject.toml has them."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = tmp_path / "site" / "flashu_plugin-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashu_plugin\nVersion: 1\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\n{lines}")
    path = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))
    code = """
import json, sys
from lmms_eval import models
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
manager = TaskManager("WARNING", include_path=sys.argv[1], include_defaults=False)
found = simple_evaluate(model="flashu_ext", model_args="pretrained=nano,preset=exact", tasks=["own_world"],
                        task_manager=manager, batch_size=2, bootstrap_iters=0, verbosity="WARNING")
print(json.dumps([found["results"]["own_world"]["right,none"], found["config"]["model_backend"]]))
try:
    models.get_model("flashu_ext_showo2")
except ImportError as error:
    print(error)
"""
    said = python("-c", code, str(tasks), PYTHONPATH=path).strip().splitlines()
    record = next(json.loads(line) for line in said if line.startswith("["))
    assert record == [1.0, "flashu_ext.evaluation.lmms.FlashU (simple)"]
    if importlib.util.find_spec("lmms_eval.models.simple.showo2") is None:
        assert "earlier releases have no class for Show-o2" in said[-1]


def test_lmms_evals_own_class_is_accelerated(one_thread: None) -> None:
    """A stand-in for the tool's class: what it has of it is the attribute `model`."""
    from flashu_ext.evaluation.upstream_lmms import accelerated

    class Showo2:
        def __init__(self, pretrained: str, continual_mode: bool = True):
            self.model = fx.showo2.Pipeline.from_pretrained(pretrained).model
            self.continual_mode = continual_mode

    model: Any = accelerated(Showo2)("nano")
    assert model.handle is fx.handle_of(model.model) and not model.handle.config.approximates
    assert model.continual_mode is False, "answers kept by a run of another preset"
    assert not hasattr(accelerated(Showo2)("nano", preset="dense"), "handle")
    with pytest.raises(ValueError, match="preset: expected one of"):
        accelerated(Showo2)("nano", preset="quick")
