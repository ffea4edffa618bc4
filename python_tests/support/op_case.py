"""A valid call of an op, for the tests of the common contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashu_ext import ops
from flashu_ext.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Make = Callable[[torch.dtype], dict[str, Any]]


@dataclass(frozen=True)
class OpCase:
    """An op with arguments that it accepts.

    Attributes:
        make: dtype -> arguments by name, in the order of the signature; fresh tensors at each call, same numbers.
        option: which of the op's options this is, "" for the first case of an op.
        inplace: tensors that it writes. fixed: tensors that have a dtype of their own. contiguous: tensors that must be
            (`out` among them where it must). folding: tensors whose leading dimensions must fold into rows of one stride.
            strided: tensors whose last dimension may have any stride.
        schema: arguments by name -> what the torch.ops overload takes, where that is not the same.
        packet: the torch.ops packet, where it is not called as the op.
    """

    name: str
    make: Make
    option: str = ""
    inplace: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    contiguous: tuple[str, ...] = ()
    folding: tuple[str, ...] = ()
    strided: tuple[str, ...] = ()
    schema: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: arguments
    packet: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def oracle(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    @property
    def overload(self) -> Any:
        assert self.function is not None  # the lookup loads the library and the fake kernels
        return getattr(torch.ops.flashu, self.packet or self.name).default

    def __repr__(self) -> str:
        return f"{self.name} {self.option}".rstrip()


def cases_of(name: str, makes: dict[str, Make], **common: Any) -> list[OpCase]:
    """The cases of an op by option."""
    return [OpCase(name, make, option, **common) for option, make in makes.items()]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    return [result] if isinstance(result, Tensor) else list(result)
