"""Runs upstream JanusFlow's own demo loop and answers on a small random model: as they are, accelerated, and with the handle
removed.

    PYTHONPATH=. python python_tests/upstream/janusflow_driver.py CHECKOUT OUT

It needs an environment with the versions that upstream pins. The VAE is a stand-in that returns the latents.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashu_ext as fx
from flashu_ext.bench import e2e
from flashu_ext.bench.families import JanusFlowSubject
from flashu_ext.bench.shapes import weight_plan
from flashu_ext.bench.upstream_janusflow import UpstreamJanusFlowSubject, drawing_loop

IMAGES, STEPS, PAD = 2, 6, 7


class Program:
    """Upstream's class with the demo's loop for two images at once."""

    def __init__(self, root: Path):
        self.own = JanusFlowSubject("tiny", 0)
        self.config = self.own.model.config
        self.subject = UpstreamJanusFlowSubject(root, self.own)
        self.model: Any = self.subject.model
        self.loop = drawing_loop(root, self.model, self.config, IMAGES)
        generator = torch.Generator().manual_seed(3)
        side = self.config.latent_size
        self.noise = torch.randn(2, IMAGES, self.config.latent_channels, side, side, generator=generator)
        self.prompts = [torch.randint(8, self.config.vocab, (count,), generator=generator) for count in (9, 3, 9)]

    def embeds(self, question: Tensor) -> Tensor:
        """A question about the subject's image, embedded by upstream's own method."""
        image = (question == 4) | (question == 5)
        embeds: Tensor = self.model.prepare_inputs_embeds(
            input_ids=question.clone(),
            pixel_values=self.own.pixels[None],
            images_seq_mask=image,
            images_emb_mask=torch.ones(1, 1, int(image.sum()), dtype=torch.bool),
        )
        return embeds

    def answer(self, embeds: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
        """As in the demo."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask
        torch.manual_seed(4)
        usual = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 8, "use_cache": True}
        words = self.model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **usual | settings)
        return torch.cat([words.flatten().float(), torch.rand(1)])  # as many random numbers were taken

    def cases(self) -> dict[str, Tensor]:
        made = {
            "a drawing": self.loop(self.noise[0], self.prompts[0], STEPS, 2.0, PAD),
            "the same prompt again": self.loop(self.noise[1], self.prompts[0], STEPS, 5.0, PAD),
            "a short prompt": self.loop(self.noise[0], self.prompts[1], STEPS, 2.0, PAD),
            "another prompt of the first's length": self.loop(self.noise[0], self.prompts[2], 3, 2.0, PAD),
            "no guidance": self.loop(self.noise[0], self.prompts[2], 3, 1.0, PAD),
        }
        with torch.inference_mode():
            one = self.embeds(self.own.question)
            other = self.embeds(self.own.question[:, 5:])
            made["an answer"] = self.answer(one, do_sample=False, temperature=0, top_p=0.95)
            word = int(made["an answer"][3])
            made["an answer that ends"] = self.answer(one, do_sample=False, eos_token_id=word)
            made["as the demo samples"] = self.answer(one, do_sample=True, temperature=0.9, top_p=0.95)
            made["sampled from all words"] = self.answer(other, do_sample=True, temperature=1.0, top_k=0)
            both = torch.cat([one, torch.cat([torch.zeros_like(one[:, :5]), other], dim=1)])
            mask = torch.ones(both.shape[:2], dtype=torch.int64)
            mask[1, :5] = 0
            made["two answers"] = self.answer(both, mask, do_sample=False, eos_token_id=word)
        return {name: value.clone() for name, value in made.items()}

    @torch.no_grad()
    def unusual(self) -> dict[str, Tensor]:
        """Calls that run upstream's code."""
        embeds, lm = self.embeds(self.own.question), self.model.language_model
        made = {
            "beams": self.answer(embeds, num_beams=2, do_sample=False),
            "several sampled": self.answer(embeds.repeat(2, 1, 1), do_sample=True, temperature=0.5),
            "hidden states": lm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[1],
            "ids": lm(input_ids=self.own.question).logits,
        }
        hidden_first = torch.ones(embeds.shape[:2], dtype=torch.int64)
        hidden_first[:, :3] = 0
        made["hidden first token"] = lm.model(inputs_embeds=embeds, attention_mask=hidden_first).last_hidden_state[
            :, 3:
        ]
        return made


def difference(before: Tensor, after: Tensor) -> float:
    """Relative L2; of other shapes infinite."""
    return float((after - before).norm() / before.norm()) if before.shape == after.shape else float("inf")


def differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    return {name: difference(value, after[name]) for name, value in before.items()}


