"""What becomes of a model that changes before or while it is accelerated, case by case: docs/living-models.md is written from
these runs.

    FLASHU_WRITE_PAGES=1 pytest python_tests/runtime/test_living_page.py     writes the page; otherwise it is compared
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conformance import relative
from support.models import generation_inputs, small_model
from torch import nn

import flashu_ext as fx

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[2] / "docs" / "living-models.md"
ORDER, STEPS, LIMIT = (1, 0), 4, 1e-4
CONFIG = fx.FlashUConfig(ffn_prune_ratio=0.25, prune_multiple=8)
PLAN = fx.TaskPlan.from_scores(
    generation=[torch.rand(64, generator=torch.Generator().manual_seed(i)) for i in range(len(ORDER))],
    ratio=0.25,
    multiple=8,
)

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """A change to a model.

    Attributes:
        late: it comes while the model is accelerated; else before.
        planned: with a plan that prunes neurons; else exact().
        edits: it is made inside `handle.editing()`.
    """

    what: str
    change: Change
    late: bool = False
    planned: bool = False
    edits: bool = False


def layer(model: Any, index: int = 0) -> Any:
    return model.showo.model.layers[index]


@torch.no_grad()
def scale(parameter: nn.Parameter, factor: float = 1.5) -> None:
    parameter.mul_(factor)


def louder(_module: Any, _inputs: Any, output: Any) -> Any:
    return tuple(each * 1.25 for each in output) if isinstance(output, tuple) else output * 1.25


class Adapter(nn.Linear):
    """A projection with a low-rank update, as adapter libraries put in its place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * x.mean(-1, keepdim=True)


