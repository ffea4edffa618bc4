"""JanusFlow's language model under its demo's own loop, and its answers, on an accelerated model.

Upstream has no method that draws: its demo's loop calls the latent encoder, the language model and the latent decoder. The
language model is what costs, so it is what the runtime computes here: whole, for the loop does not say which evaluation a call
is. Calls whose embeddings begin alike, bit by bit, share what is computed of their beginning. `flashu_ext.janusflow.sample`,
which takes the same instance, draws with everything that a config says.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..models.adapter import Question
from ..models.decoding import TokenSampler
from ..models.masks import additive, causal
from ..runtime.modules.attention import SegmentPass, rope_table
from ..runtime.modules.decoder_layer import decoder_layer
from ..runtime.runner import Runner

__all__ = ["UpstreamMethods"]

Original = Callable[..., Any]

_FORWARD, _GENERATE = "language_model.model.forward", "language_model.generate"

_inside: ContextVar[bool] = ContextVar("inside an original", default=False)
"""Whether upstream's own code runs, whose calls of the language model are its own."""

_DECODING = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "use_cache")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""Settings of transformers' `generate` that the runtime knows; all others must be as they are by default."""


class UnusualCall(Exception):
    """A call that the runtime does not compute; the message says why."""


@dataclass(eq=False)
class _Beginning:
    """What calls of one loop have in common.

    Attributes:
        embeds: [rows, tokens, hidden] of an earlier call.
        seen: bool [rows, tokens], its attention mask.
        shared: tokens, from the first, that all calls since have had in common.
        cache: keys and values [layers, 2, rows, tokens, kv_heads, d].
        hidden: final hidden states [rows, tokens, hidden].
        mask: additive, of the tokens behind the shared ones.
    """

    embeds: Tensor
    seen: Tensor
    shared: int
    cache: Tensor
    hidden: Tensor
    mask: Tensor | None = None


