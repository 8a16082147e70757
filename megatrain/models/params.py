"""Makes a model's parameters: each with its shape on this rank and the declaration of what it is a part of."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from megatrain.distributed.mesh import MeshAxis, ProcessMesh, shard_range
from megatrain.distributed.sharding import Init, ShardSpec, declare
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig

Role = str


class OutputSlice(NamedTuple):
    """A rank's output features within a tensor of `whole` features: see `Sharding`."""

    whole: int
    start: int
    length: int
    block: int = 0
    block_stride: int = 0


class ParamFactory:
    """A rank's share of an architecture, and the maker of its parameters.

    Attributes:
        heads, kv_heads: attention heads on this rank.
        compiled: whether layers are to use the kernels of `fused.py`.
        vocab_start, vocab_rows: rows of the vocabulary on this rank, padding included.

    Args:
        linears_on: where weights of the blocks' linears are made, if not on `device`; "meta" leaves them without memory.
    """

    def __init__(
        self,
        architecture: TransformerConfig,
        mesh: ProcessMesh,
        *,
        sequence: bool,
        dtype: torch.dtype,
        device: str,
        linears_on: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.architecture, self.mesh, self.sequence = architecture, mesh, sequence
        self.dtype, self.device, self._linears_on, self.compiled = (
            dtype,
            device,
            linears_on or device,
            compiled,
        )
        a, t, rank = architecture, mesh.tensor.size, mesh.tensor.rank
        check_tensor_split(a, t)
        self.heads = a.num_heads // t
        self.kv_heads = max(1, a.num_kv_heads // t)
        self.kv_copies: MeshAxis | None = (
            shard_range(mesh.tensor, t // a.num_kv_heads) if t > a.num_kv_heads else None
        )
        self.kv_start = rank * a.num_kv_heads // t
        self.vocab_rows = padded_vocab(a.vocab_size, t) // t
        self.vocab_start = rank * self.vocab_rows

    # sizes of the whole model's outputs by role
    def _out_features(self, role: Role) -> int:
        a = self.architecture
        kv = a.num_kv_heads * a.head_dim
        sizes = {
            "query": a.num_heads * a.head_dim,
            "key": kv,
            "value": kv,
            "gate": a.intermediate_size,
            "up": a.intermediate_size,
            "out": a.hidden_size,
            "down": a.hidden_size,
        }
        return sizes[role]

    def _name(self, role: Role, layer: int | None, suffix: str) -> str:
        return f"{self.architecture.names[role].name.format(layer)}.{suffix}"

    def _share(self, role: Role) -> tuple[int, int]:
        """Start and length of this rank's output features of a role split by columns."""
        if role in ("key", "value"):
            return (
                self.kv_start * self.architecture.head_dim,
                self.kv_heads * self.architecture.head_dim,
            )
        length = self._out_features(role) // self.mesh.tensor.size
        return self.mesh.tensor.rank * length, length

    def _columns(self, role: Role) -> OutputSlice:
        """Those features in the tensor that holds them."""
        a, out, (start, length) = self.architecture, self._out_features(role), self._share(role)
        source = a.names[role]
        if not source.fused:
            return OutputSlice(out, start, length)
        whole = sum(self._out_features(r) for r in source.fused)
        before = sum(self._out_features(r) for r in source.fused[: source.fused.index(role)])
        if not source.by_head:
            return OutputSlice(whole, before + start, length)
        groups = a.num_kv_heads
        group, within = divmod(start, out // groups)
        block, block_stride = min(length, out // groups), whole // groups
        return OutputSlice(
            whole, group * block_stride + before // groups + within, length, block, block_stride
        )

    def _held(self, role: Role) -> tuple[bool, tuple[MeshAxis, ...]]:
        """Whether this rank counts its columns of a role, and the axes over which their gradient is summed."""
        copies = self.kv_copies if role in ("key", "value") else None
        return copies is None or copies.rank == 0, () if copies is None else (copies,)

    def columns(
        self, role: Role, layer: int, *, bias: bool
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight [out / t, in] and bias [out / t] of a linear split by output features."""
        whole, start, length, block, block_stride = self._columns(role)
        is_owner, grad_reduce_axes = self._held(role)
        declaration = self._matrix(
            role, layer, whole, in_features(self.architecture, role), "out", start, length
        )
        declaration = replace(
            declaration,
            is_owner=is_owner,
            grad_reduce_axes=grad_reduce_axes,
            block=block,
            block_stride=block_stride,
        )
        weight = self._make(
            (length, in_features(self.architecture, role)), declaration, self._linears_on
        )
        if not bias:
            return weight, None
        bias_declaration = ShardSpec(
            self._name(role, layer, "bias"),
            (whole,),
            0,
            start,
            length,
            kind="bias",
            is_owner=is_owner,
            grad_reduce_axes=grad_reduce_axes,
            block=block,
            block_stride=block_stride,
        )
        return weight, self._make((length,), bias_declaration)

    def rows(
        self, role: Role, layer: int, *, bias: bool
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight [out, in / t] and whole bias [out] of a linear split by input features, which ends a residual branch."""
        axis, out = self.mesh.tensor, self._out_features(role)
        length = in_features(self.architecture, role) // axis.size
        declaration = self._matrix(
            role, layer, out, in_features(self.architecture, role), "in", axis.rank * length, length
        )
        std = self.architecture.residual_init_std or self.architecture.init_std
        weight = self._make(
            (out, length), replace(declaration, init=Init(std=std)), self._linears_on
        )
        return weight, self.whole(role, layer, "bias", out, kind="bias") if bias else None

    def _matrix(
        self,
        role: Role,
        layer: int,
        out: int,
        inn: int,
        split: Literal["in", "out"],
        start: int,
        length: int,
    ) -> ShardSpec:
        transposed = self.architecture.transposed
        shape = (inn, out) if transposed else (out, inn)
        dim = int((split == "in") != transposed)
        whole = self.mesh.tensor.size == 1 and length == shape[dim]
        return ShardSpec(
            self._name(role, layer, "weight"),
            shape,
            None if whole else dim,
            start,
            length,
            transposed,
            Init(std=self.architecture.init_std),
        )

    def whole(
        self,
        role: Role,
        layer: int | None,
        suffix: str,
        size: int,
        *,
        kind: Literal["bias", "norm"],
        value: float = 0.0,
        partial: bool = False,
    ) -> nn.Parameter:
        """A vector [size] that all tensor ranks hold; `partial` when each sees only its heads' share of the gradient.

        Under sequence parallelism each rank sees only its tokens' share.
        """
        axis = self.mesh.tensor
        grad_reduce_axes = (axis,) if axis.size > 1 and (partial or self.sequence) else ()
        declaration = ShardSpec(
            self._name(role, layer, suffix),
            (size,),
            init=Init(value=value),
            kind=kind,
            is_owner=axis.rank == 0,
            grad_reduce_axes=grad_reduce_axes,
        )
        return self._make((size,), declaration)

    def norm(
        self, role: Role, layer: int | None, size: int, *, partial: bool = False
    ) -> nn.Parameter:
        """A norm's weight [size], the same on all tensor ranks."""
        return self.whole(
            role, layer, "weight", size, kind="norm", value=self._neutral, partial=partial
        )

    def heads_norm(self, role: Role, layer: int) -> nn.Parameter:
        """The weight [out / t] of a norm over all heads of a role, split as they are."""
        start, length = self._share(role)
        is_owner, grad_reduce_axes = self._held(role)
        declaration = ShardSpec(
            self._name(f"{role}_norm", layer, "weight"),
            (self._out_features(role),),
            0,
            start,
            length,
            init=Init(value=self._neutral),
            kind="norm",
            is_owner=is_owner,
            grad_reduce_axes=grad_reduce_axes,
        )
        return self._make((length,), declaration)

    @property
    def _neutral(self) -> float:
        """The weight of a norm that changes nothing."""
        return 0.0 if self.architecture.norm_plus_one else 1.0

    def vocabulary(
        self, role: Role, *, is_owner: bool = True, grad_reduce_axes: tuple[MeshAxis, ...] = ()
    ) -> nn.Parameter:
        """Rows [V / t, H] of the embedding or the head, padded to the same number on each rank."""
        a, axis = self.architecture, self.mesh.tensor
        length = max(0, min(self.vocab_rows, a.vocab_size - self.vocab_start))
        whole = axis.size == 1 and length == self.vocab_rows
        init = Init(std=a.init_std, zero_row=a.padding_token if role == "embedding" else None)
        declaration = ShardSpec(
            self._name(role, None, "weight"),
            (a.vocab_size, a.hidden_size),
            None if whole else 0,
            min(self.vocab_start, a.vocab_size),
            length,
            init=init,
            kind="embedding",
            is_owner=is_owner,
            grad_reduce_axes=grad_reduce_axes,
        )
        return self._make((self.vocab_rows, a.hidden_size), declaration)

    def position_table(self) -> nn.Parameter:
        """Learned positions [max_positions, H], whole on every tensor rank."""
        a, axis = self.architecture, self.mesh.tensor
        declaration = ShardSpec(
            self._name("positions", None, "weight"),
            (a.max_positions, a.hidden_size),
            init=Init(std=a.init_std),
            kind="embedding",
            is_owner=axis.rank == 0,
            grad_reduce_axes=(axis,) if axis.size > 1 and self.sequence else (),
        )
        return self._make((a.max_positions, a.hidden_size), declaration)

    def classifier(self, suffix: Literal["weight", "bias"], shape: tuple[int, ...]) -> nn.Parameter:
        """A classifier's matrix or bias, whole on every tensor rank, each of which sees all it is used for."""
        a = self.architecture
        assert a.classifier is not None
        init = Init(std=a.init_std) if suffix == "weight" else Init()
        return self._make(
            shape,
            ShardSpec(
                f"{a.classifier.name}.{suffix}",
                shape,
                init=init,
                kind="matrix" if suffix == "weight" else "bias",
                is_owner=self.mesh.tensor.rank == 0,
            ),
        )

    def _make(
        self, shape: tuple[int, ...], declaration: ShardSpec, device: str | None = None
    ) -> nn.Parameter:
        return declare(
            nn.Parameter(torch.empty(shape, dtype=self.dtype, device=device or self.device)),
            declaration,
        )


def in_features(a: TransformerConfig, role: Role) -> int:
    """Inputs of the whole linear of a role."""
    return {"out": a.num_heads * a.head_dim, "down": a.intermediate_size}.get(role, a.hidden_size)


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """The vocabulary as the ranks hold it: the same number of rows on each."""
    return -(-vocab_size // tensor) * tensor


def check_tensor_split(a: TransformerConfig, tensor: int) -> None:
    """Refuse what tensor parallelism cannot split, naming sizes that it can."""
    fits = [t for t in range(1, a.num_heads + 1) if _splits(a, t)]
    if not _splits(a, tensor):
        rule = (
            f"does not fit num_attention_heads={a.num_heads}, num_key_value_heads={a.num_kv_heads} and "
            f"intermediate_size={a.intermediate_size}: it must divide heads and intermediate_size, and divide the "
            "key-value heads or be a multiple of them"
        )
        raise ConfigError(
            "parallel.tensor",
            tensor,
            rule,
            f"use one of {', '.join(map(str, fits))}",
            fix={"parallel.tensor": max(t for t in fits if t <= tensor)},
        )


def _splits(a: TransformerConfig, t: int) -> bool:
    kv = a.num_kv_heads
    return a.num_heads % t == 0 and a.intermediate_size % t == 0 and (kv % t == 0 or t % kv == 0)
