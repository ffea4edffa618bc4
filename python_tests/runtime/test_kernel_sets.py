"""Which kernel runs each op in each phase: the tables name what the runtime calls, explicit settings are met or refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from support import work
from support.models import small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashu_ext as fx
from flashu_ext.models.adapter import adapter_of
from flashu_ext.ops import kernel_sets, reference
from flashu_ext.ops.common import DEVICES
from flashu_ext.ops.kernel_sets import FAMILIES, KERNELS, ONE_BY_ONE, PHASES, USES, Kernel, KernelSets, Use, resolve
from flashu_ext.planning.cost import llm_layer_flops
from flashu_ext.planning.op_cost import OP_COSTS
from flashu_ext.runtime import runner

pytestmark = pytest.mark.filterwarnings("error")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Error = fx.kernel_sets.KernelUnavailableError
needs_cuda_build = pytest.mark.skipif("cuda" not in DEVICES, reason="a build without CUDA kernels")


def chosen(config: fx.FlashUConfig, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """'task phase op' -> its choice."""
    choices = resolve(config, device, dtype).choices
    return {f"{each.use.task} {each.use.phase} {each.use.op}": each for each in choices}


def watched(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, str]]:
    """Counts the ops that phases call, from the next `accelerate` on."""
    calls: Counter[tuple[str, str, str]] = Counter()

    def counting(task: str, phase: str, op: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[task, phase, op] += 1
            return function(*args, **kwargs)

        return call

    def resolved(*args: Any) -> KernelSets:
        sets = resolve(*args)
        own = {
            (task, phase): dataclasses.replace(
                each, **{op: counting(task, phase, op, getattr(each, op)) for op in each.chosen}
            )
            for (task, phase), each in sets.sets.items()
        }
        return KernelSets(own, sets.choices)

    monkeypatch.setattr(runner, "resolve", resolved)
    return calls


EXTRA = {
    "forecast": {"head_cache_interval": 2, "head_forecast_order": 2},
    "tokens alone": {"token_skip": True, "token_skip_ratio": 0.5, "token_skip_interval": 3},
    "attention scores": {"token_prune_ratio": 0.5, "token_prune_score": "attention"},
}


@pytest.mark.parametrize("name", [*work.SETTINGS, *EXTRA])
def test_the_table_has_what_the_runtime_calls(monkeypatch, name):
    calls = watched(monkeypatch)
    model = small_model()
    config = work.settings(name) if name in work.SETTINGS else fx.FlashUConfig(steps=work.STEPS, **EXTRA[name])
    with fx.accelerate(model, config, work.plan(model) if config.needs_plan else None) as handle:
        work.generate(model, 1)
        work.answer(model, 1)
        choices = handle.runner.network.sets.choices
    expected = {(c.use.task, c.use.phase, c.use.op) for c in choices if c.implementation != ONE_BY_ONE}
    assert set(calls) == expected


def test_the_tables_are_whole():
    assert len({(use.task, use.phase, use.op) for use in USES}) == len(USES)
    ops = {op for family in FAMILIES.values() for op in family}
    assert ops == set(OP_COSTS) == {use.op for use in USES} == {kernel.op for kernel in KERNELS}
    assert {(use.task, use.phase) for use in USES} == {(task, phase) for task in PHASES for phase in PHASES[task]}


def test_phases_of_the_same_kernels_share_a_network():
    model = small_model()
    with fx.accelerate(model, fx.FlashUConfig()) as handle:
        assert len(set(map(id, handle.runner.network.sets.sets.values()))) == 1
        assert not handle.runner.network.built


def test_another_kernel_is_another_row(monkeypatch):
    calls: list[int] = []

    def mine(x: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(x.shape[0])
        return reference.rms_norm(x, *args)

    def narrow_only(case: Any) -> str | None:
        return None if case.layer is not None and case.layer.width == 32 else "it is wide"

    row = Kernel("rms_norm", "mine", mine, phases=("decode", "head"), why_not=narrow_only, reason="it is mine")
    monkeypatch.setattr(kernel_sets, "KERNELS", (row, *KERNELS))
    model = small_model()
    found = {(row.phase, row.op): row for row in fx.kernel_sets.describe(model).rows}
    assert (found["decode", "rms_norm"].implementation, found["decode", "rms_norm"].reason) == ("mine", "it is mine")
    assert (found["head", "rms_norm"].implementation, found["head", "rms_norm"].reason) == ("flashu", "it is wide")
    expected = work.answer(model, 1)
    with fx.accelerate(model, fx.FlashUConfig()) as handle:
        work.generate(model, 1)
        assert not calls
        assert torch.equal(work.answer(model, 1), expected)
        summary = handle.summary()
        assert calls and len(handle.runner.network.built) == 1
    assert summary.ran["understanding decode"]["rms_norm"] == "mine"
    assert summary.ran["understanding prefill"]["rms_norm"] == summary.ran["generation head"]["rms_norm"] == "flashu"
    assert summary.ran["understanding embed"]["rms_norm"] == "flashu"
    assert summary.kernels["rms_norm"] == "flashu, mine" and "rms_norm: it is wide" not in summary.fallbacks


def test_a_plans_neurons_hold_in_every_phase(monkeypatch):
    """Also where a phase has a network of its own."""
    model = small_model()
    config = work.settings("paper")
    with fx.accelerate(model, config, work.plan(model)):
        expected = work.generate(model, 1), work.answer(model, 1)
    watched(monkeypatch)
    with fx.accelerate(model, config, work.plan(model)) as handle:
        assert len(handle.runner.network.built) == len(handle.runner.network.sets.sets) - 1
        assert torch.equal(work.generate(model, 1), expected[0]) and torch.equal(work.answer(model, 1), expected[1])


# ---- explicit and automatic settings


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"attention"}))
def test_an_explicit_family_is_met_or_refused(family):
    config = fx.FlashUConfig(**{f"{family}_kernels": "flashu"})
    for name, choice in chosen(config).items():
        if choice.use.op in FAMILIES[family]:
            assert choice.implementation in ("flashu", ONE_BY_ONE), name
    op, config = FAMILIES[family][0], config.replace(answer_layer_skip_ratio=0.5)  # which calls cosine_importance
    with pytest.raises(Error, match=rf"{op} for torch.float64 on cpu.*no {op} kernel for torch.float64 on cpu"):
        resolve(config, CPU, torch.float64)


def test_accelerate_refuses_and_leaves_the_model():
    model = small_model().double()
    with pytest.raises(Error, match=r"generation, embed, rms_norm for torch\.float64 on cpu"):
        fx.accelerate(model, fx.FlashUConfig(norm_kernels="flashu"))
    assert fx.handle_of(model) is None
    with pytest.raises(Error, match="rms_norm"):
        fx.kernel_sets.describe(model, fx.FlashUConfig(norm_kernels="flashu"))


def test_an_automatic_family_falls_back_and_says_why():
    automatic, off = chosen(fx.FlashUConfig(), CPU, torch.float64), chosen(fx.FlashUConfig(norm_kernels=False))
    name = "generation backbone rms_norm"
    assert automatic[name].implementation == off[name].implementation == "torch"
    assert automatic[name].reason.startswith("no rms_norm kernel for torch.float64 on cpu")
    assert off[name].reason == "FlashUConfig.norm_kernels is False"
    assert resolve(fx.FlashUConfig(norm_kernels=False), CPU, torch.float32).fallbacks["rms_norm"] == off[name].reason


@pytest.mark.parametrize("setting", ["norm_kernels", "batch_invariant"])
def test_a_module_that_runs_as_itself_is_no_kernel(setting):
    model, config = small_model(), fx.FlashUConfig(norm_kernels="flashu")
    model.showo.model.layers[3].input_layernorm.register_forward_hook(lambda *args: None)
    with pytest.raises(
        Error, match=r"model\.showo\.model\.layers\.3\.input_layernorm.*norm_kernels.*has a forward hook"
    ):
        fx.accelerate(model, config)
    with pytest.raises(Error, match=r"layers\.3\.input_layernorm"):
        fx.kernel_sets.describe(model, config)
    description = fx.kernel_sets.describe(model)
    assert description.itself == {"showo.model.layers.3.input_layernorm": "has a forward hook"}
    assert "runs as itself: has a forward hook" in str(description)


@pytest.mark.parametrize("family", ["ffn", "linear", "norm", "attention"])
def test_batch_invariance_needs_kernels(family):
    """Where one is asked for and the other switched off; None asks for nothing."""
    off = {f"{family}_kernels": False}
    with pytest.raises(Error, match=rf"{FAMILIES[family][0]}.*torch: torch's .* is not batch-invariant"):
        resolve(fx.FlashUConfig(batch_invariant=True, **off), CPU, torch.float32)
    assert resolve(fx.FlashUConfig(**off), CPU, torch.float32).choices


@needs_cuda_build
def test_batch_invariance_on_a_gpu_takes_rows_one_at_a_time():
    """Only the choice is tested: nothing of this ran on a GPU."""
    found = chosen(fx.FlashUConfig(batch_invariant=True), CUDA, torch.bfloat16)
    assert found["generation backbone attention"].implementation == "torch by rows"
    full = chosen(fx.FlashUConfig(batch_invariant=True, linear_kernels="flashu"), CUDA, torch.float32)
    linear = [each[f"understanding decode {op}"] for each in (found, full) for op in ("linear", "linears")]
    for padded in (found["understanding decode gathered_ffn"], *linear):
        assert (
            padded.implementation == "flashu padded"
            and padded.reason.startswith("fewer than 17 rows")
            and not padded.fell_back
        )
    assert full["understanding decode gathered_ffn"].implementation == "flashu"
    found = chosen(fx.FlashUConfig(), CUDA, torch.bfloat16)
    assert found["generation backbone linear"].reason.startswith("cuBLAS runs")
    assert found["generation backbone attention"].implementation == "torch"
    assert (
        chosen(fx.FlashUConfig(linear_kernels="flashu"), CUDA)["understanding decode linear"].implementation == "flashu"
    )


def test_a_kernel_that_no_device_has_is_refused():
    with pytest.raises(Error, match=r"generation, embed, attention for torch\.bfloat16 on cuda"):
        resolve(fx.FlashUConfig(attention_kernels="flashu"), CUDA, torch.bfloat16)
    with pytest.raises(Error, match=r"attention.*is replaced"):
        resolve(fx.FlashUConfig(attention_kernels="flashu"), CPU, torch.float32, "torch's function is replaced")


def test_an_op_that_is_not_called_is_not_refused():
    config = fx.FlashUConfig(routing_kernels="flashu")
    assert resolve(config, CPU, torch.float64).choices
    with pytest.raises(Error, match="prefill, value_norms"):
        resolve(config.replace(token_prune_ratio=0.5), CPU, torch.float64)


def test_rows_one_at_a_time_do_not_depend_on_each_other():
    generator = torch.Generator("cpu").manual_seed(0)
    query = torch.randn(3, 4, 5, 8, generator=generator, device="cpu")
    key, value = torch.randn(2, 3, 2, 7, 8, generator=generator, device="cpu")
    mask = torch.randn(3, 1, 5, 7, generator=generator, device="cpu")
    for lengths in (None, torch.tensor([7, 3, 5], device="cpu")):
        for each in (None, mask, mask[:1]):
            together = reference.attention_by_rows(query, key, value, lengths, each)
            torch.testing.assert_close(together, reference.attention(query, key, value, lengths, each))
            out = torch.empty_like(together)
            assert reference.attention_by_rows(query, key, value, lengths, each, out=out) is out
            assert torch.equal(out, together)
            own = each if each is None or len(each) == 1 else each[1:2]
            only = None if lengths is None else lengths[1:2]
            alone = reference.attention_by_rows(query[1:2], key[1:2], value[1:2], only, own)
            assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("rows", [(0,), (1, 3), (2, 8), (17,), (4, 5)])
def test_few_rows_are_padded_to_many(monkeypatch, rows):
    generator = torch.Generator("cpu").manual_seed(0)
    x, residual = torch.randn(2, *rows, 8, generator=generator, device="cpu")
    up, down = (
        torch.randn(2, 24, 8, generator=generator, device="cpu"),
        torch.randn(8, 24, generator=generator, device="cpu"),
    )
    bias = torch.randn(24, generator=generator, device="cpu")
    more = torch.randn(*rows, 24, generator=generator, device="cpu")
    calls: dict[str, tuple[tuple[Any, ...], Tensor]] = {
        "gathered_ffn": ((*up, down), residual),
        "linear": ((up[0], bias), more),
        "linears": (([up[0][:16], up[1][:8]], [bias[:16], None]), more),
    }
    padded = {kernel.op: kernel.function for kernel in KERNELS if kernel.implementation == "flashu padded"}
    assert padded.keys() == calls.keys()
    for name, (arguments, added) in calls.items():
        op, function = getattr(fx.ops, name), padded[name]
        expected = [op(x, *arguments), op(x, *arguments, residual=added)]
        counts: list[int] = []

        def counting(x, *a, op=op, counts=counts, **k):
            counts.append(x.shape[:-1].numel())
            return op(x, *a, **k)

        monkeypatch.setattr(fx.ops, name, counting)
        assert function is not None
        assert torch.equal(function(x, *arguments), expected[0])
        assert torch.equal(function(x, *arguments, residual=added), expected[1])
        assert min(counts) >= 17  # kFewRows of csrc/core/ffn_choice.hpp, and one


# ---- names


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda: Kernel("rmsnorm", "mine"), "rms_norm"),
        (lambda: Kernel("rms_norm", "mine", phases=("drawing",)), "backbone"),
        (lambda: Kernel("rms_norm", "mine", tasks=("drawing",)), "understanding"),
        (lambda: Kernel("rms_norm", "mine", devices=("tpu",)), "cuda"),
        (lambda: Use("drawing", "backbone", "rms_norm"), "generation"),
        (lambda: Use("generation", "decode", "rms_norm"), "measuring"),
        (lambda: resolve(fx.FlashUConfig(), CPU, torch.float32).of("understanding", "backbone"), "prefill"),
        (lambda: fx.FlashUConfig(ffn_kernels="cutlass"), "flashu"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(make, known):
    with pytest.raises(ValueError, match=rf"expected .*{known}.*, got"):
        make()


# ---- describe


class NothingRuns(TorchDispatchMode):
    """But comparisons of buffers, by which `accelerate` refuses models too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.equal.default:
            raise AssertionError(f"{func} ran")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_describe_runs_nothing(device):
    model = small_model().to(device)
    parts = adapter_of(model)
    config = work.settings("paper")
    with NothingRuns():
        description = fx.kernel_sets.describe(model, config, device="cpu")
        assert fx.kernel_sets.describe(parts, config, device="cpu") == description
    assert fx.handle_of(model) is None
    assert [(row.task, row.phase, row.op) for row in description.rows] == [
        (each.use.task, each.use.phase, each.use.op) for each in resolve(config, CPU, torch.float32).choices
    ]
    table = str(description).splitlines()
    assert len(table) == len(description.rows) + 3 and table[-1].startswith("float32 on cpu")


