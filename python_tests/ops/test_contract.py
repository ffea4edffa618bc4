"""The contract of every op with every option: schema, compilation, errors, layouts, ownership, out=, threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.guard import Guarded
from support.inputs import CSRC, SAID, spread
from support.inputs import tensors_of as given
from support.op_case import DTYPES, OpCase, tensors
from support.ops_cases import CASES, FIRST
from torch import Tensor
from torch.testing._internal.optests import opcheck

from flashu_ext import ops

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_op = pytest.mark.parametrize("case", FIRST, ids=repr)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
REFUSED = (ValueError, TypeError, IndexError, NotImplementedError)


def outcome(case: OpCase, arguments: dict[str, Any]) -> list[Tensor]:
    """Results and written arguments of a call."""
    result = tensors(case.function(**arguments))
    return [t.clone() for t in result + [arguments[name] for name in case.inplace]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_op_has_a_case():
    assert sorted(case.name for case in FIRST) == sorted(ops.OPS)


def laid_out(case: OpCase, arguments: dict[str, Any], turn: int) -> dict[str, Guarded]:
    layout = {"contiguous": case.contiguous, "folding": case.folding, "strided": case.strided}
    return spread(arguments, turn, **layout)


def test_the_edges_are_those_of_the_sources():
    """The sizes in support/inputs.py must equal those in the kernel sources."""
    for file, words in SAID.items():
        text = (CSRC / file).read_text()
        assert not [word for word in words if word not in text], f"{file}: {words}"


@every_case
def test_opcheck(case: OpCase):
    opcheck(case.overload, tuple(case.schema(case.make(torch.float32)).values()))


@every_op
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_opcheck_of_other_dtypes(case: OpCase, dtype: torch.dtype):
    opcheck(case.overload, tuple(case.schema(case.make(dtype)).values()))


@every_case
def test_torch_compile_gives_the_same_bits_in_one_graph(case: OpCase):
    expected = outcome(case, case.make(torch.float32))
    arguments = case.make(torch.float32)
    torch.compiler.reset()
    result = tensors(torch.compile(case.function, fullgraph=True, backend="aot_eager")(**arguments))
    assert same(result + [arguments[name] for name in case.inplace], expected)


@every_case
@every_dtype
def test_equals_plain_torch_in_that_dtype(case: OpCase, dtype: torch.dtype):
    ours = outcome(case, case.make(dtype))
    arguments = case.make(dtype)
    theirs = tensors(case.oracle(**arguments)) + [arguments[name] for name in case.inplace]
    for y, t in zip(ours, theirs, strict=True):
        assert y.dtype == t.dtype and y.shape == t.shape
        torch.testing.assert_close(y, t, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@every_case
@every_dtype
@pytest.mark.parametrize("turn", [0, 1])
def test_a_layout_of_its_own_for_every_argument(case: OpCase, dtype: torch.dtype, turn: int):
    """Padded, shifted and strided tensors give the bits of dense ones; the memory around them is neither read nor written."""
    expected = outcome(case, case.make(dtype))
    guards = laid_out(case, case.make(dtype), turn)
    before = {name: g.tensor.clone() for name, g in guards.items()}
    arguments = {**case.make(dtype), **{name: g.tensor for name, g in guards.items()}}
    assert same(outcome(case, arguments), expected)
    for name, guarded in guards.items():
        guarded.check()
        if name not in case.inplace:
            assert torch.equal(guarded.tensor, before[name]), f"{name} was written"


@every_case
@pytest.mark.parametrize("spread_out", [False, True], ids=["dense", "laid out"])
def test_results_do_not_depend_on_later_changes_of_arguments(case: OpCase, spread_out: bool):
    """Overwriting the arguments after a call does not change its results: they share no memory."""
    arguments = case.make(torch.float32)
    if spread_out:
        arguments |= {name: g.tensor for name, g in laid_out(case, arguments, 1).items()}
    result = tensors(case.function(**arguments))
    written = [arguments[name] for name in case.inplace]
    fresh = [t for t in result if not any(t is w for w in written)]
    assert fresh or any(t is w for t in result for w in written), "an in-place op returns the tensor it wrote"
    kept = [t.clone() for t in fresh]
    for name, tensor in given(arguments).items():
        storage = tensor.untyped_storage().data_ptr()
        assert not any(t.untyped_storage().data_ptr() == storage for t in fresh if t.numel()), f"{name} is given back"
        tensor.fill_(3)
    assert same(fresh, kept)
    assert same(outcome(case, case.make(torch.float32)), outcome(case, case.make(torch.float32))), "next calls"


@every_case
def test_results_do_not_depend_on_the_number_of_threads(case: OpCase):
    def wide(arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outcome(case, wide(case.make(torch.float32)))
        torch.set_num_threads(4)
        four = outcome(case, wide(case.make(torch.float32)))
    finally:
        torch.set_num_threads(threads)
    assert same(one, four)


def _wrong(name: str, tensor: Tensor, case: OpCase) -> dict[str, Tensor]:
    """Invalid variants of an argument."""
    wrong = {
        "dtype": tensor.to(torch.complex64),
        "integer": tensor.to(torch.int32) if tensor.is_floating_point() else tensor.to(torch.float32),
        "double": tensor.double() if name != "acc" else tensor.half(),
    }
    if len(given(case.make(torch.float32))) > 1:  # a call with only meta tensors is valid and gives a meta tensor
        wrong["device"] = tensor.to("meta")
    if name != "step":  # one element in any shape
        wrong["rank"] = tensor.expand(1, 1, 1, 1, 1, *tensor.shape)
        # One entry more, where a size must match another argument's.
        free = {
            ("value_norms", "v"),
            ("select_topk", "scores"),
            ("select_threshold", "scores"),
            ("taylor_predict", "state"),
        }
        free |= {("gathered_down", "w_down"), ("gather_rows", "rows")}
        if (case.name, name) not in free and name != "index":
            wrong["size"] = torch.cat([tensor, tensor[..., :1]], dim=-1)
        if tensor.shape[-1] > 1 and tensor.is_floating_point() and tensor.dim() > 1:
            wrong["inner stride"] = tensor.repeat_interleave(2, -1)[..., ::2]
    return wrong


TENSOR_ARGUMENTS = [(case, name) for case in FIRST for name in given(case.make(torch.float32))]


@pytest.mark.parametrize(("case", "name"), TENSOR_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_a_wrong_tensor_is_named_and_nothing_is_written(case: OpCase, name: str):
    expected = outcome(case, case.make(torch.float32))
    for kind, bad in _wrong(name, case.make(torch.float32)[name], case).items():
        arguments = {**case.make(torch.float32), name: bad}
        before = {n: t.clone() for n, t in given(arguments).items()}
        foldable = kind == "inner stride" and name not in case.inplace and _copies(case, arguments)
        if foldable:
            continue
        try:
            case.function(**arguments)
            pytest.fail(f"{kind} was accepted")
        except REFUSED as error:
            text = str(error)
        assert case.name in text and "expected" in text, f"{kind}: {text}"
        assert any(f"{n}:" in text or f"{n}[0]:" in text for n in arguments), f"{kind}: {text}"
        for n, tensor in given(arguments).items():
            if tensor.device.type != "meta":
                assert torch.equal(tensor, before[n]), f"{kind}: {n} was written"
        assert same(outcome(case, case.make(torch.float32)), expected), "the next valid call is affected"


def _no_tensors(tensor: Tensor) -> dict[str, tuple[Any, str]]:
    """What is given in place of a tensor, and what the error says that it got."""
    return {
        "nothing": (None, "a tensor.*got NoneType"),
        "list": (tensor.tolist() if tensor.dim() else [3], "a tensor, got list"),
        "array": (np.ones((2000, 100)), "a tensor, got ndarray"),
        "text": ("x", "a tensor.*got str"),
        "sparse": (tensor.to_sparse(), "a dense tensor, got layout torch.sparse_coo"),
        "short": (tensor.to(torch.int16), "(int8|float32|int64|int32 or int64).*, got int16"),
    }


@pytest.mark.parametrize(("case", "name"), TENSOR_ARGUMENTS, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_what_is_no_tensor_is_named_in_a_short_error(case: OpCase, name: str):
    """torch's own errors hold the argument's contents, or every backend that there is."""
    optional = {a.name for a in case.overload._schema.arguments if str(a.type) == "Optional[Tensor]"}
    for kind, (bad, message) in _no_tensors(case.make(torch.float32)[name]).items():
        arguments = {**case.make(torch.float32), name: bad}
        if (kind == "nothing" and name in optional) or (name in ("index", "step") and kind in ("list", "array")):
            continue
        before = {n: t.clone() for n, t in given(arguments).items()}
        with pytest.raises(TypeError, match=f"{name}: expected {message}") as raised:
            case.function(**arguments)
        assert len(str(raised.value)) < 120, kind
        assert all(torch.equal(t.to_dense(), before[n].to_dense()) for n, t in given(arguments).items()), kind
    assert outcome(case, case.make(torch.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.rms_norm(x, x[0], "a"), "rms_norm: eps: expected a number, got str"),
        (lambda x: ops.select_topk(x, 2.5), "select_topk: k: expected an integer, got float"),
        (lambda x: ops.select_topk(x, 2**70), "select_topk: k: expected an integer of 64 bits, got one of 71"),
        (lambda x: ops.select_topk(x, 1, index=[1], count=[1]), "select_topk: index: expected a tensor, got list"),
        (lambda x: ops.rms_norm(x, x[0], 1e-6, out=x.numpy()), "rms_norm: out: expected a tensor, got ndarray"),
        (lambda x: ops.feature_delta(x, x, out=x.to_sparse()), "feature_delta: out: expected a dense tensor"),
        (
            lambda x: ops.gathered_ffn(x, x, x, x, selection=[(0, 4)]),
            "expected a flashu_ext.ops.selection.Selection, got builtins.list",
        ),
        (
            lambda x: ops.gathered_ffn(x, x, x, x, runs=[(2**63, 4)]),
            "runs: expected integers of 64 bits, got one of 64",
        ),
        (lambda x: ops.gathered_ffn(x, [1], x, x, index=[0]), "gathered_ffn: w_gate: expected a tensor, got list"),
    ],
)
def test_other_wrong_kinds_are_named(call: Any, message: str):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call(torch.ones(4, 4))


def test_rows_are_moved_by_lists_and_arrays_too():
    rows, numbers = torch.randn(5, 8), [3, 0, -1]
    expected = ops.gather_rows(rows, torch.tensor(numbers))
    for index in (numbers, np.array(numbers), np.array(numbers, dtype=np.int32)):
        assert torch.equal(ops.gather_rows(rows, index), expected)
        for scatter in (ops.scatter_rows_, ops.scatter_add_rows_):
            mine, theirs = rows.clone(), rows.clone()
            assert torch.equal(scatter(mine, index, expected), scatter(theirs, torch.tensor(numbers), expected))
    with pytest.raises(TypeError, match="gather_rows: index: expected int32 or int64, got float64"):
        ops.gather_rows(rows, np.ones(3))
    with pytest.raises(TypeError, match="index: expected a tensor or a list of integers, got str"):
        ops.gather_rows(rows, "ab")


def _copies(case: OpCase, arguments: dict[str, Any]) -> bool:
    """Whether the op accepts this layout: the torch adapters copy inputs that cannot be read by a row stride."""
    try:
        case.function(**arguments)
    except REFUSED:
        return False
    return True


WITH_OUT = [case for case in CASES if not case.inplace and not case.name.startswith("select_")]


@pytest.mark.parametrize("case", WITH_OUT, ids=repr)
@every_dtype
def test_out_is_filled_and_returned(case: OpCase, dtype: torch.dtype):
    expected = case.function(**case.make(dtype))
    arguments = case.make(dtype)
    guards = laid_out(case, arguments, 0)
    padding = 0 if "out" in case.contiguous else 9
    gap = 0 if "out" in (*case.contiguous, *case.folding) else 4
    guarded = Guarded(torch.zeros_like(expected), padding, gap=gap, offset=1, odd_ones=True)
    arguments |= {name: g.tensor for name, g in guards.items()}
    assert case.function(**arguments, out=guarded.tensor) is guarded.tensor
    assert torch.equal(guarded.tensor, expected)
    guarded.check()


@pytest.mark.parametrize("case", WITH_OUT, ids=repr)
def test_out_is_filled_by_a_compiled_call(case: OpCase):
    expected = case.function(**case.make(torch.float32))
    out = torch.zeros_like(expected)
    torch.compiler.reset()
    torch.compile(case.function, fullgraph=True, backend="aot_eager")(**case.make(torch.float32), out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", [case for case in WITH_OUT if not case.option], ids=repr)
def test_wrong_out_is_refused_by_a_compiled_call(case: OpCase):
    """A copy would convert and spread the result."""
    expected = case.function(**case.make(torch.float32))
    for out in (torch.zeros_like(expected, dtype=torch.float64), expected.new_zeros(2, *expected.shape)):
        torch.compiler.reset()
        with pytest.raises((*REFUSED, torch._dynamo.exc.Unsupported, RuntimeError), match=r"out: expected|exception"):
            torch.compile(case.function, fullgraph=True, backend="eager")(**case.make(torch.float32), out=out)
        assert not out.any()


@pytest.mark.parametrize("case", [case for case in WITH_OUT if not case.option], ids=repr)
def test_wrong_out_is_refused(case: OpCase):
    expected = case.function(**case.make(torch.float32))
    wrong = [expected.to(torch.float64), expected.new_empty(*expected.shape, 1), expected.to("meta")]
    arguments = case.make(torch.float32)
    for tensor in given(arguments).values():
        if tensor.numel() >= max(1, expected.numel()) and tensor.dtype == expected.dtype and tensor.is_contiguous():
            wrong.append(tensor.view(-1)[: expected.numel()].view(expected.shape))
    for out in wrong:
        with pytest.raises(REFUSED, match="expected"):
            case.function(**arguments, out=out)


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("select_")], ids=repr)
def test_selection_outputs(case: OpCase):
    index, count = case.function(**case.make(torch.float32))
    mine, counts = torch.zeros_like(index), torch.zeros_like(count)
    case.function(**case.make(torch.float32), index=mine, count=counts)
    assert torch.equal(mine, index) and torch.equal(counts, count)
    with pytest.raises(ValueError, match="index"):
        case.function(**case.make(torch.float32), count=counts)
    with pytest.raises(ValueError, match="count"):
        case.function(**case.make(torch.float32), index=mine)
    with pytest.raises(REFUSED, match="count"):
        case.function(**case.make(torch.float32), index=mine, count=counts.long())


@every_op
def test_is_supported_agrees_with_the_op(case: OpCase):
    for dtype in DTYPES:
        assert case.function.is_supported("cpu", dtype)
    assert not case.function.is_supported("cpu", torch.int8)
    assert not case.function.is_supported("meta", torch.float32)
