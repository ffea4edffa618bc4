"""One token for every row of a batch of answers, over cached keys and values.

Slots and positions of the rows are values on the device. With graph capture a token is one replay, masks hide what a row does
not use, and rows without an answer run too, to keep the number of graphs small. Without, the host knows the rows' lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.masks import additive
from ..ops.kernel_sets import KernelSet
from .answer_memory import AnswerMemory, layer_of
from .graphs import GraphCache
from .modules.attention import HeadNorms, Rope, rotate_into
from .modules.decoder_layer import decoder_layer
from .network import Network
from .prompt_cache import Prompt, PromptCache
from .work import TokenWork

__all__ = ["TASK", "Decoder", "Pick"]

TASK = "understanding"

Pick = Callable[[Tensor, Sequence[int]], Tensor]
"""Logits [rows, vocab] and the rows' prompt indices -> token ids [rows, 1]."""


class _TokenPass:
    """One new token per row, written to the row's slot; a row attends to its own slots."""

    def __init__(self, memory: AnswerMemory, rows: int, kernels: KernelSet):
        self.memory = memory
        self.kernels = kernels
        self.slots = memory.slots[:, :rows]
        self.masks = [None if mask is None else mask[:rows] for mask in memory.masks]

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Rope, norms: HeadNorms | None = None
    ) -> Tensor:
        memory, rows = self.memory, query.shape[0]
        region = 0 if layer < memory.shape.split else 1
        keys, values = (each[:rows] for each in layer_of(memory.buffers, memory.shape.split, layer))
        cache = (keys.transpose(1, 2), values.transpose(1, 2))
        rotated = rotate_into(self.kernels, query, key, value, rope, norms, *cache, self.slots[region])
        lengths = None if memory.lengths is None else memory.lengths[region]
        return self.kernels.attention(rotated, keys, values, lengths, self.masks[region]).flatten(2)


class Decoder:
    """Computes tokens of answers whose prompts are cached.

    Attributes:
        ran: whether it has computed any.
    """

    def __init__(self, network: Network):
        self.network = network.at(TASK, "decode")
        self.parts = self.network.parts
        self.kernels = self.network.kernels
        self.ran = False

    def load(self, cache: PromptCache, skipped: Sequence[tuple[int, ...]]) -> TokenWork:
        """Write what the first rows of a cache need into its memory, and return the work of their next tokens.

        Args:
            skipped: for each of these rows the layers that its answer skips.
        """
        memory, live = cache.memory, len(skipped)
        rows = min(_power_of_two(live), memory.shape.rows) if memory.fixed else live
        idle = rows - live
        runs = self._layers_run([*skipped, *[skipped[0]] * idle])
        for layer, run in enumerate(runs):
            if isinstance(run, Tensor):
                memory.runs[layer, :rows] = run
        used = [cache.used(row) for row in range(live)]
        positions = [first - cache.prompt(row).ahead for row, (first, _) in enumerate(used)] + [0] * idle
        # Slots that are not there: a row without an answer stores nothing, so its prompt stays complete.
        used += [memory.shape.capacities] * idle
        slots = torch.tensor(used, dtype=torch.int64, device="cpu").t()
        memory.slots[:, :rows] = slots
        memory.position[:rows, 0] = torch.tensor(positions, dtype=torch.int64, device="cpu")
        if memory.fixed:
            self._mask_all(cache, live)
        else:
            memory.lengths = [each + 1 for each in slots]
            memory.masks = [self._mask_hidden(cache, live, late) for late in (False, True)]
        adapters = [cache.prompt(row).adapter for row in range(live)]
        adapters += adapters[-1:] * idle
        return TokenWork(rows, tuple(None if isinstance(run, Tensor) else run for run in runs), tuple(adapters))

    def _mask_all(self, cache: PromptCache, live: int) -> None:
        """Masks at fixed addresses hide the slots that are unused, and what a prompt's last token does not see."""
        for mask, late in zip(cache.memory.masks, (False, True), strict=True):
            assert mask is not None
            for row in range(live):
                allowed = pad(cache.prompt(row).seen(late), (0, cache.written[row]), value=True)
                mask[row] = additive(pad(allowed, (0, mask.shape[-1] - allowed.shape[0])), mask.dtype)

    def _mask_hidden(self, cache: PromptCache, live: int, late: bool) -> Tensor | None:
        """A mask of what prompts' last tokens do not see, or None where they see all; lengths hide unused slots."""
        seen = [cache.prompt(row).seen(late) for row in range(live)]
        if all(bool(each.all()) for each in seen):
            return None
        capacity = cache.memory.shape.capacities[1 if late else 0]
        allowed = torch.stack([pad(each, (0, capacity - each.shape[0]), value=True) for each in seen])
        return additive(allowed[:, None, None], cache.memory.shape.dtype)

    def _layers_run(self, skipped: Sequence[tuple[int, ...]]) -> list[bool | Tensor]:
        """For each layer whether the rows run it: True, False, or bool [rows, 1, 1] where they differ."""
        layers = [[layer not in chosen for chosen in skipped] for layer in range(len(self.parts.layers))]
        if all(rows == rows[:1] * len(rows) for rows in layers):
            return [rows[0] for rows in layers]
        on_device = torch.tensor(layers, device=self.parts.device)[:, :, None, None]
        return [on_device[i] if any(rows) and not all(rows) else rows[0] for i, rows in enumerate(layers)]

    def first(self, hidden: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Logits [prompts, vocab] of the first tokens, from the prefill's hidden states [prompts, hidden]."""
        with self.network.rows.of(*((prompt.adapter, 1) for prompt in prompts)):
            logits: Tensor = self.parts.lm_head(hidden)
            return logits

    def run(self, graphs: GraphCache[Any], work: TokenWork) -> None:
        """From the token of each row to the logits of the next one, all in memory."""
        self.ran = True
        graphs.run(self._token, work)

    def _token(self, memory: AnswerMemory, work: TokenWork) -> None:
        """Device work only."""
        with self.network.rows.of(*((adapter, 1) for adapter in work.adapters)):
            self._next(memory, work)

    def _next(self, memory: AnswerMemory, work: TokenWork) -> None:
        rows = work.rows
        attention = _TokenPass(memory, rows, self.kernels)
        position = memory.position[:rows]
        if memory.lengths is None:
            for mask, slot in zip(attention.masks, attention.slots, strict=True):
                assert mask is not None
                mask.scatter_(3, slot.clamp(max=mask.shape[3] - 1)[:, None, None, None], 0.0)
        cos, sin = (table.index_select(0, position[:, 0])[:, None] for table in memory.rope)
        x = self.parts.embed_tokens(memory.token[:rows]).to(memory.logits.dtype)
        for index, (layer, run) in enumerate(zip(self.network.layers, work.layers, strict=True)):
            if run is False:
                continue
            # The layer overwrites its input, which rows that skip it still need.
            before = x.clone() if run is None else x
            x = decoder_layer(layer, index, x, (cos, sin), attention, self.parts.llm_attention, TASK)
            if run is None:
                x = torch.where(memory.runs[index, :rows], x, before)
        memory.logits[:rows] = self.parts.lm_head(self.network.final_norm(x[:, 0]))
        attention.slots.add_(1)
        position.add_(1)
        if memory.lengths is not None:  # not in place: the mode of inference may be another one at each token
            memory.lengths = [lengths + 1 for lengths in memory.lengths]


def _power_of_two(count: int) -> int:
    """The smallest one from `count` on."""
    return 1 << (count - 1).bit_length()
