"""How a parameter is split, declared once.

Every parameter carries a `Sharding`: which tensor of the Hugging Face checkpoint it is a part of, and which part. From
it alone follow initial weights, the gradient norm, what is summed over which ranks, saving, loading and export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from megatrain.distributed.mesh import MeshAxis


@dataclass(frozen=True)
class Init:
    """Initial values: all `value`, or with `std` normal with mean 0, but for a row of zeros, or with `bound` uniform in its ±."""

    std: float | None = None
    bound: float | None = None
    value: float = 0.0
    zero_row: int | None = None


class ShardSlice(NamedTuple):
    """A rectangle of a whole tensor, and where it lies in the part; both as indices in the whole tensor's orientation."""

    whole: tuple[slice, ...]
    part: tuple[slice, ...]


@dataclass(frozen=True)
class ShardSpec:
    """The part of a whole tensor that one rank's parameter holds.

    Along `dim` the part is one run of neighbours, or, where a fused tensor interleaves its roles head by head, equal runs a
    constant stride apart. Of GPT-NeoX's query_key_value [heads x 3 x head_dim, hidden], with d = head_dim, the second of two
    tensor ranks holds for its keys, with 4 heads in all,

        whole along dim    | q0 k0 v0 | q1 k1 v1 | q2 k2 v2 | q3 k3 v3 |
        the part                                      k2         k3         start=7d length=2d run=d stride=3d

    `regions` lists the runs. A region of dim 0 is contiguous in a stored tensor, since it takes in every other dim whole; one of
    dim 1 is a piece of each row. The part joins its regions in order.

    Attributes:
        name: the whole tensor's name in the Hugging Face checkpoint.
        shape: the whole tensor's shape there.
        dim: the dim of the whole tensor along which this is a part; None when it holds all of it.
        start, length: where the part begins and how much it holds, in elements along `dim`. The parameter may hold more rows
            than `length`: the padding of a vocabulary that does not divide; it stays zero and never leaves the rank.
        transposed: the parameter holds the part's transpose (GPT-2 stores its matrices as [in, out]).
        init: initial values.
        kind: what the optimizer's groups tell apart.
        counted: whether this rank counts the part in the gradient norm and writes it to checkpoints; exactly one rank
            among those of a replica that hold a part does.
        summed: axes over which the gradient must be added up before a step, since each rank sees a share of it: norms
            under sequence parallelism, key and value heads on more ranks than there are heads, tied embeddings.
        run, stride: elements of each run, and from one run's start to the next; run 0 when there is only one, of `length`.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    length: int = 0
    transposed: bool = False
    init: Init = field(default_factory=Init)
    kind: Literal["matrix", "embedding", "bias", "norm"] = "matrix"
    is_owner: bool = True
    grad_reduce_axes: tuple[MeshAxis, ...] = ()
    block: int = 0
    block_stride: int = 0

    def regions(self) -> list[ShardSlice]:
        """The part as rectangles of the whole tensor, in the part's order; none when the part is empty."""
        if self.dim is None:
            everything = tuple(slice(0, size) for size in self.shape)
            return [ShardSlice(everything, everything)]
        block = self.block or max(self.length, 1)
        return [
            ShardSlice(
                self._along(self.start + i * self.block_stride, block),
                self._along(i * block, block),
            )
            for i in range(self.length // block)
        ]

    def _along(self, start: int, length: int) -> tuple[slice, ...]:
        return tuple(
            slice(start, start + length) if dim == self.dim else slice(0, size)
            for dim, size in enumerate(self.shape)
        )

    def part_shape(self) -> tuple[int, ...]:
        """The part's shape in the whole tensor's orientation."""
        return tuple(
            self.length if dim == self.dim else size for dim, size in enumerate(self.shape)
        )

    def take(self, whole: Tensor) -> Tensor:
        """A copy of the part out of the whole tensor."""
        part = whole.new_empty(self.part_shape())
        for region in self.regions():
            part[region.part] = whole[region.whole]
        return part

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the part, in the whole tensor's orientation, into its place there."""
        for region in self.regions():
            whole[region.whole] = part[region.part]

    def part_of(self, parameter: Tensor) -> Tensor:
        """The part that `parameter` holds, without padding, in the whole tensor's orientation (a view)."""
        part = parameter.t() if self.transposed else parameter
        if self.dim is None:
            return part
        return part.narrow(self.dim, 0, self.length)


def shard_spec(parameter: Any) -> ShardSpec:
    """The declaration that a parameter of ours carries, or what is held in its place."""
    return parameter.sharding


def declare(parameter: nn.Parameter, declaration: ShardSpec) -> nn.Parameter:
    parameter.sharding = declaration  # type: ignore[attr-defined]
    return parameter


def parameters(module: nn.Module) -> Iterator[tuple[ShardSpec, nn.Parameter]]:
    """Each parameter of the module once, with its declaration, in the module's order."""
    for parameter in module.parameters():
        yield shard_spec(parameter), parameter
