"""Runs upstream Show-o2's own inference scripts on a small random model, as they are and with our line.

    PYTHONPATH=. python python_tests/upstream/driver.py CHECKOUT README OUT

It needs an environment with the versions that upstream pins. The scripts' text, classes, masks, sampler and image preparation are
the checkout's own. Stand-ins replace what needs a network, published weights or a video library: the tokenizer, the Wan VAE,
`from_pretrained` (it returns one small instance of the unmodified class), the safety checker, wandb and decord.
Writes OUT/{t2i,mmu}.safetensors (outputs of the three runs plain, accelerated, removed) and OUT/facts.json.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flashu_ext import accelerate
from flashu_ext.bench import e2e, e2e_gpu
from flashu_ext.bench.checkouts import declare_operators, module
from flashu_ext.bench.shapes import SHAPES, fill
from flashu_ext.bench.upstream import UpstreamSubject, build
from flashu_ext.models.showo2 import answer_tokens, sample

SHAPE = SHAPES["tiny"]
CONFIG = SHAPE.config
PROMPTS = ("a red circle above a blue square", "two green triangles", "one yellow star")
QUESTION = "what is it *** which color is the small one"


def added_lines(readme: Path) -> dict[str, tuple[str, list[str]]]:
    """Script -> (context line, lines to add after it), read from the README's diff blocks."""
    found = {}
    for block in re.findall(r"```diff\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        lines = block.splitlines()
        name = next(line.split()[-1] for line in lines if line.startswith("+++"))
        body = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
        context = [line[1:].strip() for line in body if line.startswith(" ")]
        found[name] = (context[-1], [line[1:].strip() for line in body if line.startswith("+")])
    return found


def with_lines(source: str, context: str, lines: list[str]) -> str:
    """`source` with `lines` after the one line that reads `context`, at its indentation."""
    matches = [match for match in re.finditer(r"^([ \t]*)(.*)$", source, re.MULTILINE) if match[2].strip() == context]
    if len(matches) != 1:
        raise ValueError(f"context: expected one line {context!r}, found {len(matches)}")
    (match,) = matches
    return source[: match.end()] + "".join(f"\n{match[1]}{line}" for line in lines) + source[match.end() :]


class Tokenizer:
    """Maps words to ids by a checksum; has the calls that the scripts make. Records what it decodes."""

    vocabulary = CONFIG.llm_vocab_size
    pad_token_id, eos_token_id = vocabulary - 1, vocabulary - 2
    special = {  # noqa: RUF012
        name: CONFIG.llm_vocab_size - 2 - i
        for i, name in enumerate(
            ("eos_id", "bos_id", "boi_id", "eoi_id", "bov_id", "eov_id", "img_pad_id", "vid_pad_id", "img_id")
        )
    }

    def __init__(self) -> None:
        self.decoded: list[Tensor] = []

    def __len__(self) -> int:
        return self.vocabulary

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        from transformers import BatchEncoding

        ids = [zlib.crc32(word.encode()) % (self.vocabulary - 16) for word in text.split()]
        return BatchEncoding({"input_ids": ids})

    def batch_decode(self, tokens: Tensor, skip_special_tokens: bool) -> list[str]:
        self.decoded.append(tokens.clone())
        return [" ".join(map(str, row.tolist())) for row in tokens]


class Vae:
    """Maps pooled pixels to latents and back by a fixed matrix. Records the latents it decodes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.matrix = torch.randn(CONFIG.image_latent_dim, 3, generator=generator)
        self.side = CONFIG.image_latent_height * CONFIG.patch_size
        self.decoded: list[Tensor] = []

    def sample(self, images: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(images.squeeze(2), self.side)
        return torch.einsum("cr,brhw->bchw", self.matrix, pooled).unsqueeze(2)

    def batch_decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents.clone())
        return torch.einsum("cr,bcthw->brthw", self.matrix, latents).tanh()


@contextlib.contextmanager
def stand_ins(root: Path, model: Any, vae: Vae, tokenizer: Tokenizer) -> Iterator[None]:
    """Replaces what the scripts import or load besides the checkout's own models, masks and sampler."""
    anything = mock.MagicMock
    checker = mock.MagicMock()
    checker.from_pretrained.return_value = lambda images, clip_input: (images, [False] * len(images))
    loader = mock.MagicMock()
    loader.from_pretrained.return_value = model
    models, misc = importlib.import_module("models"), importlib.import_module("models.misc")
    spec = importlib.util.spec_from_file_location("datasets.utils", root / "datasets" / "utils.py")
    assert spec is not None and spec.loader is not None
    preparation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preparation)
    modules = {
        "wandb": module("wandb", **{name: anything() for name in ("init", "log", "Image", "util")}),
        "decord": module("decord", VideoReader=anything(), cpu=anything()),
        "datasets": module("datasets", __path__=[], utils=preparation),
        "datasets.utils": preparation,
        "diffusers.pipelines.stable_diffusion.safety_checker": module("x", StableDiffusionSafetyChecker=checker),
    }
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(sys, "path", [str(root), *sys.path]),
        mock.patch.object(models, "Showo2Qwen2_5", loader),
        mock.patch.object(models, "WanVAE", lambda **_: vae),
        mock.patch.object(misc, "get_text_tokenizer", lambda *_, **__: (tokenizer, tokenizer.special)),
        mock.patch.object(importlib.import_module("transformers"), "AutoFeatureExtractor", anything()),
    ):
        yield


