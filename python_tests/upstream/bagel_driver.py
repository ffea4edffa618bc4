"""Runs upstream BAGEL's own inferencer on a small random model: as it is, accelerated, and with the handle removed.

    PYTHONPATH=. python python_tests/upstream/bagel_driver.py CHECKOUT OUT

It needs an environment with the versions that upstream pins. Tokenizer, VAE and the pictures' resizing are stand-ins: a text is
its ids, and the VAE gives random latents.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import flashu_ext as fx
from flashu_ext.bench import e2e
from flashu_ext.bench.families import SIZES
from flashu_ext.bench.shapes import fill, weight_plan
from flashu_ext.bench.upstream_bagel import Words, build, load
from flashu_ext.models.bagel.images import pixels
from flashu_ext.models.bagel.latents import unpacked

IDS = {"bos_token_id": 1, "eos_token_id": 2, "start_of_image": 3, "end_of_image": 4}
SIZE = (48, 64)


class Vae:
    """Random latents; records what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[Tensor] = []

    def encode(self, images: Tensor) -> Tensor:
        return torch.randn(len(images), 16, images.shape[2] // 8, images.shape[3] // 8)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents.clone())
        return latents[:, :3].tanh()


class Resize:
    """To 3 x 4 patches."""

    def __init__(self, patch: int):
        self.patch = patch

    def resize_transform(self, image: Any) -> Any:
        return image.resize((4 * self.patch, 3 * self.patch))

    def __call__(self, image: Any) -> Tensor:
        return pixels(self.resize_transform(image))[0]


def picture(seed: int) -> Any:
    values = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy())


CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a text": (["11 12 13"], {"image_shapes": SIZE}),
    "a guided time at the interval's end": (["11 12 13"], {"image_shapes": SIZE, "num_timesteps": 12}),
    "no guidance": (["11 12 13"], {"image_shapes": SIZE, "cfg_text_scale": 1.0}),
    "an edit": (
        [picture(0), "41 42"],
        {"cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "cfg_renorm_type": "text_channel"},
    ),
    "texts and images": (["11 12", picture(0), "5 6", picture(1), "7"], {"cfg_img_scale": 1.2}),
    "an answer": ([picture(0), "20 21"], {"understanding_output": True, "max_think_token_n": 9}),
    "a drawn answer": (
        [picture(0), "20 21"],
        {"understanding_output": True, "max_think_token_n": 9, "do_sample": True, "text_temperature": 0.7},
    ),
    "thought, then drawn": (["20 21"], {"think": True, "max_think_token_n": 7, "image_shapes": SIZE}),
    "thought about an image, then drawn": ([picture(1), "20 21"], {"think": True, "max_think_token_n": 7}),
    "TaylorSeer": (["20 21"], {"image_shapes": SIZE, "enable_taylorseer": True, "num_timesteps": 15}),
}


class Program:
    """Upstream's inferencer on a small instance of its class."""

    def __init__(self, root: Path):
        config = fx.bagel.BagelConfig(**SIZES["bagel"]["tiny"])  # type: ignore[arg-type]
        self.model: Any = build(root, config)
        fill(self.model, 0)
        upstream: Any = load(root)[1]
        upstream.VLM_THINK_SYSTEM_PROMPT, upstream.GEN_THINK_SYSTEM_PROMPT = "30 31 32", "33 34"
        self.vae = Vae()
        self.run = upstream.InterleaveInferencer(self.model, self.vae, Words(), Resize(16), Resize(14), IDS)

    def forget(self) -> None:
        """Switch TaylorSeer off: upstream's layers stay switched on after their first image."""
        stack = self.model.language_model.model
        for module in (stack, *stack.layers):
            for name in ("enable_taylorseer", "cache_dic", "current"):
                vars(module).pop(name, None)

    def outputs(self, inputs: list[Any], **settings: Any) -> list[Any]:
        """Latents that were decoded, and texts, under one state of the random numbers."""
        torch.manual_seed(5)
        self.vae.decoded.clear()
        result = self.run.interleave_inference(inputs, **{"num_timesteps": 8, **settings})
        after = torch.rand(1)  # as many random numbers were taken
        return [*self.vae.decoded, *(each for each in result if isinstance(each, str)), after]

    def cases(self, forget: bool) -> dict[str, list[Any]]:
        made = {}
        for name, (inputs, settings) in CASES.items():
            made[name] = self.outputs(inputs, **settings)
            if forget:
                self.forget()
        made["chat"] = [self.model.chat(Words(), IDS, Resize(14), [picture(0), picture(1)], "20 30", 6)]
        return made