def test_describe_counts_what_the_cost_model_counts():
    model = small_model()
    shape, description = (
        adapter_of(model).shape(),
        fx.kernel_sets.describe(model, prompt=5, question=3),
    )
    span, keys = 17, 22

    def total(task: str, phase: str) -> float:
        return sum(row.gflop for row in description.rows if (row.task, row.phase) == (task, phase)) * 1e9

    layer, block, layers = shape.layers[0], shape.blocks[0], len(shape.layers)
    assert total("generation", "backbone") == pytest.approx(2 * layers * llm_layer_flops(layer, span, keys))
    assert total("understanding", "prefill") == pytest.approx(layers * llm_layer_flops(layer, 20, 20))
    assert total("understanding", "decode") == pytest.approx(layers * llm_layer_flops(layer, 1, 21) + shape.lm_head)
    head = len(shape.blocks) * llm_layer_flops(block, span, keys) + shape.head_input * span + shape.final * 16
    assert total("generation", "head") == pytest.approx(2 * head)
    pruned = fx.kernel_sets.describe(model, work.settings("paper"), work.plan(model))
    assert next(row for row in pruned.rows if (row.phase, row.op) == ("decode", "gathered_ffn")).shape.endswith(
        "48 neurons"
    )


@needs_cuda_build
def test_describe_predicts_the_ffn_on_a_gpu():
    description = fx.kernel_sets.describe(small_model(), device="cuda", dtype=torch.bfloat16)
    timed = {(row.phase, row.op) for row in description.rows if row.microseconds is not None}
    assert ("backbone", "gathered_ffn") in timed and {op for _, op in timed} == {"gathered_ffn"}
    assert " us " in str(description).splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"config": {}}, TypeError),
        ({"plan": "plan"}, TypeError),
        ({"images": 0}, ValueError),
        ({"prompt": True}, ValueError),
        ({"model": torch.nn.Linear(2, 2)}, TypeError),
    ],
)
def test_describe_checks_its_arguments(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        fx.kernel_sets.describe(**{"model": small_model(), **arguments})


def test_summary_says_what_ran():
    model = small_model()
    with fx.accelerate(model, fx.FlashUConfig(layer_skip_ratio=0.3, layer_skip_interval=2, steps=work.STEPS)) as handle:
        assert handle.summary().ran == {}
        work.answer(model, 1)
        assert set(handle.summary().ran) == {"understanding embed", "understanding prefill", "understanding decode"}
        work.generate(model, 1)
        ran = handle.summary().ran
        assert {"generation embed", "generation backbone", "generation head", "generation measuring"} < set(ran)
        assert ran["generation measuring"]["cosine_importance"] == "flashu"
        assert "  generation measuring " in str(handle.summary())
