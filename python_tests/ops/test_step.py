"""Step: the Euler step compared with upstream's unpatchify, feature distances, and extrapolation."""

from __future__ import annotations

import pytest
import torch
from support.inputs import DELTA_CHUNK, GRAIN, around, randn
from support.op_case import DTYPES
from support.tolerance import assert_accurate

from flashu_ext import ops
from flashu_ext.ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


S, DT = torch.tensor([1.5, 5.0, 0.0]), torch.tensor([0.01, 0.2, 1.0])


@every_dtype
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("step", [0, 2])
def test_euler_step(step: int, guided: bool, dtype: torch.dtype):
    images, channels, grid, patch = 3, 16, 5, 2
    latents = randn(1, images, channels, grid * patch, grid * patch, dtype=dtype)
    v = randn(2, images * (2 if guided else 1), grid * grid, patch * patch * channels, dtype=dtype)
    truth_velocity = torch.empty(latents.shape, dtype=torch.float64)
    truth = reference.guided_euler_step_(
        latents.double(), v.double(), S.double(), DT.double(), step, velocity=truth_velocity
    )
    ours, velocity = latents.clone(), torch.empty_like(latents)
    assert ops.guided_euler_step_(ours, v, S, DT, torch.tensor(step), velocity=velocity) is ours
    torchs, torch_velocity = latents.clone(), torch.empty_like(latents)
    reference.guided_euler_step_(torchs, v, S, DT, step, velocity=torch_velocity)
    assert_accurate(ours, truth, torchs)
    assert_accurate(velocity, truth_velocity, torch_velocity)


def test_euler_step_lays_patches_out_as_upstream():
    """Source: upstream unpatchify: [tokens, p, p, c] read as [H, W, c]."""
    v = randn(1, 1, 9, 4 * 2)
    latents = torch.zeros(1, 2, 6, 6)
    ops.guided_euler_step_(latents, v, S, torch.ones(3), 0)
    assert torch.equal(latents, v.reshape(1, 6, 6, 2).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_euler_step_mixes_storage_types(pair: tuple[torch.dtype, torch.dtype]):
    latents, v = randn(1, 2, 4, 2, 2, dtype=pair[0]), randn(2, 4, 1, 16, dtype=pair[1])
    expected = reference.guided_euler_step_(latents.clone(), v, S, DT, 1)
    torch.testing.assert_close(ops.guided_euler_step_(latents, v, S, DT, 1), expected)


@pytest.mark.parametrize("step", [-1, 3])
def test_euler_step_out_of_range(step: int):
    latents = torch.ones(1, 2, 2, 2)
    with pytest.raises(IndexError, match=r"step: expected a number in \[0, 3\)"):
        ops.guided_euler_step_(latents, torch.ones(1, 1, 8), S, DT, step)
    assert (latents == 1).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"v": torch.ones(3, 1, 8)}, "v: expected 1 rows, or 2"),
        ({"v": torch.ones(1, 1, 7)}, "v: expected 8 numbers a row"),
        ({"s": torch.ones(2)}, "dt"),
        ({"latents": torch.ones(1, 2, 2, 2).transpose(2, 3).transpose(1, 2)}, "latents"),
        ({"latents": torch.ones(2, 2, 2)}, "latents: expected 4 dimensions"),
        ({"step": torch.tensor([0, 1])}, "step: expected one element"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_euler_step_errors(change: dict, text: str):
    arguments = {"latents": torch.ones(1, 2, 2, 2), "v": torch.ones(1, 1, 8), "s": S, "dt": DT, "step": torch.tensor(0)}
    if "latents" in change and change["latents"].dim() == 4:
        change["latents"] = torch.ones(1, 2, 2, 4)[..., ::2]
    with pytest.raises(ValueError, match=text):
        ops.guided_euler_step_(**{**arguments, **change})


@pytest.mark.parametrize("shared", ["latents", "v"])
def test_the_velocity_has_memory_of_its_own(shared: str):
    arguments = {"latents": torch.ones(1, 2, 2, 2), "v": torch.ones(1, 1, 8)}
    velocity = arguments[shared].view(1, 2, 2, 2)
    with pytest.raises(ValueError, match=f"velocity: expected memory of its own, got one that overlaps {shared}"):
        ops.guided_euler_step_(**arguments, s=S, dt=DT, step=0, velocity=velocity)
    assert (arguments["latents"] == 1).all() and (arguments["v"] == 1).all()


@every_dtype
@pytest.mark.parametrize("positions", [(1, 1), (2, 75), (127, 129), (128, 129)], ids=str)
def test_euler_step_of_every_size(positions: tuple[int, int], dtype: torch.dtype):
    for images, channels in ((1, 1), (2, 3)):
        latents = randn(1, images, channels, *positions, dtype=dtype)
        v = randn(2, 2 * images, positions[0] * positions[1], channels, dtype=dtype)
        expected = reference.guided_euler_step_(latents.clone(), v, S, DT, 1)
        torch.testing.assert_close(ops.guided_euler_step_(latents, v, S, DT, 1), expected)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(1,), (3, 5), (2, 57, 640), *((3, width) for width in around(DELTA_CHUNK, 2 * DELTA_CHUNK, GRAIN))],
    ids=str,
)
def test_feature_delta(shape: tuple[int, ...], dtype: torch.dtype):
    a, b = randn(1, *shape, dtype=dtype), randn(2, *shape, dtype=dtype)
    ours = ops.feature_delta(a, b)
    wide_a, wide_b = a.double(), b.double()
    expected = torch.stack(
        [
            (wide_a - wide_b).abs().sum() / wide_b.abs().sum(),
            (wide_a - wide_b).norm() / wide_b.norm(),
            torch.cosine_similarity(wide_a.flatten(), wide_b.flatten(), dim=0),
        ]
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)


