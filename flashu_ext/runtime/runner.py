"""Runs one accelerated model: one engine for images, one for answers; both are rebuilt when the model has changed."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.adapter import adapter_of
from ..models.autocast import without_autocast
from ..models.decoding import OnToken
from ..models.known import check_model, untracked, why_not_attention_kernel
from ..models.sampling import DrawInputs, check_drawing
from ..models.shapes import layer_shapes
from ..models.stamp import Stamp
from ..ops.kernel_sets import KernelSet, resolve
from ..planning.config import FlashUConfig
from ..planning.neurons import NeuronLayout
from .answer_scheduler import AnswerScheduler
from .decoding import Pick
from .forked import ForkedLock
from .generation import AcceleratedStepper, GenerationEngine
from .graphs import GraphCapture
from .network import Network
from .order import EditedWeightsError, FfnOrder
from .placement import Placement
from .state import ImageRecord
from .understanding import UnderstandingEngine

__all__ = ["Runner"]


class Runner:
    """Created by `flashu_ext.accelerate`; reached through its handle.

    Attributes:
        lock: held by whoever draws, answers or changes the model through its handle.
        active: False once the handle was removed; a method that somebody still holds then runs the model's own.
        suspended: why nothing may run now, or None.
        orders: of the FFNs whose neurons lie in plan order.
        fallbacks: reason -> calls that ran the model's own methods.
        forgetting: called by `reset`, for what upstream's methods have computed.
        last_images: the records of the images begun last, one for each state of the batch.
    """

    network: Network
    capture: GraphCapture
    generation: GenerationEngine
    understanding: UnderstandingEngine
    _stamp: Stamp
    _untracked: bool

    def __init__(self, model: nn.Module, config: FlashUConfig, layouts: Sequence[NeuronLayout] | None):
        """layouts: the plan's, one per layer; None: all tasks use all neurons. Changes nothing yet (`follow` does)."""
        self.model = model
        self.parts = adapter_of(model)
        self.config = config
        self.layouts = layouts
        self.lock = ForkedLock()
        self.active = True
        self.suspended: str | None = None
        self.orders: list[FfnOrder] = []
        self.in_place: dict[str, str] = {}
        self.fallbacks: Counter[str] = Counter()
        self.forgetting: list[Callable[[], None]] = []
        self.last_images: list[ImageRecord] = []
        self._adapters: set[str] = set()  # that were checked
        self._told = False
        self._unfinished = True
        self._process = os.getpid()

    @property
    def last_image(self) -> ImageRecord | None:
        """The record of the first of them."""
        return self.last_images[0] if self.last_images else None

    @property
    def kernels(self) -> KernelSet:
        """Of the step that ends an evaluation."""
        return self.network.sets.of("generation", "head")

    # ---- following the model

    def ready(self) -> None:
        """Notice what has changed in the model since the last call; every image and answer begins with this.

        Raises:
            EditedWeightsError: weights that lie in plan order were written to.
            TypeError: the model now has a module that the runtime would pass over.
            RuntimeError: inside `editing()`, or `remove()` was interrupted or has come meanwhile from another thread.
        """
        if not self.active:
            raise RuntimeError("model: its handle was removed")
        if self.suspended is not None:
            raise RuntimeError(f"model: {self.suspended}")
        if self.parts.device.type == "cuda" and os.getpid() != self._process:
            raise RuntimeError("model: it is on a GPU, which a forked process cannot use; start processes by spawn")
        rebuild = self._unfinished or self.lock.abandoned or self._stamp.structure_changed()
        if rebuild or self._told or self._weights_changed():
            self.check_edits()
            if rebuild or self._stamp.moved():
                self.follow()
            else:
                self._forget()
        elif self._untracked:
            self.understanding.forget()
        self._told = False

    def _forget(self) -> None:
        """What was computed from earlier values of the weights."""
        check_model(self.parts)  # a buffer, such as rotary frequencies, may have been written to
        self.reset()
        self._stamp = Stamp(self.model)

    def _weights_changed(self) -> bool:
        """Whether weights were written to: by their versions, by samples of their values, or through a copy that `state_dict()`
        gave."""
        return (
            self._stamp.weights_changed()
            or self._stamp.values_changed()
            or any(order.copies_written() for order in self.orders)
        )

    def check_unchanged(self, doing: str = "image was being generated", weights_only: bool = False) -> None:
        """Raise RuntimeError where the model has changed since `ready`: an image or answer under way cannot go on."""
        stamp = self._stamp
        if not self.active or self.suspended is not None:
            return
        structure = not weights_only and (stamp.structure_changed() or stamp.values_changed())
        if structure or stamp.weights_changed():
            raise RuntimeError(f"model: it was changed while this {doing}; change it between calls")

    def follow(self) -> None:
        """Build the network on the model as it is. All checks come before the first change. Once interrupted, another call
        completes it."""
        self._unfinished = True
        parts = adapter_of(self.model)
        check_model(parts)
        parts.check_config(self.config)
        if self.layouts is not None and len(self.layouts) != len(parts.layers):
            raise RuntimeError(f"plan: made for {len(self.layouts)} layers, the model has {len(parts.layers)} now")
        sets = resolve(self.config, parts.device, parts.dtype, why_not_attention_kernel(), layer_shapes(parts))
        network = Network.build(parts, sets)
        network.check_explicit(self.config)
        placement = Placement.choose(network, self.layouts or (), self.orders, self.lock)
        self.orders = placement.move(self.orders)
        self.in_place = placement.reasons(network.ffn_paths())
        self._build(network.over(placement.layouts))
        self._unfinished = False

    def _build(self, network: Network) -> None:
        """Engines on a network, with empty caches."""
        unknown = untracked(self.model, self.parts.methods)
        capture = getattr(self, "capture", None)
        if capture is None or capture.device != network.parts.device:
            self.capture = GraphCapture(network.parts.device, self.config.execution.step_graphs)
        self.reset()
        self.parts, self.network = network.source, network
        self.capture.disabled = f"model.{unknown[0]} may depend on more than its weights" if unknown else None
        self._adapters.clear()
        own = (network, self.config, self.capture)
        self.generation, self.understanding = GenerationEngine(*own), UnderstandingEngine(*own)
        self._stamp = Stamp(self.model)
        self.lock.abandoned = False
        self._untracked = bool(unknown) or self._stamp.unversioned

    def check_adapter(self, adapter: str | None) -> None:
        """That images and answers can be of an adapter of peft; None: of what is active.

        Raises:
            TypeError, ValueError: the model has no such adapter, or the kernels do not compute all of it. As `ready`.
        """
        if adapter is not None:
            with self.working():
                self.ready()
                self._check_adapter(adapter)

    def _check_adapter(self, adapter: str | None) -> None:
        """`check_adapter` of the model as it is; `ready` was called."""
        if adapter is None or adapter in self._adapters:
            return
        if not isinstance(adapter, str):
            raise TypeError(f"adapter: expected None or a name, got {type(adapter).__name__}")
        self.network.check_adapter(adapter)
        self._adapters.add(adapter)

    def check_edits(self) -> None:
        """Raise EditedWeightsError where weights that lie in plan order were written to: by their versions and a sample of their
        values, which shows most writes through `.data`."""
        edited = [index for index, order in enumerate(self.orders) if order.edited()]
        if edited:
            self._told = True
            raise EditedWeightsError(
                f"model: FFN weights of {len(edited)} layers were written to while their neurons lie in plan order, or copies "
                "of them that state_dict() gave, so the new values are on other neurons or lost; write to them inside "
                "`with handle.editing():`, or load them with load_state_dict"
            )

    def restore(self) -> None:
        """Bring all weights into the model's own order. Once interrupted, another call completes it."""
        for order in self.orders:
            order.arrange(planned=False)

    def tell_once(self) -> None:
        """`check_edits`, unless the caller has had the error before."""
        if not self._told:
            self.check_edits()

    # ---- work

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A context for all generation and answering: holds the lock and switches autocast and gradients off."""
        with self.lock.held, without_autocast(self.parts.device), torch.no_grad():
            if self.lock.abandoned:
                self.reset()
            yield

    def stepper(
        self, inputs: DrawInputs, config: FlashUConfig | None = None, adapter: str | None = None
    ) -> AcceleratedStepper:
        """The steps of a family's `sample`; see `Handle.stepper`."""
        if config is not None:
            self._check_config(config)
        with self.working():
            self.ready()
            check_drawing(inputs, self.parts)
            self._check_adapter(adapter)
            own = (self.working, self.check_unchanged, config, adapter)
            stepper = AcceleratedStepper(self.generation, inputs, *own)
            self.last_images = [state.record for state in stepper.states]
            return stepper

    def _check_config(self, config: FlashUConfig) -> None:
        """Raise ValueError where images cannot have a config of their own: weights and kernels are the model's."""
        self.parts.check_config(config)
        ffn = config.ffn
        if ffn is not None and ffn.ratio > 0 and (ffn != self.config.ffn or self.layouts is None):
            raise ValueError(
                f"preset: expected neurons pruned as the model's, {self.config.ffn}, or none pruned; got {ffn}"
            )
        if config.execution != self.config.execution:
            raise ValueError(f"preset: expected the model's {self.config.execution}, got {config.execution}")

    def step_together(self, steppers: Sequence[AcceleratedStepper]) -> list[Exception | None]:
        """See `Handle.step_together`."""
        errors: list[Exception | None] = [None] * len(steppers)
        with self.working():
            for index, stepper in enumerate(steppers):
                try:
                    stepper.check_memory()
                except RuntimeError as error:
                    errors[index] = error
            going = [index for index, error in enumerate(errors) if error is None]
            try:
                self.check_unchanged()
                self.generation.step([state for index in going for state in steppers[index].states])
                self.check_unchanged(weights_only=True)
            except Exception as error:
                for index in going:
                    errors[index] = error
        return errors

    @torch.no_grad()
    def answer_tokens(
        self,
        images: Sequence[Sequence[Tensor]],
        befores: Sequence[Any],
        afters: Sequence[Any],
        max_new_tokens: int,
        eos_token: int | None,
        sampler: Pick,
        on_token: OnToken | None = None,
    ) -> list[Tensor]:
        """`answer_tokens` of a family on an accelerated model: images [1, ...] of each question as `Adapter.embed_image` takes
        them, the rest as `Adapter.question` does."""
        with self.working():
            self.ready()
            engine = self.understanding
            embeds = iter(engine.image_embeds([latents for own in images for latents in own]))
            encoded = [[next(embeds) for _ in own] for own in images]
            prompts = [engine.question(*inputs) for inputs in zip(encoded, befores, afters, strict=True)]
            told = None if on_token is None else self._told_unchanged(on_token)
            answers = engine.decode(prompts, max_new_tokens, sampler, eos_token, told)
            self.check_unchanged("question was being answered", weights_only=True)
            empty = torch.empty(0, dtype=torch.int64, device=self.parts.device)
            return [torch.stack(answer) if answer else empty for answer in answers]

    def _told_unchanged(self, on_token: OnToken) -> OnToken:
        """Tells the caller of a token, and checks that he has not changed the model then."""

        def told(question: int, token: int) -> None:
            on_token(question, token)
            self.check_unchanged("question was being answered")

        return told

    def answering(self, most: int = 8) -> AnswerScheduler:
        """For up to `most` answers at once that begin and end at any time; to be closed."""

        def ready(adapter: str | None) -> UnderstandingEngine:
            self.ready()
            self._check_adapter(adapter)
            return self.understanding

        return AnswerScheduler(ready, self.check_unchanged, most)

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now besides the model's weights, by purpose."""
        held = self.generation.pool.nbytes() + self.understanding.nbytes()
        return {purpose: count for purpose, count in held.items() if count}

    def reset(self) -> None:
        """Drop images in progress and cached prompts; calls under way raise at their next step."""
        if hasattr(self, "understanding"):  # not before the first network
            self.generation.pool.clear()
            self.understanding.reset()
        for forget in self.forgetting:
            forget()
