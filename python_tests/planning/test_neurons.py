"""Tests of the neuron layout: contiguous sets, invertible permutation, any number of tasks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashu_ext.planning.neurons import NeuronLayout, runs_of


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
