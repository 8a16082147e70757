"""How a parameter is split, declared once.

Every parameter carries a `Sharding`: which tensor of the Hugging Face checkpoint it is a part of, and which part. From
it alone follow initial weights, the gradient norm, what is summed over which ranks, saving, loading and export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from megatrain.parallel.grid import Axis


@dataclass(frozen=True)
class Init:
    """Initial values: all `value`, or with `std` normal with mean 0, but for a row of zeros, or with `bound` uniform in its ±."""

    std: float | None = None
    bound: float | None = None
    value: float = 0.0
    zero_row: int | None = None


@dataclass(frozen=True)
class Sharding:
    """The part of a whole tensor that one rank's parameter holds.

    Attributes:
        name: the whole tensor's name in the Hugging Face checkpoint.
        shape: the whole tensor's shape there.
        dim: the dim of the whole tensor along which this is a part; None when it holds all of it.
        start, length: the part, in elements along `dim`. The parameter may hold more rows than `length`: the padding of a
            vocabulary that does not divide; it stays zero and never leaves the rank.
        transposed: the parameter holds the part's transpose (GPT-2 stores its matrices as [in, out]).
        init: initial values.
        kind: what the optimizer's groups tell apart.
        counted: whether this rank counts the part in the gradient norm and writes it to checkpoints; exactly one rank
            among those of a replica that hold a part does.
        summed: axes over which the gradient must be added up before a step, since each rank sees a share of it: norms
            under sequence parallelism, key and value heads on more ranks than there are heads, tied embeddings.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    length: int = 0
    transposed: bool = False
    init: Init = field(default_factory=Init)
    kind: Literal["matrix", "embedding", "bias", "norm"] = "matrix"
    counted: bool = True
    summed: tuple[Axis, ...] = ()

    def whole_slice(self) -> tuple[slice, ...]:
        """The part as an index into the whole tensor."""
        if self.dim is None:
            return tuple(slice(0, size) for size in self.shape)
        return tuple(
            slice(self.start, self.start + self.length) if dim == self.dim else slice(0, size)
            for dim, size in enumerate(self.shape)
        )

    def part_shape(self) -> tuple[int, ...]:
        """The part's shape in the whole tensor's orientation."""
        return tuple(s.stop - s.start for s in self.whole_slice())

    def part_of(self, parameter: Tensor) -> Tensor:
        """The part that `parameter` holds, without padding, in the whole tensor's orientation (a view)."""
        part = parameter.t() if self.transposed else parameter
        if self.dim is None:
            return part
        return part.narrow(self.dim, 0, self.length)


def sharding(parameter: nn.Parameter) -> Sharding:
    """The declaration that a parameter of ours carries."""
    return parameter.sharding  # type: ignore[attr-defined]


def declare(parameter: nn.Parameter, declaration: Sharding) -> nn.Parameter:
    parameter.sharding = declaration  # type: ignore[attr-defined]
    return parameter


def parameters(module: nn.Module) -> Iterator[tuple[Sharding, nn.Parameter]]:
    """Each parameter of the module once, with its declaration, in the module's order."""
    for parameter in module.parameters():
        yield sharding(parameter), parameter
