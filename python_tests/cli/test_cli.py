"""The command line: help with examples, exit codes, the plan table, and a build without kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import flashu_ext as fx
from flashu_ext.cli.main import cli
from flashu_ext.planning.config import FlashUConfig


def run(*arguments: str):
    return CliRunner().invoke(cli, list(arguments))


def own_commands(group: click.Group, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from own_commands(command, (*path, name))
        elif command.add_help_option:  # the others pass their arguments on
            yield (*path, name)


@pytest.mark.parametrize("path", list(own_commands(cli)), ids=" ".join)
def test_help_has_an_example(path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert "flashu-ext " + " ".join(path) in result.output


def test_commands() -> None:
    assert set(cli.commands) == {
        "demo",
        "evaluate",
        "generate",
        "answer",
        "calibrate",
        "schedule",
        "bench",
        "info",
        "analyze",
        "report",
        "tune",
        "serve",
    }
    assert set(cli.commands["bench"].commands) == {"arrivals", "serve", "ffn", "linear", "e2e"}


def test_version() -> None:
    import flashu_ext

    result = run("--version")
    assert result.exit_code == 0
    assert flashu_ext.__version__ in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("schedule", "--preset", "nonsense"),
        ("schedule", "--steps", "1"),
        ("schedule", "--model", "7b"),
        ("schedule", "--kernels", "--device", "tpu"),
        ("generate",),
        ("generate", "a circle", "--steps", "many"),
        ("generate", "a circle", "-o", "/no/such/folder/out.png"),
        ("generate", "a circle", "-o", "/proc/out.png"),
        ("calibrate", "nano", "--out", "/proc/plan.safetensors"),
        ("generate", "a circle", "--dtype", "int8"),
        ("answer", "/no/such/image.png", "what colour is it?"),
        ("calibrate", "nano", "--data", "/no/such/folder"),
        ("calibrate", "nano", "--out", "/no/such/folder/plan.safetensors"),
        ("calibrate", "nano", "--estimator", "magic"),
        ("calibrate", "nano", "--ratio", "1"),
        ("calibrate", "some/checkpoint"),
        ("answer", __file__, "what colour is it?", "--top-p", "0"),
        ("answer", __file__, "what colour is it?", "--temperature", "-1"),
        ("bench", "e2e", "--repeats", "0"),
        ("bench", "e2e", "--upstream", "/no/such/folder"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output


def test_failure_is_1_and_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"ffn_prune_ratio": NaN}')
    result = run("schedule", "--config", str(path))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "NaN" in result.output
    assert result.output.count("\n") == 1


def test_traceback_is_there_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    result = run("--traceback", "schedule", "--config", str(path))
    assert isinstance(result.exception, ValueError)


def test_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("flashu_ext.models.showo2.pipeline")
    result = run("generate", "a red circle", "--model", str(tmp_path / "absent"), "-o", str(tmp_path / "out.png"))
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "absent" in result.output
    assert not (tmp_path / "out.png").exists()


def test_a_place_that_cannot_be_written_is_said_before_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashu_ext.cli.generate.open_pipeline", None)
    result = run("generate", "a circle", "-o", "/proc/out.png")
    assert result.exit_code == 2 and "--output: expected a file in a folder that can be written to" in result.output


def test_a_cut_prompt_is_one_line(tmp_path: Path) -> None:
    result = run("generate", "a " * 100, "--steps", "2", "-o", str(tmp_path / "out.png"))
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if line.startswith("Warning: prompts[0]: cut to the first")]
    assert "UserWarning" not in result.output


@pytest.mark.parametrize("command", ["generate", "answer"])
def test_device_and_dtype_are_chosen(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from flashu_ext.models.showo2 import Pipeline

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    image = tmp_path / "image.png"
    pytest.importorskip("PIL.Image").new("RGB", (48, 48), "red").save(image)
    own = {
        "generate": ("generate", "a circle", "--steps", "2", "-o", str(tmp_path / "out.png")),
        "answer": ("answer", str(image), "what color is the circle?", "--max-new-tokens", "1"),
    }[command]
    seen = []
    load = Pipeline.from_pretrained

    def recorded(*arguments):
        pipe = load(*arguments)
        weight = pipe.model.showo.model.embed_tokens.weight
        seen.append((weight.device.type, weight.dtype))
        return pipe

    monkeypatch.setattr(Pipeline, "from_pretrained", recorded)
    for more in ([], ["--device", "cpu"], ["--dtype", "bf16"]):
        result = run(*own, *more)
        assert result.exit_code == 0, result.output
    assert seen == [("cpu", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
    for device in ("gpu", "cuda"):
        result = run(*own, "--device", device)
        assert result.exit_code == 1 and result.output.startswith("Error: device: expected"), result.output
    shown = run(command, "--help").output
    assert "--device" in shown and "--dtype [fp32|bf16|fp16]" in shown


def test_answers_are_sampled_as_asked(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    pytest.importorskip("PIL.Image").new("RGB", (48, 48), "red").save(image)
    ask = ("answer", str(image), "what color is the circle?", "--max-new-tokens", "2")
    answers = [
        run(*ask, *more) for more in ([], ["--preset", "dense"], ["--temperature", "1", "--top-k", "1"], ["--stream"])
    ]
    assert {result.exit_code for result in answers} == {0} and len({result.output for result in answers}) == 1
    hot = [run(*ask, "--temperature", "50", "--top-p", "1", "--seed", seed).output for seed in "112"]
    assert hot[0] == hot[1] != hot[2]


def test_plan_of_paper_names_the_totals() -> None:
    result = run("schedule", "--preset", "paper", "--steps", "35")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["step", "kind", "FFN", "layers", "head", "guidance"]
    assert lines[-1].startswith("35 grid points = 34 evaluations: 19 run the backbone, 18 the head, 15 were dead")
    assert len(lines) == 34 + 3


def test_plan_as_json_agrees_with_the_table() -> None:
    record = json.loads(run("schedule", "--steps", "35", "--json").output)
    assert (record["evaluations"], record["backbone"], record["head"], record["dead"]) == (34, 19, 18, 15)
    assert [step["index"] for step in record["steps"]] == list(range(1, 35))
    assert sum(record["kinds"].values()) == 34
    assert record["steps"][0]["guidance"] == 3.75 and record["steps"][-1]["guidance"] == 5.0


def test_plan_of_exact_runs_everything() -> None:
    record = json.loads(run("schedule", "--preset", "exact", "--steps", "10", "--json").output)
    assert record["backbone"] == record["head"] == 9 and record["dead"] == 0


def test_plan_from_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(FlashUConfig(head_cache_interval=3, steps=12).to_json())
    record = json.loads(run("schedule", "--config", str(path), "--json").output)
    assert record["grid_points"] == 12 and record["head"] < record["evaluations"]


def test_kernels_are_printed_before_anything_runs() -> None:
    pytest.importorskip("transformers")
    result = run("schedule", "--kernels", "--preset", "exact", "--model", "1.5b", "--device", "cpu", "--dtype", "bf16")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["task", "phase", "op", "kernel", "runs", "shape", "GFLOP", "GB", "reason"]
    assert any(line.split()[:4] == ["understanding", "decode", "gathered_ffn", "flashu"] for line in lines)
    assert lines[-1].startswith("bfloat16 on cpu; GFLOP, GB are predicted")
    rows = json.loads(run("schedule", "--kernels", "--steps", "11", "--json").output)
    assert {row["runs"] for row in rows if row["phase"] == "decode"} == {1}
    assert {"task", "phase", "op", "implementation", "reason", "gflop", "gb"} <= set(rows[0])


def test_kernels_that_cannot_be_had_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(FlashUConfig(attention_kernels="flashu").to_json())
    result = run("schedule", "--kernels", "--config", str(path), "--device", "cuda")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "attention" in result.output


def test_layers_that_round_down_to_none_are_known() -> None:
    record = json.loads(run("schedule", "--layers", "4", "--json").output)
    assert "measure" not in record["kinds"]


LIGHT = """
import sys
import flashu_ext.cli.main
heavy = {"torch", "transformers", "numpy", "matplotlib", "jinja2", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_command_line_is_light() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=60)


