"""Creates a model's parameters, each with this rank's shape and its shard spec.

Shapes: H hidden, V vocabulary, t tensor ranks; `out` and `in` are a linear's features.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from megatrain.distributed.mesh import MeshAxis, ProcessMesh, shard_range
from megatrain.distributed.sharding import Init, ShardSpec, set_shard_spec
from megatrain.errors import ConfigError
from megatrain.models.config import TransformerConfig
from megatrain.ops.compile import check_compiler

Role = str


class OutputSlice(NamedTuple):
    """A rank's output features in a tensor of `total` features; the fields are those of
    `ShardSpec`."""

    total: int
    start: int
    length: int
    block: int = 0
    block_stride: int = 0


class ParamFactory:
    """Creates this rank's parameters of a model.

    Attributes:
        heads, kv_heads: attention heads on this rank.
        compiled: True if layers use compiled kernels.
        vocab_start, vocab_rows: rows of the vocabulary on this rank, including padding.
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
        """Prepares sizes and, for key-value heads on several ranks, their process group.

        Args:
            linears_on: the device of the blocks' linear weights, if it is not `device`; "meta"
                creates them without memory.
        """
        self.architecture, self.mesh, self.sequence = architecture, mesh, sequence
        self.dtype, self.device, self.compiled = dtype, device, compiled
        self._linears_on = linears_on or device
        a, t, rank = architecture, mesh.tensor.size, mesh.tensor.rank
        check_tensor_split(a, t)
        self.heads = a.num_heads // t
        self.kv_heads = max(1, a.num_kv_heads // t)
        self.kv_start = rank * a.num_kv_heads // t
        self.kv_replicas: MeshAxis | None = None
        if t > a.num_kv_heads:
            self.kv_replicas = shard_range(mesh.tensor, t // a.num_kv_heads)
        self.vocab_rows = padded_vocab(a.vocab_size, t) // t
        self.vocab_start = rank * self.vocab_rows

    def column_parallel(
        self, role: Role, layer: int, *, bias: bool
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Returns the weight [out / t, in] and bias [out / t] of a linear split by output
        features."""
        inputs = in_features(self.architecture, role)
        total, start, length, block, block_stride = self._output_slice(role)
        shared: dict[str, Any] = {
            **self._ownership(role),
            "block": block,
            "block_stride": block_stride,
        }
        spec = self._matrix(role, layer, (total, inputs), "out", start, length, **shared)
        weight = self._make((length, inputs), spec, self._linears_on)
        if not bias:
            return weight, None
        bias_name = self._name(role, layer, "bias")
        bias_spec = ShardSpec(bias_name, (total,), 0, start, length, kind="bias", **shared)
        return weight, self._make((length,), bias_spec)

    def row_parallel(
        self, role: Role, layer: int, *, bias: bool
    ) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Returns the weight [out, in / t] and the replicated bias [out] of a linear split by
        inputs.

        Such a linear ends a residual branch.
        """
        a, axis, outputs = self.architecture, self.mesh.tensor, self._out_features(role)
        inputs = in_features(a, role)
        length = inputs // axis.size
        init = Init(std=a.residual_init_std or a.init_std)
        spec = self._matrix(
            role, layer, (outputs, inputs), "in", axis.rank * length, length, init=init
        )
        weight = self._make((outputs, length), spec, self._linears_on)
        return weight, self.replicated(role, layer, "bias", outputs, kind="bias") if bias else None

    def replicated(
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
        """Returns a vector [size] that all tensor ranks hold.

        Args:
            partial: each rank has only its heads' share of the gradient. Under sequence parallelism
                each rank always has only its tokens' share.
        """
        axis = self.mesh.tensor
        spec = ShardSpec(
            self._name(role, layer, suffix),
            (size,),
            init=Init(value=value),
            kind=kind,
            is_owner=axis.rank == 0,
            grad_reduce_axes=(axis,) if axis.size > 1 and (partial or self.sequence) else (),
        )
        return self._make((size,), spec)

    def norm(
        self, role: Role, layer: int | None, size: int, *, partial: bool = False
    ) -> nn.Parameter:
        """Returns a norm's replicated weight [size]."""
        return self.replicated(
            role, layer, "weight", size, kind="norm", value=self._norm_init, partial=partial
        )

    def sharded_norm(self, role: Role, layer: int) -> nn.Parameter:
        """Returns the weight [out / t] of a norm over all heads of a role, split as the heads
        are."""
        start, length = self._head_range(role)
        spec = ShardSpec(
            self._name(f"{role}_norm", layer, "weight"),
            (self._out_features(role),),
            0,
            start,
            length,
            init=Init(value=self._norm_init),
            kind="norm",
            **self._ownership(role),
        )
        return self._make((length,), spec)

    def vocab_parallel(
        self, role: Role, *, is_owner: bool = True, grad_reduce_axes: tuple[MeshAxis, ...] = ()
    ) -> nn.Parameter:
        """Returns rows [V / t, H] of the embedding or the head, padded to the same number on each
        rank."""
        a, axis = self.architecture, self.mesh.tensor
        length = max(0, min(self.vocab_rows, a.vocab_size - self.vocab_start))
        is_full = axis.size == 1 and length == self.vocab_rows
        spec = ShardSpec(
            self._name(role, None, "weight"),
            (a.vocab_size, a.hidden_size),
            None if is_full else 0,
            min(self.vocab_start, a.vocab_size),
            length,
            init=Init(std=a.init_std, zero_row=a.padding_token if role == "embedding" else None),
            kind="embedding",
            is_owner=is_owner,
            grad_reduce_axes=grad_reduce_axes,
        )
        return self._make((self.vocab_rows, a.hidden_size), spec)

    def position_embedding(self) -> nn.Parameter:
        """Returns learned positions [max_positions, H], replicated on every tensor rank."""
        a, axis = self.architecture, self.mesh.tensor
        spec = ShardSpec(
            self._name("positions", None, "weight"),
            (a.max_positions, a.hidden_size),
            init=Init(std=a.init_std),
            kind="embedding",
            is_owner=axis.rank == 0,
            grad_reduce_axes=(axis,) if axis.size > 1 and self.sequence else (),
        )
        return self._make((a.max_positions, a.hidden_size), spec)

    def classifier(self, suffix: Literal["weight", "bias"], shape: tuple[int, ...]) -> nn.Parameter:
        """Returns a classifier's replicated matrix or bias; each tensor rank has its full
        gradient."""
        a = self.architecture
        assert a.classifier is not None
        is_weight = suffix == "weight"
        spec = ShardSpec(
            f"{a.classifier.name}.{suffix}",
            shape,
            init=Init(std=a.init_std) if is_weight else Init(),
            kind="matrix" if is_weight else "bias",
            is_owner=self.mesh.tensor.rank == 0,
        )
        return self._make(shape, spec)

    def _name(self, role: Role, layer: int | None, suffix: str) -> str:
        return f"{self.architecture.names[role].name.format(layer)}.{suffix}"

    def _out_features(self, role: Role) -> int:
        """Returns the outputs of the unsharded linear of a role."""
        a = self.architecture
        sizes = {
            "query": a.num_heads * a.head_dim,
            "key": a.num_kv_heads * a.head_dim,
            "value": a.num_kv_heads * a.head_dim,
            "gate": a.intermediate_size,
            "up": a.intermediate_size,
            "out": a.hidden_size,
            "down": a.hidden_size,
        }
        return sizes[role]

    def _head_range(self, role: Role) -> tuple[int, int]:
        """Returns start and length of this rank's output features of a column-parallel role."""
        if role in ("key", "value"):
            head_dim = self.architecture.head_dim
            return self.kv_start * head_dim, self.kv_heads * head_dim
        length = self._out_features(role) // self.mesh.tensor.size
        return self.mesh.tensor.rank * length, length

    def _output_slice(self, role: Role) -> OutputSlice:
        """Returns this rank's output features in the checkpoint's tensor, which roles may share."""
        a, outputs, (start, length) = (
            self.architecture,
            self._out_features(role),
            self._head_range(role),
        )
        source = a.names[role]
        if not source.fused:
            return OutputSlice(outputs, start, length)
        total = sum(self._out_features(r) for r in source.fused)
        before = sum(self._out_features(r) for r in source.fused[: source.fused.index(role)])
        if not source.by_head:
            return OutputSlice(total, before + start, length)
        groups = a.num_kv_heads
        group, offset = divmod(start, outputs // groups)
        block, block_stride = min(length, outputs // groups), total // groups
        first = group * block_stride + before // groups + offset
        return OutputSlice(total, first, length, block, block_stride)

    def _ownership(self, role: Role) -> dict[str, Any]:
        """Returns `is_owner` and `grad_reduce_axes` of this rank's columns of a role."""
        replicas = self.kv_replicas if role in ("key", "value") else None
        if replicas is None:
            return {"is_owner": True, "grad_reduce_axes": ()}
        return {"is_owner": replicas.rank == 0, "grad_reduce_axes": (replicas,)}

    def _matrix(
        self,
        role: Role,
        layer: int,
        size: tuple[int, int],
        split: Literal["in", "out"],
        start: int,
        length: int,
        **fields: Any,
    ) -> ShardSpec:
        """Returns the shard spec of a weight of `size` [out, in], split by its inputs or
        outputs."""
        transposed = self.architecture.transposed
        shape = size[::-1] if transposed else size
        dim = int((split == "in") != transposed)
        is_full = self.mesh.tensor.size == 1 and length == shape[dim]
        fields.setdefault("init", Init(std=self.architecture.init_std))
        name = self._name(role, layer, "weight")
        return ShardSpec(name, shape, None if is_full else dim, start, length, transposed, **fields)

    @property
    def _norm_init(self) -> float:
        """The weight of a norm that multiplies by 1."""
        return 0.0 if self.architecture.norm_plus_one else 1.0

    def _make(
        self, shape: tuple[int, ...], spec: ShardSpec, device: str | None = None
    ) -> nn.Parameter:
        tensor = torch.empty(shape, dtype=self.dtype, device=device or self.device)
        return set_shard_spec(nn.Parameter(tensor), spec)


def in_features(a: TransformerConfig, role: Role) -> int:
    """Returns the inputs of the unsharded linear of a role."""
    return {"out": a.num_heads * a.head_dim, "down": a.intermediate_size}.get(role, a.hidden_size)


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Returns the vocabulary size padded to the same number of rows on each tensor rank."""
    return -(-vocab_size // tensor) * tensor


def check_tensor_split(a: TransformerConfig, tensor: int) -> None:
    """Raises ConfigError if tensor parallelism cannot split the model, with the sizes that can."""
    if not can_split(a, tensor):
        sizes = [t for t in range(1, a.num_heads + 1) if can_split(a, t)]
        raise ConfigError(
            "parallel.tensor",
            tensor,
            f"must divide num_attention_heads={a.num_heads} and intermediate_size="
            f"{a.intermediate_size}, and must divide num_key_value_heads={a.num_kv_heads} "
            "or be a multiple of it",
            f"use one of {', '.join(map(str, sizes))}",
            fix={"parallel.tensor": max((t for t in sizes if t <= tensor), default=1)},
        )


def can_split(a: TransformerConfig, t: int) -> bool:
    """Returns True if t tensor ranks can split the model."""
    kv = a.num_kv_heads
    return a.num_heads % t == 0 and a.intermediate_size % t == 0 and (kv % t == 0 or t % kv == 0)


def check_compile(a: TransformerConfig, *, tensor: int, on_gpu: bool) -> None:
    """Raises ConfigError if the model has nothing to compile, or if the machine cannot compile."""
    if tensor > 1 and a.norm != "rms" and not a.gated and not a.rotary:
        raise ConfigError(
            "train.compile",
            True,
            f"has no effect on a {a.model_type} model with parallel.tensor={tensor}: it has no "
            "RMSNorm, gates or rotations, and its cross-entropy waits for collectives",
            "or set parallel.tensor=1",
            fix={"train.compile": False},
        )
    check_compiler(on_gpu=on_gpu)