def differences(before: list[Any], after: list[Any]) -> list[float]:
    """Relative L2 of tensors; 0 or 1 of texts."""
    return [
        float((a - b).norm() / a.norm()) if isinstance(a, Tensor) else float(a != b)
        for a, b in zip(before, after, strict=True)
    ]


def unusual(program: Program) -> dict[str, list[Any]]:
    """Calls beyond the inferencer's: caches that are read, kept and continued."""
    run, model, made = program.run, program.model, {}
    torch.manual_seed(6)
    with torch.no_grad():
        context = run.update_context_text("11 12 13", run.init_gen_context())
        read = copy.deepcopy(context)
        made["keys"] = [read["past_key_values"].key_cache[1], float(read["past_key_values"].seq_lens)]
        made["behind keys that were read"] = [run.gen_text(read, max_length=5, do_sample=False)]
        prepared = model.prepare_start_tokens(context["kv_lens"], context["ropes"], IDS)
        cache = copy.deepcopy(context["past_key_values"])
        words = model.generate_text(cache, max_length=4, **prepared)
        made["an answer's cache"] = [words.float(), cache.key_cache[2], cache.value_cache[0]]
        lengths, ropes = [0, 0], [0, 0]
        inputs, lengths, ropes = model.prepare_prompts(lengths, ropes, ["11 12", "13 14 15"], Words(), IDS)
        two = model.forward_cache_update_text(run.init_gen_context()["past_key_values"], **inputs)
        inputs = model.prepare_vae_latent(lengths, ropes, [SIZE, (32, 32)], IDS)
        drawn = model.generate_image(past_key_values=two, num_timesteps=4, **inputs)
        made["two images at once"] = list(drawn)
    return made


def placed(program: Program) -> dict[str, Any]:
    """On a model that accelerate's hooks place, as upstream's app.py loads it."""
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    model, inputs, settings = program.model, *CASES["a text"]
    plain = program.outputs(inputs, **settings)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with fx.accelerate(program.run) as handle:
        found = {"difference": differences(plain, program.outputs(inputs, **settings))}
        found["fallbacks"] = dict(handle.summary().fallbacks)
        found["evaluations"] = [handle.summary().backbone_evaluations]
    remove_hook_from_submodules(model)
    for name in ("to", "cuda", "npu", "xpu", "mlu", "musa", "hf_device_map"):
        vars(model).pop(name, None)
    with fx.accelerate(program.run):  # the class's methods are attributes of the modules now
        found["after"] = differences(plain, program.outputs(inputs, **settings))
    for module in model.modules():
        vars(module).pop("forward", None)
    layer = model.language_model.model.layers[0]
    layer.forward = lambda *_: None
    add_hook_to_module(layer, AlignDevicesHook("cpu"))  # around a forward that is not the class's
    try:
        fx.accelerate(model)
    except TypeError as error:
        found["refused"] = [str(error)]
    remove_hook_from_submodules(model)
    del layer.forward
    return found