@pytest.mark.parametrize("module", ["flashu_ext", "flashu_ext.cli"])
def test_the_package_runs_as_the_command(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout == f"flashu-ext, version {fx.__version__}\n", result.stderr


WITHOUT_EXTENSION = """
import importlib.abc, pathlib, sys
import flashu_ext.ops.native as native
native.LIBRARY = pathlib.Path("/nonexistent/libflashu_torch.so")
from flashu_ext.cli.main import main
main(["info"])
"""


def test_info_works_without_the_extension() -> None:
    pytest.importorskip("flashu_ext.cli.info")
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout


# ---- calibrate


def write_folder(folder: Path, lines: dict[str, list[str]]) -> Path:
    from PIL import Image

    folder.mkdir()
    for n in range(3):
        Image.new("RGB", (60, 50), (80 * n, 40, 200 - 80 * n)).save(folder / f"{n}.png")
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content))
    return folder


IMAGES = [json.dumps({"image": f"{n}.png", "prompt": "a red circle"}) for n in range(3)]
ASKED = [json.dumps({"image": f"{n}.png", "question": "what color is it?", "answer": "red"}) for n in range(3)]


def test_calibrate_a_folder(tmp_path: Path) -> None:
    from flashu_ext.nano.model import load_model
    from flashu_ext.planning.estimators import ESTIMATORS
    from flashu_ext.planning.plan import TaskPlan

    data = write_folder(
        tmp_path / "data",
        {"generation.jsonl": IMAGES, "counting.jsonl": [*ASKED, ""], "understanding.jsonl": ASKED[:1]},
    )
    out = tmp_path / "plan.safetensors"
    arguments = ["calibrate", "nano", "--data", str(data), "--out", str(out), "--times", "0.2", "--times", "0.8"]
    for estimator in ESTIMATORS:
        checkpoint = str(tmp_path / "state.safetensors")
        result = run(*arguments, "--limit", "2", "--estimator", estimator, "--adaptive", "--checkpoint", checkpoint)
        assert result.exit_code == 0, result.output
        assert "task      counting: " in result.output
        plan = TaskPlan.load(out, model=load_model())
        assert plan.tasks == ("generation", "understanding", "counting") and plan.times == (0.2, 0.8)
        assert plan.notes["samples"] == {"generation": 2, "understanding": 1, "counting": 2}
        assert (plan.estimator, plan.multiple, plan.ratio) == (estimator, 16, 0.2) and plan.ratios is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "plan.safetensors"]
    # The other commands accept the plan.
    generated = run("generate", "a red circle", "--preset", "paper", "--plan", str(out), "--steps", "4", "-v",
                "-o", str(tmp_path / "out.png"))  # fmt: skip
    assert generated.exit_code == 0, generated.output
    assert f"counting {plan.kept_neurons}" in generated.output