def run_script(root: Path, name: str, source: str, arguments: list[str], model: Any) -> tuple[list[Tensor], Any]:
    """(everything that the script decoded with the VAE or the tokenizer, its handle or None)."""
    vae, tokenizer = Vae(), Tokenizer()
    torch.manual_seed(3)
    with stand_ins(root, model, vae, tokenizer), mock.patch.object(sys, "argv", [name, *arguments]):
        names: dict[str, Any] = {"__name__": "__main__", "__file__": str(root / name)}
        exec(compile(source, str(root / name), "exec"), names)
    return (vae.decoded or tokenizer.decoded), names.get("handle")


def arguments_of(root: Path, out: Path) -> dict[str, list[str]]:
    """Command lines of the two scripts: upstream's own 432 px config, with the small model's sizes."""
    prompts, images = out / "prompts.txt", out / "images"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    images.mkdir()
    for i in range(2):
        pixels = torch.randint(0, 256, (80, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(images / f"{i}.png")
    patches = CONFIG.image_latent_height * CONFIG.image_latent_width
    common = [
        f"config={root / 'configs' / 'showo2_1.5b_demo_432x432.yaml'}",
        "wandb.run_id=none",
        "model.weight_type=float32",
        f"model.showo.image_latent_height={CONFIG.image_latent_height}",
        f"model.showo.image_latent_width={CONFIG.image_latent_width}",
        f"dataset.preprocessing.max_seq_length={SHAPE.sequence}",
        f"dataset.preprocessing.num_t2i_image_tokens={patches}",
        f"dataset.preprocessing.num_mmu_image_tokens={patches}",
        "dataset.preprocessing.resolution=64",
    ]
    generation = ["batch_size=2", "guidance_scale=5.0", "num_inference_steps=8"]
    generation += [f"dataset.params.validation_prompts_file={prompts}"]
    return {"t2i": [*common, *generation], "mmu": [*common, f"mmu_image_path={images}", f"question={QUESTION}"]}


def compared(root: Path) -> list[list[Any]]:
    """[program, preset, size, agrees] for every row of `flashu-ext bench e2e --upstream` on the small model."""
    report = e2e.run(
        e2e.Settings("tiny", upstream=root, steps=12, paper_steps=9, repeats=1, tokens=(5,)), lambda text: None
    )
    return [[row.program, row.preset, row.size, not row.disagrees] for row in report.rows]


def measured(root: Path) -> list[list[Any]]:
    """[task, variant, note] for every row of `bench e2e --gpu`, on the CPU, that runs upstream's class on our model's weights."""
    settings = e2e_gpu.Settings(
        ("tiny",), (2,), e2e_gpu.VARIANTS[:2], upstream=root, device="cpu", steps=7, tokens=2, repeats=1
    )
    return [[row.task, row.variant, row.note] for row in e2e_gpu.run(settings).rows]


def other_sizes(subject: UpstreamSubject) -> list[list[Any]]:
    """[grid, relative difference] of images that the accelerated instance draws at other sizes than its config's, from those
    that upstream's code draws with the positions that its constructor registers for such a grid."""
    model, own, found = subject.model, subject.model.image_position_ids, []
    for height, width in ((6, 6), (3, 5)):
        generator, span = torch.Generator().manual_seed(height), height * width + 1
        tokens = torch.randint(0, 100, (2, span + 9), generator=generator)
        noise = torch.randn(1, CONFIG.image_latent_dim, 2 * height, 2 * width, generator=generator)
        positions = torch.tensor([[[5, span]], [[2, span]]])
        inputs = SimpleNamespace(
            noise=noise,
            text_tokens=tokens[:1],
            text_tokens_null=tokens[1:],
            positions=positions[:1],
            positions_null=positions[1:],
        )
        model.image_position_ids = torch.arange(height * width).expand((1, -1))
        theirs = subject.generate(inputs, 8, 5.0, 3.0)
        model.image_position_ids = own
        with accelerate(model):
            ours = sample(model, noise, tokens[:1], tokens[1:], positions[:1], positions[1:], steps=8)
        found.append([[height, width], float((ours - theirs).norm() / theirs.norm())])
    return found


@torch.no_grad()
def several_images(subject: UpstreamSubject) -> list[list[int]]:
    """Answers about one to three images: [images, tokens equal to those of upstream's `mmu_generate`], of 8 tokens.

    The prompt is that of inference_mmu.py with its part from boi to eoi once for each image, under upstream's own mask.
    """
    model, embed, found = subject.model, subject.model.showo.model.embed_tokens, []
    side, late = CONFIG.image_latent_height * CONFIG.patch_size, 1
    for count in (1, 2, 3):
        generator = torch.Generator().manual_seed(count)
        before, after = (torch.randint(0, 100, (1, length), generator=generator) for length in (4, 7))
        images = torch.randn(count, 1, CONFIG.image_latent_dim, side, side, generator=generator).unbind()
        time = model.time_embed(torch.tensor([[1.0]]), torch.float32)
        time = model.time_embed_proj(time) if hasattr(model, "time_embed_proj") else time
        pieces, spans, question = [embed(before)], [], embed(after)
        for latents in images:
            semantic = model.image_embedder_und(latents) + model.position_embedding(model.image_position_ids)
            semantic = model.und_trans(semantic)["last_hidden_state"]
            image = model.fusion_proj(torch.cat([semantic, model.image_embedder_gen(latents)], dim=-1))
            spans.append((sum(piece.shape[1] for piece in pieces) + 1 + late, image.shape[1] + late))
            pieces += [question[:, :1], time.reshape(1, 1, -1), image, question[:, 1:2]]
        embeds = torch.cat([*pieces, question[:, 2:]], dim=1)
        mask = subject.checkout.attention.omni_attn_mask_naive(1, embeds.shape[1], torch.tensor([spans]), embeds.device)
        theirs = model.mmu_generate(embeds, attention_mask=mask.float(), max_new_tokens=8, top_k=1, eos_token=None)
        with accelerate(model):
            ours = answer_tokens(model, list(images), before, after, max_new_tokens=8)
        found.append([count, int((torch.stack(theirs).flatten() == ours).sum())])
    return found


def main(root: Path, readme: Path, out: Path) -> None:
    declare_operators()
    torch.set_num_threads(1)
    subject = build(root, CONFIG)
    model = subject.model
    fill(model, 0)
    with torch.no_grad():  # a likely end token: answers end before the scripts' 300 tokens
        model.showo.lm_head.weight[Tokenizer.eos_token_id] *= 2
    parameters = {name: (value, value.detach().clone()) for name, value in model.named_parameters()}
    children = dict(model.named_modules())
    added = added_lines(readme)
    facts: dict[str, Any] = {name: metadata.version(name) for name in ("torch", "transformers", "diffusers")}
    for task, arguments in arguments_of(root, out).items():
        name = f"inference_{task}.py"
        plain = (root / name).read_text(encoding="utf-8")
        before, none = run_script(root, name, plain, arguments, model)
        during, handle = run_script(root, name, with_lines(plain, *added[name]), arguments, model)
        summary = handle.summary()
        handle.remove()
        after, _ = run_script(root, name, plain, arguments, model)
        runs = {"plain": before, "accelerated": during, "removed": after}
        save_file(
            {f"{run}.{i}": value.contiguous() for run, values in runs.items() for i, value in enumerate(values)},
            out / f"{task}.safetensors",
        )
        facts[task] = {
            "handle without the line": none is not None,
            "backbone": summary.backbone_evaluations,
            "prefilled": summary.tokens["prefilled"],
            "fallbacks": dict(summary.fallbacks),
            "methods left": [key for key in ("t2i_generate", "mmu_generate") if key in vars(model)],
        }
    facts["same modules"] = children == dict(model.named_modules())
    facts["same parameters"] = all(
        value is parameters[name][0] and torch.equal(value, parameters[name][1])
        for name, value in model.named_parameters()
    )
    facts["sizes"], facts["several images"] = other_sizes(subject), several_images(subject)
    facts["e2e"], facts["e2e_gpu"] = compared(root), measured(root)
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:4]))
