"""Rows of several LoRA adapters in one call: weights are read once, and every row has the bits that it has alone."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.conformance import relative
from support.tape import capturing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashu_ext as fx
from flashu_ext.models.folders import load_pipeline
from flashu_ext.models.lora import BASE
from flashu_ext.models.many import ImageRequest, QuestionRequest
from flashu_ext.ops.kernel_sets import resolve
from flashu_ext.planning.neurons import NeuronLayout
from flashu_ext.runtime.modules.adapters import RowAdapters
from flashu_ext.runtime.modules.ffn import FFN as RuntimeFFN
from flashu_ext.runtime.modules.linear import Linear, Linears

peft = pytest.importorskip("peft")
from support.adapters import ATTENTION, FFN, adapted, as_peft, fill, second  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

NAMES: tuple[str | None, ...] = ("default", "other", "third", BASE, None)


# ---- one layer


class Block(nn.Module):
    """Two linear layers and an FFN, with three adapters of which the second is active; each reaches other layers."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"a": (96, 48), "b": (96, 32), "gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
        for name, (inner, outer) in sizes.items():
            setattr(self, name, nn.Linear(inner, outer, bias=name == "a"))
        self.to(dtype).eval()
        for name, layers, rank in (
            ("default", [*sizes], 4),
            ("other", ["a", "gate_proj"], 2),
            ("third", ["b", "down_proj"], 3),
        ):
            peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=7, target_modules=layers), self, name)
            fill(self, name, seed=rank, std=0.2)
        for module in self.modules():
            if hasattr(module, "lora_A"):
                module.set_adapter(["other"])
        self.eval()