def test_a_plan_that_cannot_be_written_costs_no_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashu_ext.planning.plan import TaskPlan

    data = write_folder(tmp_path / "data", {"generation.jsonl": IMAGES})
    out, state = tmp_path / "plan.safetensors", tmp_path / "state.safetensors"
    arguments = ["calibrate", "nano", "--data", str(data), "--out", str(out), "--limit", "1", "--times", "0.2"]
    arguments += ["--checkpoint", str(state)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patch:
        patch.setattr(TaskPlan, "save", full)
        refused = run(*arguments)
    assert refused.exit_code != 0 and state.exists() and "plan.safetensors" in refused.output, refused.output
    samples: list[int] = []
    observer = "flashu_ext.calibration.calibrate._Observer.run"
    monkeypatch.setattr(observer, lambda *_: samples.append(1))
    resumed = run(*arguments)
    assert resumed.exit_code == 0 and not samples and not state.exists(), resumed.output
    assert TaskPlan.load(out).notes["samples"] == {"generation": 1}


def test_calibrate_nano_makes_its_own_samples(tmp_path: Path) -> None:
    from flashu_ext.planning.plan import TaskPlan

    out = tmp_path / "plan.safetensors"
    result = run("calibrate", "nano", "--limit", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    plan = TaskPlan.load(out)
    assert plan.tasks == ("generation", "understanding") and plan.kept_counts == (304,) * 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({}, "expected generation.jsonl, understanding.jsonl or other <task>.jsonl files"),
        ({"generation.jsonl": []}, "generation.jsonl: expected at least one line, got none"),
        ({"generation.jsonl": [IMAGES[0], "{"]}, "generation.jsonl:2: not valid JSON"),
        (
            {"generation.jsonl": [IMAGES[0], "", "3"]},
            "generation.jsonl:3: expected an object with image, prompt, got '3'",
        ),
        ({"generation.jsonl": ASKED}, "generation.jsonl:1: expected an object with image, prompt, got"),
        ({"x.jsonl": [ASKED[0], IMAGES[0]]}, "x.jsonl:2: expected an object with answer, image, question, got"),
        (
            {"x.jsonl": ['{"image": "0.png"}']},
            "x.jsonl:1: expected an object with image, prompt or answer, image, question",
        ),
        ({"x.jsonl": ['{"image": "0.png", "image": "1.png", "prompt": ""}']}, "x.jsonl:1: key 'image' appears twice"),
        ({"x.jsonl": ['{"image": "0.png", "prompt": 3}']}, "x.jsonl:1: prompt: expected a non-empty string, got 3"),
        ({"x.jsonl": [ASKED[0].replace("red", " ")]}, "x.jsonl:1: answer: expected a non-empty string, got ' '"),
        ({"x.jsonl": ['{"image": "9.png", "prompt": "a"}']}, "x.jsonl:1: image: no such file"),
        ({"x.jsonl": ['{"image": "../0.png", "prompt": "a"}']}, "x.jsonl:1: image: expected a path within the folder"),
        ({"x.jsonl": ['{"image": "x.jsonl", "prompt": "a"}']}, "x.jsonl: not an image"),
    ],
)
def test_calibrate_names_what_is_wrong_with_its_data(tmp_path: Path, lines: dict[str, list[str]], message: str) -> None:
    data, out = write_folder(tmp_path / "data", lines), tmp_path / "plan.safetensors"
    result = run("calibrate", "nano", "--data", str(data), "--out", str(out))
    assert result.exit_code == 1, result.output
    assert message in result.output and not out.exists()


