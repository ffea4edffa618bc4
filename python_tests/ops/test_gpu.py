"""Every op on a GPU: results, schema, streams, CUDA graphs with changed inputs, torch.compile, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.op_case import DTYPES, OpCase, tensors
from support.ops_cases import CASES, FIRST
from torch import Tensor
from torch.testing._internal.optests import opcheck

from flashu_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not ops.rms_norm.is_supported("cuda", torch.float32), reason="this build has no CUDA kernels"),
]
CPU_ONLY = ("attention",)
every_case = pytest.mark.parametrize("case", [case for case in CASES if case.name not in CPU_ONLY], ids=repr)
every_op = pytest.mark.parametrize("case", [case for case in FIRST if case.name not in CPU_ONLY], ids=repr)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def on_gpu(arguments: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, (Tensor, ops.Selection)) else value
        for name, value in arguments.items()
    }


def outcome(case: OpCase, arguments: dict[str, Any]) -> list[Tensor]:
    result = tensors(case.function(**arguments))
    return [*result, *(arguments[name] for name in case.inplace)]


def changed(case: OpCase, arguments: dict[str, Any]) -> dict[str, Any]:
    """Other values in the tensors whose values are arbitrary."""

    def other(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and name not in case.fixed:
            return value.flip(-1) * 0.5
        return value

    return {name: other(name, value) for name, value in arguments.items()}


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [case for case in FIRST if case.name in CPU_ONLY], ids=repr)
def test_an_op_without_a_kernel_says_so(case: OpCase):
    assert not case.function.is_supported("cuda", torch.float32)
    arguments = case.make(torch.float32)
    with pytest.raises(NotImplementedError, match=f"{case.name}: query: expected a CPU tensor.*got cuda:0"):
        case.function(**{name: None if name in case.fixed else v for name, v in on_gpu(arguments).items()})


@every_case
@every_dtype
def test_gives_what_the_cpu_gives(case: OpCase, dtype: torch.dtype):
    expected = outcome(case, case.make(dtype))
    got = outcome(case, on_gpu(case.make(dtype)))
    for a, b in zip(got, expected, strict=True):
        assert a.is_cuda and a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.cpu(), b, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@every_op
@every_dtype
def test_opcheck(case: OpCase, dtype: torch.dtype):
    opcheck(case.overload, tuple(case.schema(on_gpu(case.make(dtype))).values()))


@every_op
def test_the_same_bits_every_time_and_on_every_stream(case: OpCase):
    first = outcome(case, on_gpu(case.make(torch.bfloat16)))
    for _ in range(3):
        stream = torch.cuda.Stream()
        arguments = on_gpu(case.make(torch.bfloat16))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = outcome(case, arguments)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same(again, first)


@every_op
def test_does_not_synchronise(case: OpCase):
    arguments = on_gpu(case.make(torch.bfloat16))
    outcome(case, on_gpu(case.make(torch.bfloat16)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.function(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_a_graph_is_replayed_with_changed_inputs(case: OpCase):
    """Capture, free everything else, allocate garbage, change the inputs, replay."""
    static = on_gpu(case.make(torch.bfloat16))
    start = {name: value.clone() for name, value in static.items() if isinstance(value, Tensor)}
    outcome(case, on_gpu(case.make(torch.bfloat16)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = outcome(case, static)
    garbage = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    for inputs in (start, changed(case, start)):
        expected = outcome(case, {**static, **{name: value.clone() for name, value in inputs.items()}})
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same([t.clone() for t in result], expected)
    del garbage


@every_op
def test_compiles_with_graphs(case: OpCase):
    expected = outcome(case, on_gpu(case.make(torch.bfloat16)))
    torch.compiler.reset()
    compiled = torch.compile(case.function, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        arguments = on_gpu(case.make(torch.bfloat16))
        result = [t.clone() for t in tensors(compiled(**arguments))]
        assert_same([*result, *(arguments[name] for name in case.inplace)], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
@every_op
def test_second_device(case: OpCase):
    expected = outcome(case, on_gpu(case.make(torch.bfloat16)))
    got = outcome(case, on_gpu(case.make(torch.bfloat16), "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same([t.cpu() for t in got], [t.cpu() for t in expected])


@pytest.mark.parametrize("rows", [1, 4, 16, 17, 200, 1460])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ffn_at_the_shapes_of_the_model(rows: int, dtype: torch.dtype):
    """Compared with fp64, relative to torch's own error in the same dtype."""
    from support.tolerance import assert_accurate

    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    x, gate, up = randn(rows, 1536), randn(8960, 1536, scale=1536**-0.5), randn(8960, 1536, scale=1536**-0.5)
    down, residual = randn(1536, 8960, scale=8960**-0.5), randn(rows, 1536)
    index = torch.randperm(8960, generator=generator, device="cuda")[:7168]
    for selection, at in (
        ({"runs": [0, 7168]}, torch.arange(7168, device="cuda")),
        ({"runs": [8, 3584, 4000, 3584]}, torch.cat([torch.arange(8, 3592), torch.arange(4000, 7584)]).cuda()),
        ({"index": index}, index),
    ):
        wide = [t.double() for t in (x, gate[at], up[at], down[:, at])]
        silu = torch.nn.functional.silu
        truth = silu(wide[0] @ wide[1].T) * (wide[0] @ wide[2].T) @ wide[3].T + residual.double()
        theirs = (silu(x @ gate[at].T) * (x @ up[at].T)) @ down[:, at].T + residual
        assert_accurate(ops.gathered_ffn(x, gate, up, down, **selection, residual=residual), truth, theirs)


def test_a_wrong_call_does_not_spoil_the_context():
    x = torch.randn(4, 64, device="cuda")
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(x, torch.randn(63, device="cuda"), 1e-6)
    with pytest.raises(ValueError, match="device"):
        ops.rms_norm(x, torch.randn(64), 1e-6)
    bad = torch.tensor([0, 10_000, -5], device="cuda")
    ops.gather_rows(x, bad)
    weight = torch.randn(40, 64, device="cuda")
    ops.gathered_swiglu(x, weight, weight, index=bad)
    torch.cuda.synchronize()
    assert ops.rms_norm(x, torch.ones(64, device="cuda"), 1e-6).isfinite().all()
