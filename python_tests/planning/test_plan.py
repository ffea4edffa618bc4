"""Room: tests of TaskPlan: selection, files, hostile files."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashu_ext import TaskPlan
from flashu_ext.plan import kept_count


def scores(layers=3, neurons=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(neurons, generator=generator) for _ in range(layers)]


def test_kept_counts_follow_the_reference():
    assert kept_count(8960, 0.2, 64) == 7168
    assert kept_count(18944, 0.2, 64) == 15104
    assert kept_count(40, 0.2, 64) == 32
    assert kept_count(100, 0.9, 64) == 64


def test_the_best_are_kept_and_ties_keep_the_lower_index():
    plan = TaskPlan.from_scores(generation=[torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])], ratio=0.5, multiple=1)
    assert plan.kept("generation", 0).tolist() == [1, 2, 3]


def test_a_plan_survives_its_file(tmp_path):
    plan = TaskPlan.from_scores(generation=scores(), understanding=scores(seed=1), ratio=0.25, multiple=32)
    plan.save(tmp_path / "plan.safetensors")
    back = TaskPlan.load(tmp_path / "plan.safetensors")
    assert (back.ratio, back.multiple, back.tasks, back.fingerprint) == (
        0.25,
        32,
        ("generation", "understanding"),
        None,
    )
    for task in back.tasks:
        for layer in range(3):
            assert torch.equal(back.kept(task, layer), plan.kept(task, layer))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected at least one task"),
        ({"generation": []}, "generation: expected a non-empty list"),
        ({"generation": scores()[0]}, "generation: expected a non-empty list"),
        ({"generation": [torch.rand(4), torch.rand(5)]}, r"generation\[1\]: expected 4 scores"),
        (
            {"generation": [torch.tensor([1.0, float("nan")])]},
            r"generation\[0\]: expected finite scores, got nan at neuron 1",
        ),
        ({"generation": [torch.zeros(4, dtype=torch.int64)]}, r"generation\[0\]: expected a 1-D floating-point"),
        ({"generation": scores(), "understanding": scores(layers=2)}, "same layers and neurons"),
        ({"generation": scores(), "ratio": 1.0}, r"ratio: expected a number in \[0, 1\)"),
        ({"generation": scores(), "multiple": 0}, "multiple: expected an integer >= 1"),
    ],
)
def test_bad_scores_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskPlan.from_scores(**arguments)


def write(path, tensors, plan):
    save_file(tensors, path, metadata={"plan": plan if isinstance(plan, str) else json.dumps(plan)})


GOOD = {
    "format": "flashu_ext.task_plan",
    "version": 1,
    "tasks": ["generation"],
    "ratio": 0.2,
    "multiple": 4,
    "fingerprint": None,
    "notes": {},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "expected version 1 or 2, got 3"),
        ({"version": [1]}, "expected version 1 or 2"),
        ({"version": 2}, "expected fields"),
        ({"format": "x"}, "expected format"),
        ({"extra": 1}, "expected fields"),
        ({"tasks": ["generation", "generation"]}, "distinct names"),
        ({"tasks": ["understanding"]}, "expected scores of"),
        ({"ratio": 2}, r"ratio: expected a number in \[0, 1\)"),
        ({"notes": 3}, "notes: expected an object"),
        ({"fingerprint": 3}, "fingerprint: expected a string"),
    ],
)
def test_a_plan_file_with_a_wrong_header_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.safetensors"
    write(path, {"score.generation": torch.rand(2, 16)}, GOOD)
    assert TaskPlan.load(path).kept_neurons == 12
    write(path, {"score.generation": torch.rand(2, 16)}, {**GOOD, **change})
    with pytest.raises(ValueError, match=message):
        TaskPlan.load(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.rand(16), "expected fp32"),
        (torch.rand(2, 16).double(), "expected fp32"),
        (torch.full((2, 16), float("inf")), "expected finite scores"),
    ],
)
def test_a_plan_file_with_wrong_scores_is_refused(tmp_path, tensor, message):
    path = tmp_path / "plan.safetensors"
    write(path, {"score.generation": tensor}, GOOD)
    with pytest.raises(ValueError, match=message):
        TaskPlan.load(path)


def raw(header: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + payload


F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 8 bytes"),
        (raw(b"{}", length=2**62), "header claims"),
        (raw(b"\xff\xfe"), "not UTF-8"),
        (raw(b"[1]"), "expected a JSON object"),
        (raw(('{"a":' + F32 + ',"a":' + F32 + "}").encode(), b"\0" * 8), "appears twice"),
        (raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}'), "NaN is not allowed"),
        (raw(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"\0" * 8), "needs 12 bytes"),
        (raw(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}', b"\0" * 8), "needs"),
        (raw(b'{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8), "unknown dtype"),
        (raw(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', b"\0" * 8), "shape: expected a list"),
        (raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', b"\0" * 16), "overlap or gap"),
        (raw(('{"a":' + F32 + "}").encode(), b"\0" * 7), "truncated or padded"),
        (raw(('{"a":' + F32 + "}").encode(), b"\0" * 9), "truncated or padded"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TaskPlan.load(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_still_a_valid_plan(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    write(path, {"score.generation": torch.rand(2, 16)}, GOOD)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        plan = TaskPlan.load(path)
    except ValueError:
        return
    assert torch.isfinite(plan.scores["generation"]).all()
    assert len(plan.kept("generation", 0)) == plan.kept_neurons


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    plan = TaskPlan.from_scores(generation=scores())
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]
