"""Tests of the neuron layout: contiguous sets, invertible permutation, any number of tasks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashu_ext.planning.neurons import NeuronLayout, aligned_sets, runs_of


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.sets(st.integers(0, n - 1)), min_size=0, max_size=4))
    )
)
def test_layout_holds_every_set(case):
    intermediate, sets = case
    named = {f"task{i}": torch.tensor(sorted(s), dtype=torch.int64) for i, s in enumerate(sets)}
    layout = NeuronLayout.build(intermediate, named)
    assert sorted(layout.permutation.tolist()) == list(range(intermediate))
    assert torch.equal(layout.permutation[layout.inverse.long()].long(), torch.arange(intermediate))
    for i, (task, index) in enumerate(named.items()):
        assert torch.equal(layout.kept(task), index)
        if i < 2:
            assert len(layout.runs[task]) <= 1, "the first two tasks are one contiguous range each"


def best(score, count):
    """The oracle: by score, of equal ones the lower index."""
    return set(sorted(range(len(score)), key=lambda n: (-float(score[n]), n))[:count])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([64, 128, 192, 16, 48, 8, 1]),  # multiple
    st.integers(1, 12),  # kept, in multiples
    st.integers(0, 900),  # neurons besides these
    st.integers(1, 4),  # tasks
    st.sampled_from(["random", "alike", "equal"]),
    st.integers(0, 2**31),
)
def test_runs_start_and_end_at_multiples(multiple, units, more, tasks, kind, seed):
    unit = {64: 64, 128: 64, 192: 64, 16: 16, 48: 16, 8: 8, 1: 1}[multiple]
    count, intermediate = units * multiple, units * multiple + more
    generator = torch.Generator().manual_seed(seed)
    common = torch.rand(intermediate, generator=generator)
    own = {"random": 1.0, "alike": 0.1, "equal": 0.0}[kind]
    scores = {f"task{t}": common + own * torch.rand(intermediate, generator=generator) for t in range(tasks)}
    sets = aligned_sets(scores, count, multiple)
    layout = NeuronLayout.build(intermediate, sets)
    whole = intermediate % unit == 0
    for number, (task, score) in enumerate(scores.items()):
        assert len(set(sets[task].tolist())) == count == sets[task].numel()
        for start, length in layout.runs[task]:
            assert start % unit == 0 and length % unit == 0
        exchanged = len(best(score, count) - set(sets[task].tolist()))
        blocks = 2**number
        assert exchanged <= (0 if number == 0 else blocks * unit // 4 * (1 if whole else 2))
    for task in list(scores)[:2]:
        assert len(layout.runs[task]) == 1


def test_a_further_task_gives_up_its_least_neurons_for_its_next_best():
    first = torch.arange(256.0).flip(0)  # keeps 0 to 127
    second = torch.arange(256.0).roll(-28)  # 255 is at 227: keeps 100 to 227
    sets = aligned_sets({"first": first, "second": second}, 128, 64)
    # 28 of its best are the first task's: none is nearer than 64, so the next best of the others come for them.
    assert sets["first"].tolist() == list(range(128))
    assert len(best(second, 128) & set(range(128))) == 28
    others = best(second[128:], 128)
    assert {n - 128 for n in sets["second"].tolist()} == others
    assert NeuronLayout.build(256, sets).runs == {"first": ((0, 128),), "second": ((128, 128),)}


def test_sets_that_are_no_multiples_are_as_scored():
    generator = torch.Generator().manual_seed(1)
    scores = {task: torch.rand(40, generator=generator) for task in "ab"}
    sets = aligned_sets(scores, 33, 64)  # fewer neurons than the multiple
    assert all(set(sets[task].tolist()) == best(scores[task], 33) for task in "ab")


def test_published_counts_are_multiples():
    generator = torch.Generator().manual_seed(2)
    for intermediate, count in ((8960, 7168), (18944, 15104)):
        scores = {task: torch.rand(intermediate, generator=generator) for task in ("generation", "understanding")}
        sets = aligned_sets(scores, count, 64)
        runs = NeuronLayout.build(intermediate, sets).runs
        assert runs["generation"] == ((0, count),)
        ((start, length),) = runs["understanding"]
        assert start % 64 == 0 and length == count
        assert len(best(scores["understanding"], count) - set(sets["understanding"].tolist())) <= 32


def test_runs_are_maximal_and_ascending():
    assert runs_of(torch.tensor([0, 1, 2, 5, 7, 8])) == ((0, 3), (5, 1), (7, 2))
    assert runs_of(torch.tensor([], dtype=torch.int64)) == ()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [([0, 8], IndexError, r"in \[0, 8\), got 8"), ([-1], IndexError, "got -1"), ([3, 3], ValueError, "1 repeats")],
)
def test_bad_sets_are_refused(index, error, message):
    with pytest.raises(error, match=message):
        NeuronLayout.build(8, {"generation": torch.tensor(index)})
