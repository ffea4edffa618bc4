"""What autograd meets in every op: gradients, saved tensors, tangents, torch.func, inference tensors, torch.compile.

No op has a gradient. What would lose one silently raises by name, and then nothing has been written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.inputs import tensors_of
from support.op_case import OpCase, tensors
from support.ops_cases import CASES
from torch import Tensor
from torch.autograd import forward_ad

from flashu_ext import ops

FREE: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
RECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda t: t.requires_grad_(),
    "result": lambda t: t.requires_grad_() * 1,
    "view of a leaf": lambda t: t.requires_grad_()[...],
    "view of a result": lambda t: (t.requires_grad_() * 1)[...],
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, t: torch.func.grad(f)(t),
    "vjp": lambda f, t: torch.func.vjp(f, t),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (torch.ones_like(t),)),
    "vmap": lambda f, t: torch.func.vmap(f)(t[None]),
    "vmap over another": lambda f, t: torch.func.vmap(lambda _: f(t))(torch.zeros(2)),
}


@dataclass(frozen=True)
class Call:
    """A call of an op's function with everything it writes into: in place, or into outputs that are given."""

    case: OpCase
    outputs: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        given = self.case.make(torch.float32)
        if self.outputs:
            given |= zip(self.outputs, tensors(self.case.function(**given)), strict=True)
        return given

    def __call__(self, arguments: dict[str, Any]) -> list[Tensor]:
        return tensors(self.case.function(**arguments))

    @property
    def written(self) -> tuple[str, ...]:
        return self.case.inplace + self.outputs

    @property
    def floating(self) -> list[str]:
        return [name for name, tensor in tensors_of(self.arguments()).items() if tensor.is_floating_point()]

    def __repr__(self) -> str:
        return f"{self.case} into {', '.join(self.outputs)}" if self.outputs else repr(self.case)


def _calls() -> list[Call]:
    """One of every op and every set of tensors that it writes."""
    first = list({(case.name, case.inplace): case for case in reversed(CASES)}.values())[::-1]
    outputs = [("index", "count") if case.name.startswith("select_") else ("out",) for case in first]
    into = [Call(c, o) for c, o in zip(first, outputs, strict=True) if not c.inplace or c.name == "rotary_cache_"]
    return [Call(case) for case in first] + into


CALLS = _calls()
WRITING = [call for call in CALLS if call.written]
every_call = pytest.mark.parametrize("call", CALLS, ids=repr)
every_writing = pytest.mark.parametrize("call", WRITING, ids=repr)
every_argument = pytest.mark.parametrize(
    ("call", "name"), [(c, n) for c in CALLS for n in c.floating], ids=lambda x: x if isinstance(x, str) else repr(x)
)


def values(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(arguments).items()}


def versions(arguments: dict[str, Any]) -> dict[str, int]:
    return {name: tensor._version for name, tensor in tensors_of(arguments).items()}


def refused(call: Call, arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """The call raises, and neither a value nor a version has changed."""
    before, counted = values(arguments), versions(arguments)
    with pytest.raises(kind, match=text):
        call(arguments)
    for name, tensor in tensors_of(arguments).items():
        assert torch.equal(tensor.detach(), before[name]), f"{name} was written"
    assert versions(arguments) == counted


def test_every_op_and_every_overload_is_here():
    assert {call.case.name for call in CALLS} == set(ops.OPS)
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("flashu::")]
    called = {call.case.overload.name() + (".out" if call.outputs else "") for call in CALLS}
    without_tensors = {"flashu::build_facts", "flashu::explain_ffn", "flashu::explain_gemm"}
    assert {*names} - without_tensors == called | {"flashu::list_neurons"}


# ---- gradients


