"""What evaluations cost before any clock runs: operators launched, dense and by kind of evaluation, and the
memory that the step runner keeps at the published shapes.

Counted, not timed: the number of operators depends on a model's layers and on the code, not on widths or on the device, so
models with the layers of the published ones and narrow widths are run on the CPU. On a GPU whose evaluations are captured
the same work is a few graph launches. Memory is counted at the true shapes, on the meta device.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import torch

from ..models.accelerated import handle_of
from ..models.adapter import adapter_of
from ..models.showo2 import Showo2, Showo2Config, answer_tokens, sample
from ..ops import machine
from ..planning.config import FlashUConfig
from ..planning.safe_files import write_text
from ..runtime.counting import DispatchCounter
from ..runtime.handle import accelerate
from ..runtime.image_memory import ImageMemory, ImageShape
from .shapes import SHAPES, Inputs, Shape, fill, inputs, weight_plan

__all__ = ["launches", "main", "memory", "tables"]

PUBLISHED = ("1.5b", "7b")


def _narrow(shape: Shape) -> Shape:
    """As deep as a published model, as wide as the tiny one."""
    tiny, config = SHAPES["tiny"], shape.config
    depth: dict[str, dict[str, Any]] = {
        part: {**getattr(tiny.config, part), name: getattr(config, part)[name]}
        for part, name in (("llm", "num_hidden_layers"), ("vision", "num_hidden_layers"), ("head", "num_layers"))
    }
    return dataclasses.replace(tiny, config=Showo2Config(**{**vars(tiny.config), **depth}))


def launches(name: str) -> dict[str, Any]:
    """Operators by what runs: {'evaluation': {program: {kind: count}}, 'answer token': {program: count}}.

    Args:
        name: '1.5b' or '7b'.
    """
    shape = _narrow(SHAPES[name])
    model = Showo2(shape.config)
    fill(model, seed=0)
    data = inputs(shape, seed=0)
    plan = weight_plan(model, shape.prune_multiple)
    paper = FlashUConfig.paper(prune_multiple=shape.prune_multiple)
    evaluation: dict[str, dict[str, int]] = {}
    with DispatchCounter() as two, torch.no_grad():
        _generate(model, data, 3)
    with DispatchCounter() as one, torch.no_grad():
        _generate(model, data, 2)
    evaluation["dense"] = {"full": two.counts.launched - one.counts.launched}
    for program, config in (("exact", FlashUConfig.exact(steps=4)), ("paper", paper)):
        with accelerate(model, config, plan if config.needs_plan else None) as handle:
            _generate(model, data, None)
            evaluation[program] = dict(handle.summary().launches)
    answer = {"dense": _answer_token(model, data)}
    with accelerate(model, FlashUConfig.exact()):
        answer["exact"] = _answer_token(model, data)
    return {"evaluation": evaluation, "answer token": answer}


def _generate(model: Any, data: Inputs, steps: int | None) -> None:
    tensors = (data.noise, data.text_tokens, data.text_tokens_null, data.positions, data.positions_null)
    sample(model, *tensors, steps=steps, guidance_scale=5.0)


def _answer_token(model: Any, data: Inputs) -> int:
    """Operators of one more token."""
    counts = []
    for tokens in (3, 4):
        if (handle := handle_of(model)) is not None:
            handle.runner.reset()
        with DispatchCounter() as counter, torch.no_grad():
            answer_tokens(model, data.image_latents, data.before, data.after, max_new_tokens=tokens)
        counts.append(counter.counts.launched)
    return counts[1] - counts[0]


def memory(name: str, images: int) -> dict[str, int]:
    """Bytes by purpose: bf16 weights, and the step runner's memory to generate `images` at once, guided, at 432 px with paper's
    settings. Intermediate results of one layer come on top, and the image codec, which is not ours."""
    shape = SHAPES[name]
    config = shape.config
    with torch.device("meta"):
        model = Showo2(config).to(torch.bfloat16)
    parts = adapter_of(model)
    latent_size = (config.image_latent_height * config.patch_size, config.image_latent_width * config.patch_size)
    wanted = ImageShape(2 * images, images, latent_size, shape.sequence, shape.prompt + 2, 49)
    image_memory = ImageMemory(parts, FlashUConfig.paper(), wanted.rounded(), fixed=True)
    return {"weights": sum(parameter.nbytes for parameter in model.parameters()), **image_memory.nbytes()}


def tables(record: dict[str, Any]) -> str:
    """Markdown: launches, then memory."""
    lines = ["| program | evaluation | operators | operators an answer token |", "|---|---|---|---|"]
    counted = record["launches"]
    for program, kinds in counted["evaluation"].items():
        for number, (kind, count) in enumerate(kinds.items()):
            token = counted["answer token"].get(program, "") if number == 0 else ""
            lines.append(f"| {program} | {kind} | {count:,} | {token} |")
    purposes = list(record["memory"][0]["bytes"])
    lines += [
        "",
        "| GiB | images | " + " | ".join(purposes) + " | all |",
        "|---|---" + "|---" * len(purposes) + "|---|",
    ]
    for entry in record["memory"]:
        sizes = [entry["bytes"].get(purpose, 0) for purpose in purposes]
        cells = " | ".join(f"{size / 2**30:.2f}" for size in (*sizes, sum(sizes)))
        lines.append(f"| {entry['model']} | {entry['images']} | {cells} |")
    return "\n".join(lines)


@click.command(epilog="Example: python -m flashu_ext.bench steps --json steps.json")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the counts here.")
def main(path: Path | None) -> None:
    """Count operators an evaluation and an answer token launch, and the step runner's memory; no GPU needed."""
    record = {
        "command": machine.command_line(),
        "machine": machine.facts(),
        # 1.5B and 7B have the same layers, so the same operators.
        "launches": launches("1.5b"),
        "memory": [
            {"model": name, "images": images, "bytes": memory(name, images)} for name in PUBLISHED for images in (1, 4)
        ],
    }
    click.echo(tables(record))
    if path is not None:
        write_text(path, json.dumps(record, indent=1) + "\n")