class NotKept:
    """In place of keys and values that the loop asks for and never reads."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError(
            "past_key_values: an accelerated language model keeps keys and values for itself; do not accelerate a model "
            "whose caller reads or passes them"
        )

    __getitem__ = __iter__ = __len__ = __bool__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()


class UpstreamMethods:
    """`language_model.model.forward` and `language_model.generate`, with upstream's arguments and results."""

    evicted = 0

    def __init__(self, runner: Runner, originals: Mapping[str, Original]):
        """originals: the classes' methods, bound to the model's parts."""
        self.runner = runner
        self.originals = originals
        self._signatures = {name: inspect.signature(method) for name, method in originals.items()}
        self._beginning: _Beginning | None = None
        runner.forgetting.append(self.forget)

    def forget(self) -> None:
        """Drop what was computed from earlier weights."""
        self._beginning = None

    # ---- drawing

    def language_model_model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Final hidden states of embeddings under a mask of seen tokens, as the drawing loop asks for them."""
        if _inside.get():
            return self.originals[_FORWARD](*args, **kwargs)
        with self.runner.lock.held:
            if not self.runner.active:
                return self.originals[_FORWARD](*args, **kwargs)
            self.runner.ready()
            try:
                embeds, seen = self._loop_call(self._bound(_FORWARD, args, kwargs))
            except UnusualCall as error:
                return self._original(_FORWARD, error, args, kwargs)
            if self.runner.config.approximates:
                self.runner.fallbacks[
                    f"{_FORWARD}: all layers and neurons: a loop does not say which step a call is"
                ] += 1
            from transformers.modeling_outputs import BaseModelOutputWithPast

            with self.runner.working(), torch.no_grad():
                hidden = self._hidden(embeds, seen)
            output: Any = BaseModelOutputWithPast
            return output(last_hidden_state=hidden, past_key_values=NotKept())

    def _loop_call(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The embeddings and the mask of a call as the demo's loop makes it."""
        parts = self.runner.parts
        embeds, mask, past = (
            arguments.pop(name, None) for name in ("inputs_embeds", "attention_mask", "past_key_values")
        )
        if isinstance(past, NotKept):
            past._refuse()
        returned = arguments.pop("return_dict", None)
        arguments.pop("use_cache", None)
        given = [name for name, value in arguments.items() if value is not None and value is not False and value != {}]
        if given or not isinstance(embeds, Tensor) or (past is not None and past != ()):
            raise UnusualCall("arguments that the drawing loop does not pass")
        if returned is False or torch.is_grad_enabled():
            raise UnusualCall("a call for a tuple, or with gradients")
        if embeds.dim() != 3 or embeds.dtype != parts.dtype or embeds.device != parts.device or embeds.shape[1] < 2:
            raise UnusualCall("embeddings of another shape, dtype or device")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
            raise UnusualCall("an attention mask of another shape")
        seen = mask != 0
        if not bool(seen[:, 0].all() & ((mask == 0) | (mask == 1)).all()):
            raise UnusualCall("an attention mask that hides the first token, or of other numbers than 0 and 1")
        return embeds, seen

    def _hidden(self, embeds: Tensor, seen: Tensor) -> Tensor:
        """[rows, tokens, hidden] -> the same, after the final norm."""
        network = self.runner.network.at("generation", "backbone")
        known = self._known(embeds, seen)
        shared, length = known.shared, embeds.shape[1]
        if known.mask is None:
            allowed = causal(length, embeds.device)[shared:] & seen[:, None]
            known.mask = additive(allowed[:, None], embeds.dtype)
        new = length - shared
        attention = SegmentPass(known.cache, network.kernels, new, shared, mask=known.mask)
        positions = torch.arange(shared, length, device=embeds.device)[None]
        rope = rope_table(network.parts.llm_rope, positions, embeds.dtype)
        x = embeds[:, shared:].clone()
        for index, layer in enumerate(network.layers):
            x = decoder_layer(layer, index, x, rope, attention, network.parts.llm_attention, None)
        x = network.final_norm(x)
        if not shared:
            known.hidden.copy_(x)
            return x
        return torch.cat([known.hidden[:, :shared], x], dim=1)

    def _known(self, embeds: Tensor, seen: Tensor) -> _Beginning:
        """What an earlier call has in common with this one, else a new beginning."""
        known = self._beginning
        if known is not None and known.embeds.shape == embeds.shape and torch.equal(known.seen, seen):
            shared = _common(known.embeds, embeds, known.shared)
            if shared:
                if shared != known.shared:
                    known.shared, known.mask = shared, None
                return known
        parts, (rows, length) = self.runner.parts, embeds.shape[:2]
        shape = parts.llm_attention
        cache = embeds.new_zeros(len(parts.layers), 2, rows, length, shape.kv_heads, shape.head_dim)
        # All of this call, until the next one shows what they have in common.
        self._beginning = _Beginning(embeds.clone(), seen, 0, cache, torch.empty_like(embeds))
        return self._beginning

    # ---- answering

    def language_model_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Words after prompts of embeddings, int64 [rows, words]."""
        if _inside.get():
            return self.originals[_GENERATE](*args, **kwargs)
        with self.runner.lock.held:
            if not self.runner.active:
                return self.originals[_GENERATE](*args, **kwargs)
            self.runner.ready()
            try:
                prompts, settings = self._question(self._bound(_GENERATE, args, kwargs))
                sampler = _sampler(settings, len(prompts))
            except UnusualCall as error:
                return self._original(_GENERATE, error, args, kwargs)
            engine, end = self.runner.understanding, settings.eos_token_id
            answers_config = self.runner.config.answers
            if answers_config is not None and answers_config.token_prune_ratio > 0:
                self.runner.fallbacks[
                    f"{_GENERATE}: no image tokens are dropped: embeddings do not say which they are"
                ] += 1
            with self.runner.working(), torch.no_grad():
                questions = [engine.prompt(Question(each, causal(each.shape[1], each.device), ())) for each in prompts]
                answers = engine.decode(questions, settings.max_new_tokens, sampler, end)
            longest = max(len(answer) for answer in answers)
            pad = settings.pad_token_id if settings.pad_token_id is not None else end
            words = torch.full((len(answers), longest), pad if pad is not None else 0, device=prompts[0].device)
            for row, answer in enumerate(answers):
                words[row, : len(answer)] = torch.stack(answer)
            return words

    def _question(self, arguments: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
        """Each row's embeddings [1, tokens, hidden] without its padding, and transformers' settings."""
        settings, rest = _settings(self.runner.model.language_model, arguments)
        embeds, mask = rest.pop("inputs_embeds", None), rest.pop("attention_mask", None)
        parts = self.runner.parts
        if rest or not isinstance(embeds, Tensor) or embeds.dim() != 3 or not isinstance(mask, Tensor):
            raise UnusualCall("arguments that the demo does not pass")
        if embeds.dtype != parts.dtype or embeds.device != parts.device or mask.shape != embeds.shape[:2]:
            raise UnusualCall("embeddings or a mask of another shape, dtype or device")
        counts = (mask != 0).sum(dim=1)
        length = embeds.shape[1]
        behind = torch.arange(length, device=mask.device) >= length - counts[:, None]
        if not bool(((mask == 1) == behind).all() & (counts > 0).all() & ((mask == 0) | (mask == 1)).all()):
            raise UnusualCall("padding elsewhere than on the left")
        return [embeds[row : row + 1, length - count :] for row, count in enumerate(counts.tolist())], settings

    # ---- upstream's own

    def _bound(self, method: str, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = self._signatures[method].bind(*args, **kwargs)
        named = dict(bound.arguments)
        more = [name for name, each in self._signatures[method].parameters.items() if each.kind is each.VAR_KEYWORD]
        for name in more:
            named |= named.pop(name, {})
        return named

    def _original(self, method: str, reason: Exception, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model's own method, and count the reason."""
        self.runner.fallbacks[f"{method}: {reason}"] += 1
        with _original_runs():
            return self.originals[method](*args, **kwargs)