def test_feature_delta_of_nothing():
    assert ops.feature_delta(torch.zeros(4), torch.zeros(4)).tolist() == [0, 0, 0]
    assert ops.feature_delta(torch.ones(4), torch.zeros(4))[0].isinf()
    assert ops.feature_delta(torch.zeros(0), torch.zeros(0)).tolist() == [0, 0, 0]


@every_dtype
@pytest.mark.parametrize("order", [0, 1, 2, 6, 8])
def test_taylor_runs_like_the_reference(order: int, dtype: torch.dtype):
    ours, theirs = torch.zeros(order + 1, 3, 50, dtype=dtype), torch.zeros(order + 1, 3, 50, dtype=dtype)
    for count in range(order + 2):
        feature = randn(count, 3, 50, dtype=dtype)
        ops.taylor_update_(ours, feature, 2.0, count)
        reference.taylor_update_(theirs, feature, 2.0, count)
        torch.testing.assert_close(ours, theirs)
        predicted = reference.taylor_predict(theirs.double(), 3.0, count + 1)
        assert_accurate(
            ops.taylor_predict(theirs, 3.0, count + 1), predicted, reference.taylor_predict(theirs, 3.0, count + 1)
        )


@every_dtype
def test_taylor_differences_are_of_the_numbers_before_they_are_rounded(dtype: torch.dtype):
    state, feature = randn(1, 3, 40, dtype=dtype), randn(2, 40, dtype=dtype)
    old = state.float().clone()
    ops.taylor_update_(state, feature, 3.0, 2)
    first = (feature.float() - old[0]) / 3.0
    assert torch.equal(state, torch.stack([feature.float(), first, (first - old[1]) / 3.0]).to(dtype))


def test_taylor_is_exact_on_lines():
    state = torch.zeros(2, 1)
    for count, t in enumerate((0.0, 5.0)):
        ops.taylor_update_(state, torch.tensor([3.0 + 2.0 * t]), 5.0, count)
    assert ops.taylor_predict(state, 2.0, 2).item() == 3.0 + 2.0 * 7.0
    assert ops.taylor_predict(state, 2.0, 1).item() == 13.0  # one update: no slope is known


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s, f: ops.taylor_update_(s, f, 0.0, 0), "interval"),
        (lambda s, f: ops.taylor_update_(s, f, float("nan"), 0), "interval"),
        (lambda s, f: ops.taylor_update_(s, f, 1.0, -1), "count"),
        (lambda s, f: ops.taylor_predict(s, 1.0, 0), "count"),
        (lambda s, f: ops.taylor_predict(s, float("inf"), 1), "ahead"),
        (lambda s, f: ops.taylor_update_(torch.zeros(10, 5), f, 1.0, 0), "order"),
        (lambda s, f: ops.taylor_update_(s, s[0], 1.0, 0), "overlaps"),
    ],
)
def test_taylor_errors(call, text: str):
    state = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=text):
        call(state, torch.ones(5))
    assert (state == 0).all()
