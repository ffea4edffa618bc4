"""Tests of TaskPlan: selection, files, hostile files."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashu_ext import TaskPlan
from flashu_ext.planning.estimators import ESTIMATORS, Calibration, DownNorms, NeuronSums
from flashu_ext.planning.plan import _ratio_that_keeps, kept_count
from flashu_ext.planning.safe_files import load_safetensors, save_safetensors


def scores(layers=3, neurons=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(neurons, generator=generator) for _ in range(layers)]


def test_kept_counts_follow_the_reference():
    assert kept_count(8960, 0.2, 64) == 7168
    assert kept_count(18944, 0.2, 64) == 15104
    assert kept_count(40, 0.2, 64) == 32
    assert kept_count(100, 0.9, 64) == 64
    assert kept_count(10, 0.25, 1) == 8, "2.5 neurons to prune are 2"


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


# ---- what calibration measured


def measured_plan(layers=2, neurons=64, multiple=16, **arguments):
    """A plan as calibration makes it: three tasks, one of them understanding; three times."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    tasks = ("generation", "understanding", "editing")
    activations = {task: random(50, layers, neurons).double() - 0.3 for task in tasks}
    measured = Calibration(
        {task: NeuronSums(50, h.sum(0), h.square().sum(0)) for task, h in activations.items()},
        DownNorms(random(layers, neurons), random(layers, neurons)),
        (0.1, 0.5, 0.9),
        {task: random(1 if task == "understanding" else 3, layers) for task in tasks},
        {"understanding": random(layers)},
    )
    return TaskPlan.from_calibration(measured, multiple=multiple, **arguments)


def test_a_calibrated_plan_survives_its_file(tmp_path):
    path = tmp_path / "plan.safetensors"
    plan = measured_plan(estimator="flap", notes={"seed": 3}).with_ratios([0.25, 0.5])
    plan.save(path)
    back = TaskPlan.load(path)
    assert (back.tasks, back.times, back.estimator, back.notes) == (plan.tasks, plan.times, "flap", {"seed": 3})
    assert back.kept_counts == (48, 32) and back.ratios == (0.25, 0.5) and back.ratio == 0.375
    assert back.kept_neurons == 40
    for task in plan.tasks:
        assert torch.equal(back.layer_importance[task], plan.layer_importance[task])
        for name in ESTIMATORS:
            assert torch.equal(back.with_estimator(name).scores[task], plan.with_estimator(name).scores[task])
    assert torch.equal(*(p.calibration.mean_layer_importance["understanding"] for p in (back, plan)))
    assert back.describe() == plan.describe() and "48, 32 of 64 neurons" in plan.describe()


def test_estimators_choose_different_neurons():
    plan = measured_plan(neurons=256)
    sets = {name: plan.with_estimator(name).kept("editing", 1) for name in ESTIMATORS}
    assert plan.estimator == "wanda" and torch.equal(sets["wanda"], plan.kept("editing", 1))
    assert not torch.equal(sets["wanda"], sets["flap"]) and not torch.equal(sets["flap"], sets["reconstruction"])
    with pytest.raises(ValueError, match="estimator: expected one of wanda, flap, reconstruction, got 'magic'"):
        plan.with_estimator("magic")
    with pytest.raises(ValueError, match="made from given scores"):
        TaskPlan.from_scores(generation=scores()).with_estimator("flap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.2]}, "ratios: expected one for each of 2 layers, got 1"),
        ({"ratios": [0.2, 1.5]}, r"ratios\[1\]: expected a number in \[0, 1\), got 1.5"),
        ({"ratios": 0.2}, "ratios: expected a list or null"),
        ({"calibration": []}, "calibration: expected estimator, times and tokens"),
        ({"calibration": None}, "expected scores of"),
        ({"estimator": "magic"}, "estimator: expected one of"),
        ({"estimator": ["wanda"]}, "estimator: expected one of"),
        (
            {"times": [0.1, 0.5]},
            r"layer_importance\['generation'\]: expected torch.float32 of shape \[2, 2\], got \(3, 2\)",
        ),
        ({"times": [0.1, 0.5, 2]}, r"times: expected numbers in \[0, 1\]"),
        ({"times": 3}, "calibration.times: expected a list"),
        ({"tokens": {"generation": 50}}, "calibration.tokens: expected a count for each of"),
        ({"tokens": {"generation": 0, "understanding": 50, "editing": 50}}, "tokens: expected an integer >= 1, got 0"),
        ({"tasks": ["generation", "understanding"]}, "calibration.tokens: expected a count for each"),
    ],
)
def test_a_calibrated_plan_with_a_wrong_header_is_refused(tmp_path, change, message):
    path = tmp_path / "plan.safetensors"
    measured_plan().save(path)
    tensors, metadata = load_safetensors(path)
    header = json.loads(metadata["plan"])
    name = next(iter(change))
    target = header["calibration"] if name in header["calibration"] else header
    target |= change
    save_safetensors(path, tensors, {"plan": json.dumps(header)})
    with pytest.raises(ValueError, match=message) as error:
        TaskPlan.load(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("total.editing", torch.zeros(2, 64), "total: expected torch.float64"),
        ("total.editing", torch.zeros(2, 63).double(), r"squares: expected torch.float64 of shape \[2, 63\]"),
        ("squares.editing", torch.full((2, 64), -1.0).double(), "squares: expected no negative sums"),
        ("squares.editing", torch.full((2, 64), float("inf")).double(), r"finite numbers, got inf at \[0, 0\]"),
        ("down.squares", torch.full((2, 64), -1.0), "squares: expected no negative norms"),
        ("importance.editing", torch.zeros(6), "layer_importance"),
        ("mean_importance.understanding", torch.zeros(()), "mean_layer_importance"),
        ("importance.editing", None, "expected tensors"),
        ("more.editing", torch.zeros(1), "expected tensors"),
    ],
)
def test_a_calibrated_plan_with_wrong_tensors_is_refused(tmp_path, name, tensor, message):
    path = tmp_path / "plan.safetensors"
    measured_plan().save(path)
    tensors, metadata = load_safetensors(path)
    tensors.pop(name, None)
    save_safetensors(path, {**tensors, **({} if tensor is None else {name: tensor})}, metadata)
    with pytest.raises(ValueError, match=message):
        TaskPlan.load(path)


