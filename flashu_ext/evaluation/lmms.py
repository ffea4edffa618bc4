"""A model class of lmms-eval: a checkpoint of any family, dense or accelerated.

`python -m lmms_eval --model flashu_ext --model_args pretrained=DIR,preset=paper,plan=plan.safetensors --tasks mme`
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from ..planning.extras import extra
from ..planning.reading import shown
from .likelihood import answer_likelihood

with extra("evaluate"):
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

__all__ = ["FlashU"]

MAX_NEW_TOKENS = 512
"""Where a task says nothing, as in lmms-eval's own class for Show-o2."""

# What a task's generation_kwargs may hold. num_beams is known and must be 1.
_KNOWN = {"max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "num_beams", "until"}


class FlashU(lmms):
    """A pipeline of `flashu_ext` as lmms-eval asks it: answers until a stop, and likelihoods of given answers."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "nano",
        preset: str = "exact",
        plan: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int | str = MAX_NEW_TOKENS,
        family: str = "showo2",
        pipe: Any = None,
        **others: Any,
    ):
        """
        Args:
            pretrained: 'nano', or a folder with a checkpoint of any family. Nothing is downloaded.
            preset: dense, exact, paper or fast.
            plan: a task plan's file, for a preset that prunes.
            device: None: a GPU where torch sees one, else the CPU.
            dtype: of the weights, as 'bfloat16'; None: bf16 on a GPU, the checkpoint's on the CPU.
            batch_size: questions answered together.
            max_new_tokens: longest answer where a task names none.
            family: of the embedded model.
            pipe: a pipeline that is there already, accelerated or not; of the others only batch_size and max_new_tokens count.

        Raises:
            TypeError, ValueError: an argument is unknown or wrong. OSError: a file cannot be read.
        """
        super().__init__()
        others = {name: value for name, value in others.items() if name != "max_batch_size" or value is not None}
        if others:
            raise TypeError(f"model_args: expected none but the arguments of FlashU, got {shown(sorted(others))}")
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.max_new_tokens = _at_least_one("max_new_tokens", max_new_tokens)
        self.pipe = pipe if pipe is not None else _opened(pretrained, preset, plan, device, dtype, family)
        # Where ranks gather counts: on the CPU, whatever the model runs on, as their group there is gloo's.
        self.device = "cpu"
        self._told: set[str] = set()

    # ---- what tasks ask for

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to (context, generation_kwargs, doc_to_visual, doc_id, task, split), `batch_size` at a time.

        Greedy unless a task samples; then question i of the task has the seed i.

        Raises:
            ValueError: a question without an image, or settings that this model has not; task and question are named.
        """
        from tqdm import tqdm

        answers: list[str] = []
        with tqdm(total=len(requests), desc="answer", unit="question", disable=None if self.rank == 0 else True) as bar:
            # Neighbours with the same settings are answered together; a task's questions all have the same.
            for settings, group in itertools.groupby(map(self._asked, requests), key=lambda asked: asked[0]):
                rows = list(group)
                for at in range(0, len(rows), self.batch_size):
                    part = rows[at : at + self.batch_size]
                    answers += self._answers(dict(settings), part)
                    bar.update(len(part))
        return answers

    def _asked(self, request: Any) -> tuple[tuple[tuple[str, Any], ...], list[Any], str, int]:
        """(settings that hash, images, question, number) of a request."""
        context, given, visuals, number, task, split = request.args
        where = f"{task}[{number}]"
        unknown = set(given) - _KNOWN - self._told
        if unknown:
            self._told |= unknown
            warnings.warn(
                f"{where}: generation_kwargs that do nothing here: {', '.join(sorted(unknown))}", stacklevel=2
            )
        if given.get("num_beams") not in (None, 1):
            raise ValueError(f"{where}: num_beams: expected 1, got {shown(given['num_beams'])}")
        until = given.get("until") or ()
        settings: dict[str, Any] = {
            "until": (until,) if isinstance(until, str) else tuple(until),
            "max_new_tokens": given.get("max_new_tokens") or self.max_new_tokens,
        }
        temperature = given.get("temperature") or 0.0
        if given.get("do_sample", temperature > 0) and temperature > 0:
            settings |= {"temperature": temperature, "top_p": given.get("top_p"), "top_k": given.get("top_k")}
        return tuple(settings.items()), self._images(where, visuals, number, task, split), context, number

    def _images(self, where: str, visuals: Any, number: int, task: str, split: str) -> list[Any]:
        images = list(_flat(visuals(self.task_dict[task][split][number]) or ()))
        if not images:
            raise ValueError(f"{where}: expected at least one image, got a question without any")
        return images

    def _answers(self, settings: dict[str, Any], rows: Sequence[Any]) -> list[str]:
        until = settings.pop("until")
        seeds = [number for *_, number in rows] if "temperature" in settings else None
        answers = self.pipe.answer_batch(
            [images for _, images, _, _ in rows], [question for _, _, question, _ in rows], seeds=seeds, **settings
        )
        return [_cut(answer, until) for answer in answers]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, whether it is the greedy answer) for (context, answer, doc_to_visual, doc_id, task, split).

        The loss is the mean over the answer's tokens of minus their log-probability, as lmms-eval's own classes give it: its
        choices take the smallest.

        Raises:
            ValueError: a question without an image.
        """
        found = []
        for request in requests:
            context, answer, visuals, number, task, split = request.args
            if callable(answer):
                answer = answer(self.task_dict[task][split][number])
            images = self._images(f"{task}[{number}]", visuals, number, task, split)
            likelihood = answer_likelihood(self.pipe, images, context, answer)
            # Wrapped: lmms-eval 0.7.3 makes a text of any other tuple, and then fails to take it apart.
            found.append(GenerationResult((-likelihood.logprob / likelihood.tokens, likelihood.greedy)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: this pipeline answers single questions."""
        raise NotImplementedError("generate_until_multi_round: this model answers single questions")


def _at_least_one(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {shown(value)}")
    return number


def _opened(pretrained: str, preset: str, plan: str | None, device: str | None, dtype: str | None, family: str) -> Any:
    """A pipeline, accelerated by a preset for as long as it lives."""
    import torch

    from ..models.checks import check_device
    from ..models.folders import load_pipeline
    from ..planning.plan import TaskPlan

    where = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None and where.type == "cuda":
        dtype = "bfloat16"
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype: expected a name as bfloat16, got {shown(dtype)}")
    pipe = load_pipeline(pretrained, None if dtype is None else getattr(torch, dtype), where, family=family)
    config, own = pipe.preset(preset, TaskPlan.load(plan, model=pipe.model) if plan is not None else None)
    if config is not None:
        pipe.accelerate(config, own)
    return pipe


def _flat(visuals: Iterable[Any]) -> Iterable[Any]:
    for each in visuals:
        if isinstance(each, (list, tuple)):
            yield from _flat(each)
        else:
            yield each


def _cut(answer: str, until: Iterable[str]) -> str:
    """The answer up to the first of the stops."""
    ends = [at for stop in until if stop and (at := answer.find(stop)) >= 0]
    return answer[: min(ends)] if ends else answer