def test_calibrate_offers_every_estimator() -> None:
    from flashu_ext.cli import main as module
    from flashu_ext.planning.estimators import ESTIMATORS

    assert tuple(ESTIMATORS) == module.ESTIMATORS


def test_plan_shows_the_columns_of_knobs_that_are_on(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = FlashUConfig(
        steps=8, token_skip=True, token_skip_ratio=0.5, encoder_cache=True, adaptive_cache=True, skip_unit_guidance=True
    )
    path.write_text(config.to_json())
    lines = run("schedule", "--config", str(path), "--guidance", "1").output.splitlines()
    assert lines[0].split() == "step kind encoder FFN layers tokens head branches guidance".split()
    assert lines[3].split()[-2:] == ["one", "1"] and "run the encoder; 5 of these may be cached" in lines[-1]
    record = json.loads(run("schedule", "--config", str(path), "--json").output)
    assert record["adaptive"] == 5 and record["encoder"] == 4 and record["steps"][1]["tokens_from"] == [1]


def test_tuned_settings_generate_and_answer(tmp_path: Path) -> None:
    from flashu_ext.nano.model import load_model, load_plan
    from flashu_ext.nano.subject import PRUNE_MULTIPLE

    config = FlashUConfig.fast(prune_multiple=PRUNE_MULTIPLE, steps=4, ffn_prune_ratio=0.1)
    (tmp_path / "config.json").write_text(config.to_json())
    load_plan(load_model()).with_ratio(0.1, PRUNE_MULTIPLE).save(tmp_path / "plan.safetensors")
    out = str(tmp_path / "out.png")
    generated = run("generate", "a red circle", "--tuned", str(tmp_path), "-o", out, "-v")
    assert generated.exit_code == 0 and "generation 336" in generated.output, generated.output
    assert run("answer", out, "how many objects are there ?", "--tuned", str(tmp_path)).exit_code == 0
    assert run("generate", "a red circle", "--preset", "fast", "-o", out).exit_code == 0
    both = run(
        "generate", "a circle", "--tuned", str(tmp_path), "--plan", str(tmp_path / "plan.safetensors"), "-o", out
    )
    assert both.exit_code == 2 and "expected none with --tuned" in both.output
    (tmp_path / "config.json").write_text("{")
    broken = run("generate", "a circle", "--tuned", str(tmp_path), "-o", out)
    assert broken.exit_code == 1 and "not valid JSON" in broken.output


@pytest.mark.parametrize("command", ["analyze", "report", "tune"])
def test_studies_refuse_nothing_to_measure(command: str) -> None:
    assert run(command, "--drawings", "0").exit_code == 2 and run(command, "--model", "/no/such/folder").exit_code == 2


def test_the_step_plan_keeps_its_old_name() -> None:
    assert run("plan", "--steps", "35").output == run("schedule", "--steps", "35").output
    assert "  plan " not in run("--help").output