class Wrapper(nn.Module):
    """A projection inside another module, which has neither its weight nor its sizes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.1 * x.mean(-1, keepdim=True)


def layers_and_blocks(model: Any) -> list[Any]:
    return [*model.showo.model.layers, *model.diffusion_head_a]


def wrap(module: Any, name: str) -> None:
    setattr(module, name, Wrapper(getattr(module, name)))


def adapt(module: Any, name: str) -> None:
    getattr(module, name).__class__ = Adapter


class Own(fx.showo2.Showo2):
    def t2i_generate(self, *arguments: Any, **keywords: Any) -> Any:
        return super().t2i_generate(*arguments, **keywords) * 0.5


def hook(*path: str) -> Change:
    return lambda model: model.get_submodule(".".join(path)).register_forward_hook(louder)


def with_gradients(model: Any) -> None:
    layer(model).mlp.up_proj.weight.grad = torch.ones_like(layer(model).mlp.up_proj.weight)


def patched(module: Any) -> None:
    original = module.forward
    module.forward = lambda *arguments, **keywords: louder(None, None, original(*arguments, **keywords))


def biased(model: Any) -> None:
    layer(model).mlp.gate_proj.bias = nn.Parameter(torch.full((64,), 0.3))


def wrapped(model: Any) -> None:
    original = model.t2i_generate
    model.t2i_generate = lambda *arguments, **keywords: original(*arguments, **keywords) * 0.5


def inference_weights(model: Any) -> None:
    with torch.inference_mode():
        for linear in (layer(model).mlp.gate_proj, layer(model).mlp.up_proj, layer(model).mlp.down_proj):
            linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)


def packed(model: Any) -> None:
    layer(model).self_attn.q_proj.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer(model).mlp.up_proj)


def loaded(assign: bool) -> Change:
    state = {name: value * 1.1 for name, value in small_model(order=ORDER).state_dict().items()}
    return lambda model: model.load_state_dict({name: each.clone() for name, each in state.items()}, assign=assign)


def shared(model: Any) -> None:
    layer(model, 1).mlp = layer(model, 0).mlp


def kept_state(model: Any) -> None:
    vars(model)["_kept_for_the_test"] = {name: value for name, value in model.state_dict().items() if "mlp" in name}


CASES = [
    Case("weights written in place", lambda m: scale(m.showo.model.norm.weight), late=True),
    Case("FFN weights written in place", lambda m: scale(layer(m).mlp.up_proj.weight), late=True),
    Case("FFN weights written in place", lambda m: scale(layer(m).mlp.up_proj.weight), late=True, planned=True),
    Case("the same inside `handle.editing()`", lambda m: scale(layer(m).mlp.up_proj.weight), True, True, edits=True),
    Case("`load_state_dict`", loaded(assign=False), late=True, planned=True),
    Case("`load_state_dict(assign=True)`", loaded(assign=True), late=True, planned=True),
    Case("`model.to(torch.float64).to(torch.float32)`", lambda m: m.double().float(), late=True, planned=True),
    Case("FFN weights with gradients", with_gradients, planned=True),
    Case("FFN weights that are inference tensors", inference_weights, planned=True),
    Case("two layers share an FFN", shared, planned=True),
    Case("a `state_dict()` that is still held", kept_state, planned=True),
    Case("a parametrized FFN weight", parametrized, planned=True),
    Case("a quantizer's packed weight in attention", packed),
    Case("a bias in the FFN", biased),
    Case("another activation in the FFN", lambda m: setattr(layer(m).mlp, "act_fn", nn.GELU())),
    Case("an adapter on the FFN's gate", lambda m: adapt(layer(m).mlp, "gate_proj")),
    Case("an adapter on the FFN's gate", lambda m: adapt(layer(m).mlp, "gate_proj"), late=True, planned=True),
    Case("a wrapper around the FFN's gate", lambda m: wrap(layer(m).mlp, "gate_proj")),
    Case("a wrapper around the FFN's gate", lambda m: wrap(layer(m).mlp, "gate_proj"), late=True, planned=True),
    Case(
        "wrappers around query projections",
        lambda m: [wrap(each.self_attn, "q_proj") for each in layers_and_blocks(m)],
    ),
    Case("an adapter on a query projection", lambda m: adapt(layer(m).self_attn, "q_proj")),
    Case("an adapter in the diffusion head's FFN", lambda m: adapt(m.diffusion_head_a[0].mlp, "down_proj")),
    Case("a forward hook on the FFN", hook("showo.model.layers.0.mlp"), planned=True),
    Case("a forward hook on the FFN's down projection", hook("showo.model.layers.0.mlp.down_proj"), late=True),
    Case("a forward hook on a norm", hook("showo.model.layers.0.input_layernorm")),
    Case("a forward hook on the final norm", hook("showo.model.norm"), late=True),
    Case("a forward hook on a value projection", hook("showo.model.layers.1.self_attn.v_proj"), late=True),
    Case("a forward hook in the image encoder", hook("und_trans.layers.0.mlp"), late=True),
    Case("a forward hook on a decoder layer", hook("showo.model.layers.0")),
    Case("a forward hook on a decoder layer", hook("showo.model.layers.0"), late=True),
    Case("a forward hook on an attention", hook("showo.model.layers.0.self_attn")),
    Case("a forward hook on a head block", hook("diffusion_head_a.0")),
    Case("`forward` replaced on an FFN", lambda m: patched(layer(m).mlp), late=True, planned=True),
    Case("`forward` replaced on a decoder layer", lambda m: patched(layer(m)), late=True),
    Case("an FFN compiled in place", lambda m: layer(m).mlp.compile(backend="eager"), late=True),
    Case("an FFN compiled in place", lambda m: layer(m).mlp.compile(backend="eager"), late=True, planned=True),
    Case("a decoder layer compiled in place", lambda m: layer(m).compile(backend="eager"), late=True),
    Case("another attention scaling", lambda m: setattr(layer(m).self_attn, "scaling", 0.1)),
    Case("another FFN module", lambda m: setattr(layer(m), "mlp", copy.deepcopy(layer(m, 1).mlp)), late=True),
    Case("another FFN module", lambda m: setattr(layer(m), "mlp", copy.deepcopy(layer(m, 1).mlp)), True, True),
    Case("a subclass that overrides `t2i_generate`", lambda m: setattr(m, "__class__", Own)),
    Case("`t2i_generate` replaced on the instance", wrapped),
    Case("`t2i_generate` wrapped", wrapped, late=True),
    Case("train mode", lambda m: m.train(), late=True),
]


def draw(model: Any) -> torch.Tensor:
    return fx.showo2.sample(model, **generation_inputs(model, images=1), steps=STEPS)


def accelerated(model: Any, case: Case) -> Any:
    return fx.accelerate(model, CONFIG, PLAN) if case.planned else fx.accelerate(model)


@contextlib.contextmanager
def changed(model: Any, case: Case) -> Iterator[Any]:
    """The model with the case's change, accelerated, and its handle."""
    if not case.late:
        case.change(model)
    with accelerated(model, case) as handle:
        if case.late:
            draw(model)
            with handle.editing() if case.edits else contextlib.nullcontext():
                case.change(model)
        yield handle