@every_argument
@pytest.mark.parametrize("kind", RECORDED)
def test_a_gradient_is_refused_and_never_lost(call: Call, name: str, kind: str):
    """Before an op writes; in the backward of one that does not."""
    arguments = call.arguments()
    arguments[name] = RECORDED[kind](arguments[name])
    if call.written:
        refused(
            call, arguments, NotImplementedError, rf"flashu::{call.case.packet or call.case.name}\S*: {name}: .*no_grad"
        )
        return
    expected = call(call.arguments())
    results = call(arguments)
    assert all(torch.equal(r.detach(), e) for r, e in zip(results, expected, strict=True))
    assert [r.requires_grad for r in results] == [r.is_floating_point() for r in results]
    for result in results:
        if result.requires_grad:
            with pytest.raises(NotImplementedError, match=rf"flashu::{call.case.name} has no backward"):
                result.sum().backward()


@every_call
@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("free", FREE)
def test_without_gradients_everything_goes(call: Call, kind: str, free: str):
    expected = call.arguments()
    results = call(expected)
    arguments = call.arguments()
    arguments |= {name: RECORDED[kind](arguments[name]) for name in call.floating}
    with FREE[free]():
        ours = call(arguments)
    assert all(torch.equal(a.detach(), b) for a, b in zip(ours, results, strict=True))
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(arguments[name].detach(), tensor)


# ---- saved tensors


@every_writing
@pytest.mark.parametrize("mode", [nullcontext, *FREE.values()], ids=["grad", *FREE])
def test_versions_count_what_was_written(call: Call, mode: Callable[[], AbstractContextManager[None]]):
    arguments = call.arguments()
    before = versions(arguments)
    with mode():
        call(arguments)
    assert {n for n, version in versions(arguments).items() if version == before[n] + 1} == {*call.written}
    assert {n for n, version in versions(arguments).items() if version != before[n]} == {*call.written}


SAVED = [(c, n) for c in WRITING for n in c.written if n in c.floating]


@pytest.mark.parametrize(("call", "name"), SAVED, ids=lambda x: x if isinstance(x, str) else repr(x))
@pytest.mark.parametrize("detached", [False, True], ids=["itself", "detached"])
def test_an_overwritten_saved_tensor_raises_in_its_backward(call: Call, name: str, detached: bool):
    arguments = call.arguments()
    saved = arguments[name].requires_grad_().exp()  # exp saves its result
    arguments[name] = saved.detach() if detached else saved
    with nullcontext() if detached else torch.no_grad():
        call(arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize(("call", "name"), [(c, n) for c in WRITING for n in c.written], ids=repr)
@pytest.mark.parametrize("wrong", ["expanded", "of six dimensions"])
def test_what_cannot_be_written_is_refused_as_ever(call: Call, name: str, wrong: str):
    """Memory that overlaps itself, and another rank; then no version counts."""
    arguments = call.arguments()
    tensor = arguments[name]
    expanded = tensor.new_ones(()).expand(tensor.shape)
    arguments[name] = expanded if wrong == "expanded" else tensor.expand(1, 1, 1, 1, 1, *tensor.shape)
    refused(call, arguments, ValueError, f"{call.case.name}: .*: expected")


# ---- forward mode and torch.func


@every_argument
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad], ids=["grad", "no_grad"])
def test_a_tangent_is_refused(call: Call, name: str, mode: Callable[[], AbstractContextManager[None]]):
    with forward_ad.dual_level(), mode():
        arguments = call.arguments()
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        refused(
            call, arguments, NotImplementedError, f"{call.case.name}.*: {name}: expected a tensor without a tangent"
        )


@every_call
def test_a_level_without_tangents_changes_nothing(call: Call):
    expected = call(call.arguments())
    with forward_ad.dual_level():
        results = call(call.arguments())
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


@every_call
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_torch_func_is_refused(call: Call, transform: str):
    arguments = call.arguments()
    name = call.floating[0]

    def function(tensor: Tensor) -> Tensor:
        return call(arguments | {name: tensor})[0].sum()

    before = values(arguments)
    with pytest.raises(
        NotImplementedError, match=rf"flashu::{call.case.name}\S*: expected a call outside of torch.func"
    ):
        TRANSFORMS[transform](function, arguments[name])
    assert all(torch.equal(tensor, before[n]) for n, tensor in tensors_of(arguments).items())