def refusals(program: Program) -> list[str]:
    """Messages of models that cannot be accelerated, and of a sampler of ours without acceleration."""
    model, messages = program.model, []

    def tried(action: Any) -> None:
        try:
            action()
            messages.append("none")
        except (TypeError, ValueError) as error:
            messages.append(str(error))

    layer = model.language_model.model.layers[1]
    hook = layer.register_forward_hook(lambda *_: None)
    tried(lambda: fx.accelerate(model))
    hook.remove()
    model.vit_model.vision_model.encoder.forward = lambda *_: None
    tried(lambda: fx.accelerate(model))
    del model.vit_model.vision_model.encoder.forward
    model.generate_image = lambda *_: None
    tried(lambda: fx.accelerate(model))
    del model.generate_image
    noise, prompt = torch.randn(12, 64), [fx.bagel.Text(torch.tensor([11]))]
    tried(lambda: fx.bagel.sample(model, noise, prompt, SIZE, IDS, 4))
    return messages


def own_sampler(program: Program) -> list[float]:
    """`fx.bagel.sample` and `answer_tokens` given the accelerated upstream instance, against its own results."""
    torch.manual_seed(5)
    noise = torch.randn(12, 64)
    with fx.accelerate(program.model):
        guided = {"cfg_text_scale": 3.0, "cfg_img_scale": 1.5}
        tokens = fx.bagel.sample(
            program.model, noise, [fx.bagel.Text(torch.tensor([11, 12, 13]))], SIZE, IDS, 8, **guided
        )
    latents = program.outputs(["11 12 13"], image_shapes=SIZE)[0]
    config = fx.bagel.BagelConfig(**SIZES["bagel"]["tiny"])  # type: ignore[arg-type]
    return differences([latents], [unpacked(tokens, SIZE, config)])


def main(root: Path, out: Path) -> None:
    torch.set_num_threads(1)
    program = Program(root)
    state = {name: (value, value.detach().clone()) for name, value in program.model.named_parameters()}
    children = dict(program.model.named_modules())
    facts: dict[str, Any] = {name: metadata.version(name) for name in ("torch", "transformers")}
    plain = program.cases(forget=True)
    odd = unusual(program)
    earlier = program.run.update_context_text("11 12 13", program.run.init_gen_context())
    before = program.run.gen_text(earlier, max_length=5, do_sample=False)
    handle = fx.accelerate(program.run)
    during = program.cases(forget=False)
    facts["usual fallbacks"] = dict(handle.summary().fallbacks)
    odd_during = unusual(program)
    kept = program.run.update_context_text("11 12 13", program.run.init_gen_context())
    facts["a context of before"] = before == program.run.gen_text(earlier, max_length=5, do_sample=False)
    facts["all fallbacks"] = dict(handle.summary().fallbacks)
    copied = copy.deepcopy(program.model)
    facts["copies are dense"] = fx.handle_of(copied) is None and "generate_image" not in vars(copied)
    handle.remove()
    facts["a context of then"] = before == program.run.gen_text(kept, max_length=5, do_sample=False)
    facts["removed"] = {name: differences(plain[name], own) for name, own in program.cases(forget=True).items()}
    facts["cases"] = {name: differences(plain[name], own) for name, own in during.items()}
    facts["same bits"] = [name for name in CASES if all(map(_equal, plain[name][:-1], during[name][:-1]))]
    facts["unusual"] = {name: differences(odd[name], own) for name, own in odd_during.items()}
    facts["same modules"] = children == dict(program.model.named_modules())
    facts["same parameters"] = all(
        value is state[name][0] and torch.equal(value, state[name][1])
        for name, value in program.model.named_parameters()
    )
    facts["placed"] = placed(program)
    facts["refusals"], facts["own sampler"] = refusals(program), own_sampler(program)
    plan = weight_plan(program.model, 8)
    with fx.accelerate(program.run, fx.FlashUConfig.paper(steps=8, prune_multiple=8), plan) as handle:
        approximate = program.outputs(["11 12 13"], image_shapes=SIZE)[0]
        facts["paper"] = [float(approximate.isfinite().all()), handle.summary().steps]
    report = e2e.run(
        e2e.Settings("tiny", "bagel", root, steps=12, paper_steps=9, repeats=1, tokens=(5,)), lambda text: None
    )
    facts["e2e"] = [[row.program, row.preset, row.size, not row.disagrees] for row in report.rows]
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else False


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:3]))