def layers(dtype: torch.dtype, rows: RowAdapters) -> dict[str, Any]:
    block = Block(dtype)
    kernels = resolve(fx.FlashUConfig.exact(), torch.device("cpu"), dtype).of("understanding", "decode")
    own = kernels, block.a.base_layer.weight, rows
    a, b = (Linear(each, *own) for each in (block.a, block.b))
    named = ("default", "other", "third", BASE)
    ffn = RuntimeFFN(block, kernels, None, None, rows, named)
    layout = NeuronLayout.build(64, {"runs": torch.arange(7, 40), "list": torch.tensor([1, 2, 9, 40, 63])})
    pruned = {"runs": ffn.over(layout), "list": ffn.over(layout.in_place())}
    together = Linears((a, b), kernels)
    return {
        "linear": a,
        "activation": lambda x: a(x, "gelu"),
        "activation and residual": lambda x: a(x, "silu", x[..., :48].contiguous()),
        "residual": lambda x: b(x, residual=x[..., :32]),
        "linears": lambda x: torch.cat(together(x), dim=-1),
        "ffn": lambda x: ffn(x, None, x.clone()),
        "ffn alone": lambda x: ffn(x),
        "ffn on a run": lambda x: pruned["runs"](x, "runs", x.clone()),
        "ffn on a list": lambda x: pruned["list"](x, "list"),
    }


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=9), st.sampled_from([(), (1,), (5,)]), st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_row_has_the_bits_that_it_has_alone(
    dtype: torch.dtype, names: list[str | None], inner: tuple[int, ...], seed: int
) -> None:
    rows = RowAdapters()
    x = torch.randn(len(names), *inner, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for kind, layer in layers(dtype, rows).items():
        with torch.no_grad(), rows.of(*((name, 1) for name in names)):
            got = layer(x)
        for row, name in enumerate(names):
            with torch.no_grad(), rows.of((name, 1)):
                assert torch.equal(layer(x[row : row + 1])[0], got[row]), (kind, name)


def test_each_row_s_adapter_is_the_one_that_is_added() -> None:
    rows = RowAdapters()
    made, block = layers(torch.float32, rows), Block(torch.float32)
    x = torch.randn(5, 96)
    with torch.no_grad(), rows.of(*((name, 1) for name in NAMES)):
        got = made["linear"](x)
    for row, name in enumerate(NAMES):
        block.a.set_adapter([] if name == BASE else [name or "other"])
        assert relative(got[row], as_peft(block.a, x[row])) < 1e-5
    changed = [relative(*pair) > 1e-3 for pair in zip(got, block.a.base_layer(x), strict=True)]
    assert changed == [True, True, False, False, True]


def test_rows_that_nobody_told_of_are_refused() -> None:
    rows = RowAdapters()
    linear = layers(torch.float32, rows)["linear"]
    with (
        rows.of(("default", 2), (BASE, 1)),
        pytest.raises(RuntimeError, match=r"expected 3 rows, got an input of \[2, 96\]"),
    ):
        linear(torch.randn(2, 96))
    with torch.no_grad():
        assert linear(torch.randn(2, 96)).shape == (2, 48), "outside, all rows are of what is active"


# ---- answers and images


class Reads(TorchDispatchMode):
    """How often this library's operators read each of some weights."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in weights.items()}
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "flashu":
            flat = [
                each for arg in (*args, *(kwargs or {}).values()) for each in (arg if isinstance(arg, list) else [arg])
            ]
            for each in flat:
                if isinstance(each, Tensor) and (name := self.names.get(each.data_ptr())) is not None:
                    self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def pipeline() -> tuple[Any, Any]:
    """The embedded model with three adapters, of which the first is active."""
    pipe = load_pipeline("nano")
    wrapped = adapted(pipe.model, [*ATTENTION, *FFN, "out_proj", "fc1", "lm_head"], seed=1)
    second(wrapped, targets=["q_proj", "up_proj", "linear"])
    second(wrapped, "third", targets=["down_proj", "v_proj"])
    fill(wrapped, "default", seed=1, std=0.6)
    fill(wrapped, "other", seed=2, std=0.6)
    fill(wrapped, "third", seed=5, std=0.6)
    return pipe, wrapped


def question(
    picture: Any, adapter: str | None, seed: int, tokens: int = 8, temperature: float = 2.0
) -> QuestionRequest:
    told: list[int] = []
    asked = (picture, "describe the image", tokens, temperature, None, None, seed, adapter)
    return QuestionRequest(*asked, on_token=told.append)


def tokens_of(result: Any) -> list[int]:
    """Of a `question`."""
    assert result.error is None, result.error
    told: list[int] = result.request.on_token.__self__
    return told


KEYS = ((0, 8, 2.0), (2, 8, 0.0), (3, 8, 6.0), (4, 6, 5.0))
"""(seed, tokens, temperature) of the questions."""


@pytest.fixture(scope="module")
def company() -> Iterator[tuple[Any, Any, dict[Any, list[int]]]]:
    """An accelerated pipeline, a picture, and the answer of every question alone: (adapter, seed, tokens, temperature)."""
    pipe, wrapped = pipeline()
    picture = load_pipeline("nano").generate("a red circle above a blue square", 1, 6)
    alone: dict[Any, list[int]] = {}
    with pipe.accelerate(*pipe.preset("exact")):
        for name in NAMES:
            wrapped.base_model.enable_adapter_layers()
            wrapped.set_adapter(name if name in ("other", "third") else "default")
            if name == BASE:
                wrapped.base_model.disable_adapter_layers()
            for seed, tokens, temperature in KEYS:
                asked = question(picture, None, seed, tokens, temperature)
                (result,) = pipe.answer_many([asked])
                alone[name, seed, tokens, temperature] = tokens_of(result)
        distinct = [len({tuple(alone[name, *key]) for name in NAMES[:4]}) for key in KEYS]
        assert distinct[0] == 4 and min(distinct) > 1, "adapters change the answers"
        wrapped.base_model.enable_adapter_layers()
        wrapped.set_adapter("default")
        yield pipe, picture, alone


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6))
def test_answers_in_any_company(company: Any, seed: int) -> None:
    """Random mixes, which begin and are given up at random times."""
    pipe, picture, alone = company
    chance = random.Random(seed)
    waiting = [chance.choice([*alone]) for _ in range(chance.randint(2, 9))]
    many, keys, given_up = pipe.answer_many(at_once=chance.randint(1, 5)), {}, set()
    results = []
    while waiting or len(results) + len(given_up) < len(keys):
        for _ in range(min(len(waiting), chance.randint(0, 3))):
            key = waiting.pop()
            keys[many.add(question(picture, *key))] = key
        if many.in_progress and chance.random() < 0.1:
            given_up.add(chance.choice(many.in_progress))
            many.cancel(max(given_up))
        results += many.step()
    for result in results:
        assert tokens_of(result) == alone[keys[result.index]], keys[result.index]


def test_a_decoded_token_reads_every_weight_once(company: Any) -> None:
    pipe, picture, alone = company
    layer = pipe.model.showo.model.layers[1]
    owners = {
        "q": layer.self_attn.q_proj,
        "o": layer.self_attn.o_proj,
        "gate": layer.mlp.gate_proj,
        "down": layer.mlp.down_proj,
    }
    weights = {name: module.base_layer.weight for name, module in owners.items()}
    many = pipe.answer_many([question(picture, name, 0) for name in NAMES])
    assert not many.step()
    with Reads(weights) as reads:
        results = many.step()
    assert reads.seen == Counter(dict.fromkeys(weights, 1)), (
        "five rows of three adapters, of none and of what is active"
    )
    with Reads(weights) as rest:
        results += many
    assert set(rest.seen.values()) == {6}, "eight tokens, of which the first is the prefill's"
    assert all(tokens_of(result) == alone[result.request.adapter, *KEYS[0]] for result in results)


@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_images_that_begin_at_other_times_and_have_other_guidance(preset: str) -> None:
    """An unguided image has one row, a guided one two of the same latents."""
    pipe, _ = pipeline()
    asked = [
        ImageRequest("a red circle", seed, steps=3 + seed % 3, guidance_scale=0.0 if seed % 2 else None, adapter=name)
        for seed, name in enumerate((*NAMES, *NAMES[1:3]))
    ]
    with pipe.accelerate(*pipe.preset(preset)):
        alone = [next(pipe.generate_many([each])).latents for each in asked]
        many, results = pipe.generate_many(asked[:2]), []
        for each in asked[2:]:
            results += many.step()
            many.add(each)
        results += many
        assert len(results) == len(asked) and all(each.error is None for each in results)
        assert all(torch.equal(each.latents, alone[each.index]) for each in results)


def test_an_evaluation_reads_every_weight_once() -> None:
    pipe, _ = pipeline()
    with pipe.accelerate(*pipe.preset("exact")):
        block = pipe.model.diffusion_head_a[0]
        owners = {
            "llm": pipe.model.showo.model.layers[1].mlp.up_proj,
            "head": block.mlp.up_proj,
            "vision": pipe.model.und_trans.layers[0].mlp.fc1,
        }
        weights = {name: module.base_layer.weight for name, module in owners.items()}
        many = pipe.generate_many(
            [ImageRequest("a red circle", seed, steps=3, adapter=name) for seed, name in enumerate(NAMES)]
        )
        assert not many.step()
        with Reads(weights) as reads:
            assert len(many.step()) == len(NAMES)
        assert reads.seen == Counter(dict.fromkeys(weights, 1))


def test_nothing_is_reused_across_adapters(company: Any) -> None:
    pipe, picture, alone = company
    engine = fx.handle_of(pipe.model).runner.understanding
    engine.forget()

    def ask(name: str | None) -> tuple[int, int]:
        before = engine.encoded, engine.reused
        (result,) = pipe.answer_many([question(picture, name, 0)])
        assert tokens_of(result) == alone[name, *KEYS[0]]
        return engine.encoded - before[0], engine.reused - before[1]

    assert ask("default") == (1, 0)
    assert ask(BASE) == (1, 0) and ask(None) == (1, 0), "also where what is active is the same"
    encoded, reused = ask(None)
    assert encoded == 0 and reused > 0
    assert ask("default")[0] == 0, "its image is known"


def test_captured_answers_of_several_adapters(company: Any) -> None:
    pipe, picture, alone = company
    other = copy.deepcopy(pipe)
    with capturing(other.accelerate(*other.preset("exact"))) as handle:
        for _ in range(2):
            for result in other.answer_many([question(picture, name, 0) for name in (*NAMES, *NAMES[:2])]):
                assert tokens_of(result) == alone[result.request.adapter, *KEYS[0]]
        assert any(each.replayed for each in handle.runner.understanding.pool.graphs())


def test_what_is_active_does_not_matter_to_who_names_one(company: Any) -> None:
    """Disabled layers, another active adapter, and one that runs as itself, beside rows that it computes."""
    pipe, wrapped = pipeline()
    _, picture, alone = company
    second(wrapped, "dora", targets=["o_proj", "gate_proj"], use_dora=True)
    named = ("default", "other", "third", BASE)
    with pipe.accelerate(*pipe.preset("exact")) as handle:
        wrapped.base_model.disable_adapter_layers()
        asked = [question(picture, name, 0) for name in named]
        assert all(tokens_of(each) == alone[each.request.adapter, *KEYS[0]] for each in pipe.answer_many(asked))
        wrapped.base_model.enable_adapter_layers()
        wrapped.set_adapter("dora")
        (active,) = pipe.answer_many([question(picture, None, 0)])
        assert any("DoraLinearVariant" in why for why in handle.summary().fallbacks)
        for each in pipe.answer_many([question(picture, name, 0) for name in (*named, None)]):
            expected = tokens_of(active) if each.request.adapter is None else alone[each.request.adapter, *KEYS[0]]
            assert tokens_of(each) == expected
        assert wrapped.active_adapter == "dora"


@pytest.mark.parametrize("family", ["showo2", "janusflow", "bagel"])
def test_images_are_those_of_the_dense_model_with_the_adapter(family: str) -> None:
    pipe = load_pipeline("nano", family=family)
    wrapped = adapted(pipe.model, [*ATTENTION, *FFN, "q_proj_moe_gen"], seed=1)
    second(wrapped, targets=["q_proj", "up_proj", "gen_aligner", "vision_gen_enc_aligner", "llm2vae"])
    dense = {}
    for name in ("default", "other", BASE):
        wrapped.set_adapter(name if name != BASE else "default")
        if name == BASE:
            wrapped.base_model.disable_adapter_layers()
        (result,) = pipe.generate_many([ImageRequest("a red circle", 3, steps=3)])
        dense[name] = result.latents
    wrapped.base_model.enable_adapter_layers()
    with pipe.accelerate(*pipe.preset("exact")):
        results = [
            *pipe.generate_many([ImageRequest("a red circle", 3, steps=3, adapter=name) for name in (*dense, *dense)])
        ]
    for result in results:
        name = result.request.adapter
        assert relative(result.latents, dense[name]) < 1e-4
        assert all(relative(result.latents, dense[each]) > 1e-3 for each in dense if each != name)


def test_without_the_ffn_kernel_only_adapters_elsewhere_can_be_named() -> None:
    pipe = load_pipeline("nano")
    wrapped = adapted(pipe.model, [*ATTENTION, *FFN], seed=1)
    second(wrapped, targets=["q_proj"])
    config = pipe.preset("exact")[0].replace(ffn_kernels=False)
    asked = [ImageRequest("a red circle", 3, steps=3, adapter=name) for name in ("other", None, BASE)]
    with pipe.accelerate(config):
        (refused,) = pipe.generate_many([ImageRequest("a red circle", 3, steps=3, adapter="default")])
        assert "mlp.gate_proj runs as itself" in str(refused.error)
        assert "it has LoRA adapters, for which only the CPU's FFN kernel is" in str(refused.error)
        alone = [next(pipe.generate_many([each])).latents for each in asked]
        for each in pipe.generate_many(asked):
            assert torch.equal(each.latents, alone[each.index])
        wrapped.set_adapter("other")
        (active,) = pipe.generate_many([asked[1]])
        assert torch.equal(active.latents, alone[0])


CHANGES: dict[str, Any] = {
    "scaling edited": lambda w: w.base_model.model.showo.model.layers[1].self_attn.v_proj.scaling.update(third=9.0),
    "deleted": lambda w: w.delete_adapter("other"),
    "merged": lambda w: w.merge_adapter(),
    "another active": lambda w: w.set_adapter("other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_way_ends_what_is_under_way_and_no_other(change: str) -> None:
    pipe, wrapped = pipeline()
    picture = load_pipeline("nano").generate("a red circle", 1, 4)
    with pipe.accelerate(*pipe.preset("exact")):
        questions = pipe.answer_many([question(picture, name, 0) for name in NAMES])
        images = pipe.generate_many([ImageRequest("a red circle", 0, steps=4, adapter=name) for name in NAMES])
        assert not questions.step() and not images.step()
        CHANGES[change](wrapped)
        for many, what in ((questions, "question was being answered"), (images, "image was being generated")):
            results = list(many)
            assert len(results) == len(NAMES)
            assert all(f"model: it was changed while this {what}" in str(each.error) for each in results)
        (later,) = pipe.answer_many([question(picture, "third", 0)])
        assert ("while adapters are merged" in str(later.error)) if change == "merged" else later.error is None
