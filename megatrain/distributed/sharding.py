"""Shard specs: one declaration of how a parameter is split.

Every parameter carries a `ShardSpec`: the tensor of the Hugging Face checkpoint that it is a shard
of, and which shard. Initial values, the gradient norm, gradient reduction, saving, loading and
export follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from megatrain.distributed.mesh import MeshAxis


@dataclass(frozen=True)
class Init:
    """Initial values.

    Attributes:
        std: standard deviation of normal values with mean 0; None for other values.
        bound: bound of values uniform in (-bound, bound]; None for other values.
        value: the constant value otherwise.
        zero_row: a row that is zero, beside normal values.
    """

    std: float | None = None
    bound: float | None = None
    value: float = 0.0
    zero_row: int | None = None


class ShardSlice(NamedTuple):
    """A rectangle of a full tensor and its position in a shard, both in the full tensor's
    orientation."""

    full: tuple[slice, ...]
    shard: tuple[slice, ...]


@dataclass(frozen=True)
class ShardSpec:
    """The shard of a full tensor that one rank's parameter holds.

    Along `dim` the shard is one contiguous block or, where a fused tensor interleaves its roles
    head by head, equal blocks at a constant stride. Take GPT-NeoX's query_key_value [heads x 3 x d,
    hidden] with d = head_dim, 4 heads and two tensor ranks. For its keys, the second rank holds

        full along dim    | q0 k0 v0 | q1 k1 v1 | q2 k2 v2 | q3 k3 v3 |
        shard                                        k2         k3

        start=7d, length=2d, block=d, block_stride=3d

    Attributes:
        name: the full tensor's name in the Hugging Face checkpoint.
        shape: the full tensor's shape there.
        dim: the dim of the full tensor along which this is a shard; None if it is the full tensor.
        start, length: first element and number of elements along `dim`. A parameter may hold more
            rows than `length`: the padding of a vocabulary. Padding stays zero and never leaves the
            rank.
        transposed: the parameter holds the shard's transpose (GPT-2 stores its matrices as [in,
            out]).
        init: initial values.
        kind: selects the optimizer's parameter group.
        is_owner: True on exactly one of a replica's ranks that hold the same shard. The owner
            counts it in the gradient norm and writes it to checkpoints.
        grad_reduce_axes: axes over which the gradient is summed before a step, because each rank
            has only a share of it: norms under sequence parallelism, key and value heads on more
            ranks than there are heads, tied embeddings.
        block, block_stride: elements of each block, and the distance between block starts; 0 for a
            single block of `length` elements.
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

    def slices(self) -> list[ShardSlice]:
        """Returns the shard as rectangles of the full tensor, in the shard's order; empty if it is
        empty.

        A rectangle of dim 0 is contiguous in a stored tensor; one of dim 1 is a piece of each row.
        """
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

    def shard_shape(self) -> tuple[int, ...]:
        """Returns the shard's shape in the full tensor's orientation."""
        return tuple(
            self.length if dim == self.dim else size for dim, size in enumerate(self.shape)
        )

    def shard(self, full: Tensor) -> Tensor:
        """Returns a copy of the shard of a full tensor."""
        shard = full.new_empty(self.shard_shape())
        for part in self.slices():
            shard[part.shard] = full[part.full]
        return shard

    def unshard_into(self, shard: Tensor, full: Tensor) -> None:
        """Writes the shard, in the full tensor's orientation, to its position in the full
        tensor."""
        for part in self.slices():
            full[part.full] = shard[part.shard]

    def local_view(self, parameter: Tensor) -> Tensor:
        """Returns a view of a parameter's shard, without padding, in the full tensor's
        orientation."""
        shard = parameter.t() if self.transposed else parameter
        if self.dim is None:
            return shard
        return shard.narrow(self.dim, 0, self.length)


def shard_spec(parameter: Any) -> ShardSpec:
    """Returns the shard spec of a parameter, or of what replaces one."""
    return parameter.sharding


def set_shard_spec(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Attaches a shard spec to a parameter and returns the parameter."""
    parameter.sharding = spec  # type: ignore[attr-defined]
    return parameter


def parameters(module: nn.Module) -> Iterator[tuple[ShardSpec, nn.Parameter]]:
    """Yields each parameter of the module once, with its shard spec, in the module's order."""
    for parameter in module.parameters():
        yield shard_spec(parameter), parameter