# ---- inference tensors


@pytest.mark.parametrize(("call", "name"), [(c, n) for c in WRITING for n in c.written], ids=repr)
def test_an_inference_tensor_is_written_in_inference_mode_only(call: Call, name: str):
    expected = call.arguments()
    call(expected)
    arguments = call.arguments()
    with torch.inference_mode():
        arguments[name] = arguments[name].clone()
    with pytest.raises(RuntimeError, match=rf"flashu::{call.case.name}\S*: {name}: expected an ordinary tensor"):
        call(arguments)
    assert all(torch.equal(t, call.arguments()[n]) for n, t in tensors_of(arguments).items() if n not in call.outputs)
    with torch.inference_mode():
        call(arguments)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in tensors_of(arguments).items())


@every_call
def test_inference_tensors_are_read_anywhere(call: Call):
    expected = call(call.arguments())
    with torch.inference_mode():
        read = {n: t.clone() for n, t in tensors_of(call.arguments()).items() if n not in call.written}
    assert all(torch.equal(r, e) for r, e in zip(call(call.arguments() | read), expected, strict=True))


# ---- torch.compile


# torch.compile takes no operator that returns two of its own arguments.
TRACED = [call for call in CALLS if "index" not in call.outputs]
DIFFERENTIABLE = [call for call in TRACED if not call.case.name.startswith("select_")]
every_traced = pytest.mark.parametrize("call", TRACED, ids=repr)


def compiled(call: Call) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(call.case.function, fullgraph=True, backend="aot_eager")


@every_traced
def test_compiled_without_gradients_everything_goes(call: Call):
    expected = call.arguments()
    results = call(expected)
    arguments = call.arguments()
    arguments |= {name: arguments[name].requires_grad_() for name in call.floating}
    with torch.no_grad():
        ours = tensors(compiled(call)(**arguments))
    assert all(torch.equal(a.detach(), b) for a, b in zip(ours, results, strict=True))
    assert all(torch.equal(arguments[name].detach(), tensor) for name, tensor in tensors_of(expected).items())


@pytest.mark.parametrize("call", DIFFERENTIABLE, ids=repr)
@pytest.mark.filterwarnings("ignore:Error detected in _NoBackward")
@pytest.mark.parametrize("kind", ["leaf", "result"])
def test_compiled_a_gradient_is_refused_and_never_lost(call: Call, kind: str):
    arguments = call.arguments()
    name = call.floating[0]
    arguments[name] = RECORDED[kind](arguments[name])
    before = values(arguments)
    with pytest.raises(Exception, match="has no backward"):
        sum(t.sum() for t in tensors(compiled(call)(**arguments)) if t.requires_grad).backward()
    assert all(torch.equal(tensor.detach(), before[n]) for n, tensor in tensors_of(arguments).items())


def test_dynamo_does_not_compile_what_stands_in_front_of_a_kernel():
    """A frame that Dynamo gives up calls an op eagerly; it may not go on with the Python in the dispatcher."""

    def frames(op: Any, *arguments: Any, **outputs: Tensor) -> int:
        def given_up(x: Tensor) -> Any:
            for _ in range(1):
                try:  # no graph break can be resumed here
                    return op(x, *arguments, **outputs), print()
                finally:
                    pass

        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(given_up, backend="eager")(torch.ones(4, 8))
        return torch._dynamo.utils.counters["frames"]["total"]

    assert ops.rms_norm is not None
    rms_norm, weight = torch.ops.flashu.rms_norm, torch.ones(8)
    plain = frames(torch.ops.aten.neg.default)
    assert frames(rms_norm.default, weight, 1e-6) == plain
    assert frames(rms_norm.out, weight, 1e-6, out=torch.empty(4, 8)) == plain