@contextlib.contextmanager
def _original_runs() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def _common(one: Tensor, other: Tensor, known: int) -> int:
    """Tokens, from the first, in which rows [rows, tokens, hidden] agree bit by bit; less than all. known: at most so many,
    0: any."""
    most = known or one.shape[1] - 1
    if torch.equal(one[:, :most], other[:, :most]):
        return most
    differ = (one[:, :most] != other[:, :most]).any(dim=2).any(dim=0)
    return int(torch.nonzero(differ)[0]) if bool(differ.any()) else 0  # NaNs are not equal to themselves


def _settings(model: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' settings of a call of `generate`, and the other arguments."""
    given = dict(arguments)
    settings = copy.deepcopy(given.pop("generation_config", None) or model.generation_config)
    # A setting of None counts, as top_k's, which is then off; an argument of None is none.
    rest = {name: value for name, value in settings.update(**given).items() if value is not None}
    usual = type(settings)().to_dict()
    for name, value in settings.to_dict().items():
        told = name in (*_DECODING, *_TOKENS) or name.startswith("_") or name == "transformers_version"
        if not told and value != usual.get(name):
            raise UnusualCall(f"{name} = {value!r}")
    if not isinstance(settings.max_new_tokens, int) or settings.max_new_tokens < 1:
        raise UnusualCall("no max_new_tokens")
    if not all(each is None or isinstance(each, int) for each in (settings.eos_token_id, settings.pad_token_id)):
        raise UnusualCall("several end tokens")
    return settings, rest


def _sampler(settings: Any, rows: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Transformers' choice of a token from fp32 logits."""
    if not settings.do_sample:
        return TokenSampler()
    if rows > 1 or not settings.temperature > 0:
        raise UnusualCall("several answers that are sampled, or at temperature 0")
    top_p = settings.top_p if settings.top_p is not None and settings.top_p < 1 else None
    sampler = TokenSampler(float(settings.temperature), settings.top_k or None, top_p)
    return lambda logits, prompts: sampler(logits.float(), prompts)