# ---- ratios per layer


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 256), st.data())
def test_there_is_a_ratio_for_every_count(intermediate, multiple, data):
    largest = intermediate // multiple
    if largest:
        kept = multiple * data.draw(st.integers(1, largest))
        ratio = _ratio_that_keeps(intermediate, kept, multiple)
        assert 0 <= ratio < 1 and kept_count(intermediate, ratio, multiple) == kept


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 200),
    st.integers(1, 40),
    st.floats(0, 0.99),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1.0, 30.0]),
)
def test_adaptive_ratios_keep_the_total(layers, neurons, multiple, ratio, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(neurons, generator=generator).exp() * spread for _ in range(2 * layers)]
    plan = TaskPlan.from_scores(generation=scores[:layers], understanding=scores[layers:], ratio=0.1, multiple=multiple)
    uniform, adaptive = plan.with_ratio(ratio), plan.with_adaptive_ratios(ratio)
    assert sum(adaptive.kept_counts) == sum(uniform.kept_counts)
    assert min(adaptive.kept_counts) >= 1 and adaptive.ratio == ratio
    if multiple <= neurons:
        assert all(count % multiple == 0 for count in adaptive.kept_counts)
    else:
        assert adaptive.kept_counts == uniform.kept_counts
    assert adaptive.with_ratio(ratio).kept_counts == uniform.kept_counts


def test_adaptive_ratios_give_more_to_layers_that_stand_out():
    even = torch.linspace(1, 2, 64)  # half its neurons are above the mean
    peaked = torch.cat([torch.full((60,), 1.0), torch.full((4,), 50.0)])  # four matter, the rest are equal
    plan = TaskPlan.from_scores(generation=[even, peaked], ratio=0.5, multiple=4).with_adaptive_ratios()
    # Standardized, the plain neurons of the peaked layer score -0.258, and 37 of the even layer score more. The budget of 64
    # goes to these, to the 4 peaks, and to 23 of the plain ones: 37 and 27, in fours 36 and 28.
    even_layer = (even - even.mean()) / even.std(correction=0)
    assert int((even_layer > -((4 / 60) ** 0.5)).sum()) == 37
    assert plan.kept_counts == (36, 28) and set(range(60, 64)) <= set(plan.kept("generation", 1).tolist())
    both = TaskPlan.from_scores(generation=[even, peaked], understanding=[even, peaked], ratio=0.5, multiple=4)
    assert both.with_adaptive_ratios().kept_counts == (36, 28)
    opposed = TaskPlan.from_scores(generation=[even, peaked], understanding=[peaked, even], ratio=0.5, multiple=4)
    assert opposed.with_adaptive_ratios().kept_counts == (32, 32)


def test_each_layer_keeps_its_best_by_a_ratio_of_its_own():
    given = scores()
    plan = TaskPlan.from_scores(generation=given, multiple=16).with_ratios([0.25, 0.5, 0.0])
    for layer, count in enumerate((192, 128, 256)):
        best = sorted(range(256), key=lambda neuron, layer=layer: -float(given[layer][neuron]))[:count]
        assert plan.kept("generation", layer).tolist() == sorted(best)


def test_bad_ratios_are_named():
    plan = TaskPlan.from_scores(generation=scores(), multiple=16)
    for ratios, message in (
        ([0.1], "ratios: expected one for each of 3 layers, got 1"),
        ([0.1, 0.2, 1.0], r"ratios\[2\]: expected a number in \[0, 1\), got 1.0"),
        ([0.1, 0.2, "x"], r"ratios\[2\]: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.with_ratios(ratios)


# ---- hostile files


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


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_still_a_valid_plan(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    if data.draw(st.booleans()):
        write(path, {"score.generation": torch.rand(2, 16)}, GOOD)
    else:
        measured_plan(neurons=16, multiple=4).with_ratios([0.2, 0.4]).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        plan = TaskPlan.load(path)
    except ValueError:
        return
    task = plan.tasks[0]
    assert torch.isfinite(plan.scores[task]).all()
    assert [len(plan.kept(task, layer)) for layer in range(plan.layers)] == list(plan.kept_counts)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    plan = TaskPlan.from_scores(generation=scores())
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


@pytest.mark.parametrize("given", [torch.rand(3, 128), torch.rand(3, 128).double().numpy()])
def test_scores_of_all_layers_may_be_one_tensor_or_array(given):
    plan = TaskPlan.from_scores(generation=given)
    assert torch.equal(plan.scores["generation"], torch.as_tensor(given).float())


def test_its_repr_is_short():
    plan = TaskPlan.from_scores(generation=torch.rand(8, 64), captions=torch.rand(8, 64), ratio=0.25, multiple=16)
    assert repr(plan) == "TaskPlan(generation, captions: 48 of 64 neurons kept in each of 8 layers)"
    assert "16 to 64 of 64" in repr(plan.with_ratios([0.75] + [0.0] * 7))
    long = TaskPlan.from_scores(**{"\x1b" * 3000: torch.rand(1, 64)})
    assert len(repr(long)) < 300 and repr(long).isprintable()