def fresh(case: Case) -> Any:
    """What is right: a copy that has the change from the start, dense, or accelerated only then where a plan prunes."""
    model = small_model(order=ORDER)
    case.change(model)
    if not case.planned:
        return draw(model)
    with accelerated(model, case):
        return draw(model)


def outcome(case: Case) -> tuple[str, str]:
    """(accelerated, partly itself or refused; the reason), after checking that a result is right."""
    model = small_model(order=ORDER)
    try:
        with changed(model, case) as handle:
            result = draw(model)
            reasons = sorted(reason for reason in handle.summary().fallbacks if not reason.startswith("step graphs"))
        assert relative(result, fresh(case)) < LIMIT
    except (TypeError, RuntimeError, ValueError) as error:
        assert fx.handle_of(model) is None
        return "refused", f"{type(error).__name__}: {_plain(str(error))}"
    return ("partly as itself", "; ".join(map(_plain, reasons))) if reasons else ("accelerated", "")


def _plain(text: str) -> str:
    return re.sub(r"<class '(.*?)'>", r"\1", text.replace("|", "/"))


def page() -> str:
    lines = [
        "# A model that changes",
        "",
        "A result is right, or a named error comes and the model is as it was. This page is written by",
        "`FLASHU_WRITE_PAGES=1 pytest python_tests/runtime/test_living_page.py`, which runs every row: it compares each image",
        "with that of a copy which has the change from the start, dense for `exact()`, accelerated only then for a plan that",
        "prunes neurons. *Accelerated*: all of it on the kernels. *Partly as itself*: the module named is called as it is.",
        "*Refused*: by `accelerate` where the change comes before it, at the next call where it comes after.",
        "",
        "| change | when | config | outcome | reason |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        kind, reason = outcome(case)
        when = "while accelerated" if case.late else "before"
        lines.append(
            f"| {case.what} | {when} | {'pruned by a plan' if case.planned else 'exact'} | {kind} | {reason} |"
        )
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = [
    "## Adapters and quantised weights",
    "",
    "LoRA layers of peft stay on the kernels: the base by the kernel that it had, and beside it the two products of",
    "every active adapter, in the dtype of its weights, scaled (rank-stabilised scalings too). It is peft's result",
    "within rounding (`python_tests/runtime/test_lora.py`). This holds for every linear layer that the runtime",
    "computes, for several active adapters, and for merged or disabled ones. `accelerate` takes peft's wrapper or the",
    "model inside. Each call notices an adapter that was added, removed, switched, scaled, written to, merged or",
    "disabled. Of pruned FFNs a task's neurons are taken of the adapters too, rows of B for gate and up, columns of A",
    "for down, and the weights stay in the model's own order. A plan of the base fits the model with adapters that",
    "are not merged.",
    "",
    "Run as themselves, by name: DoRA and other variants, an adapter with a bias, one with dropout in train mode, one",
    "with a hook, adapters that are merged and disabled at once, other types than LoRA, LoRA on quantised weights,",
    "and on a GPU FFNs with an adapter.",
    "",
    "Weights that torchao has quantised with `Int8WeightOnlyConfig()`, a scale for each row, are read as they are by",
    "int8 kernels on the CPU (`ops.int8_ffn`, `ops.int8_linear`), FFNs over a task's neurons too, which stay in the",
    "model's own order. A row's bits depend on no other row. With bf16 and fp16 activations, on a CPU with AVX512-VNNI,",
    "weights are multiplied as bytes and activations in fixed point, outliers apart,",
    "with far less error than a result's rounding to the dtype ([ops/int8.py](../flashu_ext/ops/int8.py));",
    "elsewhere weights are widened, and with scales of 1 the bits are",
    "those of the same numbers as floats. A plan has to be calibrated on the quantised model. All three",
    "weights of an FFN must be int8. Run as themselves, by name: int8 with quantised activations, with groups or with",
    "one scale, other formats, and int8 where the kernels are switched off or on a GPU.",
    "",
    "A request of `generate_many` or `answer_many` may name one (`adapter=`, as peft's `adapter_names`; `__base__`:",
    "none), whichever is active or disabled, and has the bits that it has with that one active. Requests of several",
    "adapters, and of none, share evaluations and the steps of their tokens: the base reads its weights once for all",
    "rows, and what an adapter adds is computed for its own rows",
    "([runtime/modules/adapters.py](../flashu_ext/runtime/modules/adapters.py)). Prompts are computed by adapter, and no",
    "prefix or encoded image is used by another one. All adapters' layers must be plain and on the kernels then: what",
    "runs as itself would add the active ones, so it is refused by name, as are merged adapters. In a layer that has",
    "adapters rows without one take the same way as those with one, so in 16 bits their last bits may differ from those",
    "of the same model before it had adapters. The model's own calls compute what is active.",
    "",
    "`pipe.load_adapter(name, folder)` loads one that peft's `save_pretrained` has written, from adapter_config.json and",
    "adapter_model.safetensors; adapter_model.bin is a pickle and refused. What is active stays active: where nothing",
    "was, nothing is. The model may be accelerated and in use. Refused by name, and the model is as it was: a taken",
    "name, other kinds than plain LoRA of linear layers (DoRA, PiSSA, biases, trained parts, settings that are not",
    "known), and modules, shapes or ranks that the model does not have.",
    "",
    "Refused by name: an adapter of peft's `target_parameters` that is not merged, which makes its weights anew in",
    "every call.",
    "",
    "## What it costs",
    "",
    "A hook, a wrapper, an adapter or any other class that the library does not know may depend on more than its weights. In",
    "such a model nothing is used again in another call (an image's embedding, a question's prefix), and steps are not captured",
    "in CUDA graphs.",
    "",
    "## Files and copies",
    "",
    "While neurons lie in plan order, `state_dict`, `save_pretrained`, `torch.save`, `copy.deepcopy` and pickle give the model's",
    "own order, bit for bit, and a copy is dense; what is loaded is brought into plan order. `remove()` gives what is in the",
    "model then: the old values, or what was loaded or edited since. `flashu_ext.handle_of(model)` finds a lost handle.",
    "",
    "## What cannot be noticed",
    "",
    "- A part of a weight written through `weight.data`, a numpy array or another tensor in the same memory that was made while",
    "  the model was accelerated: none changes the weight's version. Each call compares a few bytes of every weight, on a GPU of",
    "  a few matrices in turn, so a write to a whole weight is noticed, one to a part may not be, nor on a GPU one to a vector.",
    "  Write to the weight itself, or inside `handle.editing()`. The same holds for prompts of `t2i_generate` that are refilled",
    "  in this way between two calls.",
    "- FFN weights in plan order that are read from `parameters()` (an average of weights, a copy by hand): `state_dict()` gives",
    "  the model's own order, as copies, also with `keep_vars=True`.",
    "- Memory shared with tensors that `gc.freeze()` hides, or with numpy arrays: accelerate such a model without a plan.",
    "- An optimizer's moments of FFN weights that lie in plan order. Train a model before it is accelerated or after `remove()`.",
    "- A dense image that another thread is generating while `accelerate` or `remove()` is called: wait for it.",
    "- An adapter or hook changes its own module's result only from the next image or answer on.",
    "- What a module keeps in attributes that are no numbers, texts, tuples, dtypes or functions, such as a list or an object.",
    "",
    "## Images by turns, threads, solvers",
    "",
    "- A model that is changed while an image or answer is under way, by a callback or by another thread that writes to weights,",
    "  ends it with a RuntimeError. Loading inside `handle.editing()` waits for the step under way instead.",
    "- `on_token` and `editing()` hold the model: what they wait for must not itself draw, answer or ask for a summary.",
    "- Any number of images and answers may be under way, in any threads: each has its own state, and steps take turns.",
    "- A call of `t2i_generate` belongs to the image with the same conditioning and the largest smaller time. Under a config",
    "  whose steps differ, a call that would leave the plan (a repeated or smaller time, more calls than planned, an image that",
    "  was evicted) is a RuntimeError. `summary().evicted` counts images that had to make room.",
    "- An interrupt at any line of `accelerate` leaves the model as it was; after one in `remove()` another call completes it.",
]


def test_the_page_is_what_happens():
    text = page()
    if os.environ.get("FLASHU_WRITE_PAGES"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("planned", [False, True])
def test_copies_of_every_kind_are_dense(planned):
    model, case = small_model(order=ORDER), Case("", lambda m: None, planned=planned)
    expected = draw(model)
    with accelerated(model, case):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for copied in copies:
        assert fx.handle_of(copied) is None and torch.equal(draw(copied), expected)