def messages(program: Program) -> list[str]:
    """Of refusals, and of keys and values that nobody has."""
    model, found = program.model, []

    def tried(action: Any) -> None:
        try:
            action()
            found.append("none")
        except (TypeError, ValueError, RuntimeError) as error:
            found.append(str(error))

    hook = model.vision_gen_dec_model.mid_block.register_forward_hook(lambda *_: None)
    tried(lambda: fx.accelerate(model))
    hook.remove()
    layer = model.language_model.model.layers[1].self_attn
    layer.rotary_emb.inv_freq = layer.rotary_emb.inv_freq * 2
    tried(lambda: fx.accelerate(model))
    layer.rotary_emb.inv_freq = layer.rotary_emb.inv_freq / 2
    model.language_model.generate = lambda *_: None
    tried(lambda: fx.accelerate(model))
    del model.language_model.generate
    tried(lambda: fx.janusflow.sample(model, program.noise[0], program.prompts[0], 2))
    with fx.accelerate(model), torch.no_grad():
        out = model.language_model.model(inputs_embeds=torch.randn(1, 5, program.config.hidden))
        tried(lambda: out.past_key_values[0])
        tried(
            lambda: model.language_model.model(inputs_embeds=torch.randn(1, 1, 64), past_key_values=out.past_key_values)
        )
    return found


def own_functions(program: Program, drawn: Tensor, answered: Tensor) -> dict[str, float]:
    """`fx.janusflow.sample` and `answer_tokens` given the accelerated upstream instance, against its own results."""
    model, own = program.model, program.own
    with fx.accelerate(model):
        latents = fx.janusflow.sample(model, program.noise[0], program.prompts[0], STEPS, 2.0, PAD)
        words = fx.janusflow.answer_tokens(model, own.pixels, own.question, 8, 2)
    return {"sample": difference(drawn, latents), "answer": difference(answered[:-1], words.float())}


def presets(program: Program) -> dict[str, Any]:
    """An approximate preset: by our sampler, and under the loop, which runs every evaluation whole."""
    model, own = program.model, program.own
    plan, config = weight_plan(model, 8), fx.FlashUConfig.paper(steps=STEPS + 1, prune_multiple=8)
    plain = program.loop(program.noise[0], program.prompts[0], STEPS, 2.0, PAD)
    with fx.accelerate(model, config.replace(token_prune_ratio=0.5), plan) as handle:
        under = program.loop(program.noise[0], program.prompts[0], STEPS, 2.0, PAD)
        with torch.inference_mode():
            program.answer(program.embeds(own.question), do_sample=False)
        reasons = list(handle.summary().fallbacks)
        drawn = fx.janusflow.sample(model, program.noise[0], program.prompts[0], STEPS, 2.0, PAD)
        answer = fx.janusflow.answer_tokens(model, own.pixels, own.question, 4)
        steps, tokens = handle.summary().steps, handle.summary().tokens
    return {
        "under the loop": difference(plain, under),
        "reasons": reasons,
        "by sample": difference(plain, drawn),
        "steps": steps,
        "kept": tokens["visual kept"] / tokens["visual"],
        "words": answer.numel(),
    }


def changed_weights(program: Program) -> float:
    """A drawing after its weights were written to, against upstream's code on the same weights."""
    model = program.model
    state = copy.deepcopy(model.state_dict())
    weight = model.language_model.model.layers[0].mlp.gate_proj.weight
    with fx.accelerate(model):
        program.loop(program.noise[0], program.prompts[0], 2, 2.0, PAD)
        with torch.no_grad():
            weight.mul_(1.5)
        after = program.loop(program.noise[0], program.prompts[0], 2, 2.0, PAD)
    expected = program.loop(program.noise[0], program.prompts[0], 2, 2.0, PAD)
    model.load_state_dict(state)
    return difference(expected, after)


def main(root: Path, out: Path) -> None:
    torch.set_num_threads(1)
    program = Program(root)
    model = program.model
    state = {name: (value, value.detach().clone()) for name, value in model.named_parameters()}
    children = dict(model.named_modules())
    facts: dict[str, Any] = {name: metadata.version(name) for name in ("torch", "transformers")}
    plain, odd = program.cases(), program.unusual()
    handle = fx.accelerate(model)
    during = program.cases()
    facts["usual fallbacks"] = dict(handle.summary().fallbacks)
    facts["prefilled"] = handle.summary().tokens["prefilled"]
    facts["unusual"] = differences(odd, program.unusual())
    facts["all fallbacks"] = dict(handle.summary().fallbacks)
    copied = copy.deepcopy(model)
    language = copied.language_model
    facts["copies are dense"] = "forward" not in vars(language.model) and "generate" not in vars(language)
    handle.remove()
    facts["removed"] = differences(plain, program.cases())
    facts["cases"] = differences(plain, during)
    facts["same bits"] = [name for name in plain if torch.equal(plain[name], during[name])]
    facts["methods left"] = [
        name for module in model.modules() for name in ("forward", "generate", "__deepcopy__") if name in vars(module)
    ]
    facts["same modules"] = children == dict(model.named_modules())
    facts["same parameters"] = all(
        value is state[name][0] and torch.equal(value, state[name][1]) for name, value in model.named_parameters()
    )
    facts["messages"] = messages(program)
    facts["own"] = own_functions(program, plain["a drawing"], plain["an answer"])
    facts["presets"], facts["changed weights"] = presets(program), changed_weights(program)
    settings = e2e.Settings("tiny", "janusflow", root, steps=6, paper_steps=5, repeats=1, tokens=(5,))
    facts["e2e"] = [[row.program, row.preset, not row.disagrees] for row in e2e.run(settings, lambda text: None).rows]
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:3]))
