"""FFNs of a plain Qwen2 of transformers on some of their neurons, by one op, beside the model with those neurons cut out.

Example: python examples/qwen2.py --keep 0.8
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import flashu_ext as fx

CONFIG = Qwen2Config(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)


def keep_neurons(model: nn.Module, runs: list[tuple[int, int]]) -> None:
    """Let every FFN of a model of transformers (Qwen2, Llama, Mistral, ...) use the neurons in `runs`, (start, length).

    Weights stay where they are. The op computes a SwiGLU without biases, for inference: it has no backward.
    """
    for layer in model.model.layers:
        mlp = layer.mlp
        selection = fx.ops.Selection.from_runs(
            runs, limit=mlp.gate_proj.out_features, device=mlp.gate_proj.weight.device
        )
        mlp.forward = functools.partial(
            fx.ops.gathered_ffn,
            w_gate=mlp.gate_proj.weight,
            w_up=mlp.up_proj.weight,
            w_down=mlp.down_proj.weight,
            selection=selection,
        )


def cut_neurons(model: nn.Module, runs: list[tuple[int, int]]) -> None:
    """The same neurons as weights of their own."""
    kept = torch.cat([torch.arange(start, start + length) for start, length in runs])
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight.detach()[kept])
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach()[kept])
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, kept])


def main() -> None:
    """Print how far the two models' logits are apart; exit code 1 where it is more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.8, help="fraction of the neurons (default 0.8)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, pruned = Qwen2ForCausalLM(CONFIG).eval(), Qwen2ForCausalLM(CONFIG).eval()
    pruned.load_state_dict(model.state_dict())
    half = max(1, round(CONFIG.intermediate_size * arguments.keep) // 2)
    runs = [(0, half), (CONFIG.intermediate_size - half, half)]
    keep_neurons(model, runs)
    cut_neurons(pruned, runs)
    with torch.inference_mode():
        tokens = torch.randint(CONFIG.vocab_size, (2, 32))
        difference = (model(tokens).logits - pruned(tokens).logits).abs().max().item()
    kept = f"{2 * half} of {CONFIG.intermediate_size} neurons in each of {CONFIG.num_hidden_layers} layers"
    print(f"{kept}: logits differ by {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
