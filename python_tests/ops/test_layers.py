"""Layers for `kernels.kernelize`: their forward on other modules, which have the state."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from support.inputs import randn
from torch import Tensor, nn

from flashu_ext.ops import Selection, layers, reference


class SwiGLU(nn.Module):
    def __init__(self, bias: bool = False, activation: nn.Module | None = None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 160, bias=bias), nn.Linear(64, 160, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(160, 64, bias=bias), activation or nn.SiLU()
        for seed, parameter in enumerate(self.parameters()):
            parameter.data.copy_(0.2 * randn(seed, *parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def bound(module: nn.Module, layer: type[nn.Module]) -> nn.Module:
    """As kernelize does it."""
    module.forward = MethodType(layer.forward, module)  # type: ignore[method-assign]
    return module


@pytest.fixture
def ffns(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The gathered FFNs that layers call, by their selections."""
    called: list[Any] = []
    own = layers.gathered_ffn

    def noted(*args: Any, selection: Any = None) -> Tensor:
        called.append(selection)
        return own(*args, selection=selection)

    monkeypatch.setattr(layers, "gathered_ffn", noted)
    return called


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_are_stateless_and_say_what_they_can(name: str):
    layer = getattr(layers, name)
    assert layer.__init__ is nn.Module.__init__ and not layer.has_backward and layer.can_torch_compile
    assert set(dir(layer)) - set(dir(nn.Module)) == {"has_backward", "can_torch_compile"}


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_linear(bias: bool):
    module, x = nn.Linear(64, 48, bias=bias), randn(0, 2, 5, 64)
    expected = module(x)
    torch.testing.assert_close(bound(module, layers.Linear)(x), expected, rtol=1e-5, atol=1e-5)


def silu_of_transformers() -> nn.Module:
    return pytest.importorskip("transformers.activations").ACT2FN["silu"]


@pytest.mark.parametrize("activation", [nn.SiLU, silu_of_transformers])
@torch.no_grad()
def test_swiglu(ffns: list[Any], activation: Any):
    module, x = SwiGLU(activation=activation()), randn(9, 2, 5, 64)
    expected = module(x)
    torch.testing.assert_close(bound(module, layers.SwiGLUMLP)(x), expected, rtol=1e-4, atol=1e-4)
    bound(module.gate_proj, layers.Linear)  # kernelized too
    for each in (module.up_proj, module.act_fn):
        each.forward = MethodType(type(each).forward, each)  # what kernelize does without a kernel
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert ffns == [None, None]


@torch.no_grad()
def test_swiglu_of_some_neurons(ffns: list[Any]):
    module, x = bound(SwiGLU(), layers.SwiGLUMLP), randn(9, 5, 64)
    module.selection = Selection.from_runs([(0, 24), (96, 40)], limit=160)
    kept = [*range(24), *range(96, 136)]
    weights = module.gate_proj.weight[kept], module.up_proj.weight[kept], module.down_proj.weight[:, kept]
    torch.testing.assert_close(module(x), reference.gathered_ffn(x, *weights), rtol=1e-4, atol=1e-4)
    assert ffns == [module.selection]


def biased() -> nn.Module:
    return SwiGLU(bias=True)


def gelu() -> nn.Module:
    return SwiGLU(activation=nn.GELU())


def adapted() -> nn.Module:
    module = SwiGLU()
    module.up_proj = Doubled(64, 160, bias=False)
    return module


def hooked(part: str = "down_proj") -> nn.Module:
    module = SwiGLU()
    module.get_submodule(part).register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def prepared() -> nn.Module:
    module = SwiGLU()
    module.down_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return module


def replaced() -> nn.Module:
    module = SwiGLU()
    module.gate_proj.forward = lambda x: 2 * nn.functional.linear(x, module.gate_proj.weight)  # type: ignore[method-assign]
    return module


def activation_hooked() -> nn.Module:
    return hooked("act_fn")


def activation_replaced() -> nn.Module:
    module = SwiGLU()
    module.act_fn.forward = torch.sin  # type: ignore[method-assign]
    return module


class Quantised(Tensor):
    """Stands for twice what is stored."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return 2 * result if func is nn.functional.linear else result


def quantise(module: nn.Linear) -> None:
    weight = module.weight.detach().as_subclass(Quantised)
    del module.weight
    module.weight = weight


def quantised() -> nn.Module:
    module = SwiGLU()
    quantise(module.gate_proj)
    return module


@torch.no_grad()
def test_a_weight_of_a_subclass_of_tensor_runs_as_itself():
    module, x = nn.Linear(64, 48), randn(0, 5, 64)
    quantise(module)
    expected = module(x)
    assert torch.equal(bound(module, layers.Linear)(x), expected)


OTHERS = [biased, gelu, adapted, hooked, prepared, replaced, activation_hooked, activation_replaced, quantised]


@pytest.mark.parametrize("make", OTHERS)
@torch.no_grad()
def test_other_mlps_compute_what_they_are(ffns: list[Any], make: Any):
    module, x = make(), randn(9, 5, 64)
    expected = module(x)
    bound(module, layers.SwiGLUMLP)
    assert torch.equal(module(x), expected) and ffns == []
    module.selection = Selection.from_runs([(0, 24)], limit=160)
    with pytest.raises(ValueError, match=r"selection: expected a module of SiLU and three nn\.Linear without bias"):
        module(x)


class Norm(nn.RMSNorm):
    kernel_layer_name = "RMSNorm"


class Own(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [Own(64, eps=0.5), Norm(64), Norm(64, eps=0.5, elementwise_affine=False)], ids=str)
@torch.no_grad()
def test_norms_that_run_as_themselves(norm: nn.Module):
    x = randn(3, 5, 64, scale=1e-3)
    expected = norm(x)
    assert torch.equal(bound(norm, layers.RMSNorm)(x), expected)


@torch.no_grad()
def test_norm():
    x, weight = randn(3, 2, 4, 64), randn(4, 64)
    for name in ("variance_epsilon", "eps"):
        module = bound(nn.Module(), layers.RMSNorm)
        module.weight = nn.Parameter(weight)
        setattr(module, name, 0.5)
        expected = nn.functional.rms_norm(x, (64,), weight, 0.5)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        # A weight of fp32 is not rounded to x's dtype, and the result has x's.
        low = x.bfloat16()
        assert torch.equal(module(low), module(low.float()).bfloat16())
