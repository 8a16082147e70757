"""LoRA (arXiv 2106.09685): low-rank adapters of frozen linears, with PEFT's names and orientation.

Options are rsLoRA's scale (arXiv 2312.03732) and DoRA's magnitudes (arXiv 2402.09353).

    y = W x + s B A x + b          W [out, in] frozen, A [r, in], B [out, r]
                                   s = alpha / r, under rsLoRA alpha / sqrt(r)
    y = m/|W + s B A| (W x + s B A x) + b
                                   DoRA: m and the norms [out], the norms constant in the backward

    split of W     A             B             m            each rank has a share of the gradient of
    by columns     replicated    as W's rows   as B         A
    by rows        as W's cols   replicated    as B         B, m

Under a split by rows, B A x are partial sums that join those of W x before the reduction, without
another collective. Several of our linears may be slices of one module (GPT-2's c_attn). They share
one A and hold their own rows of one B.

Shapes: r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.config.schema import LoraConfig
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.distributed.sharding import Init, ShardSpec, set_shard_spec, shard_spec
from megatrain.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear, linear
from megatrain.errors import ConfigError
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatch import Microbatch
from megatrain.ops.nf4 import dequantize
from megatrain.ops.random import dropout

PREFIX = "base_model.model."
"""Prefix of PEFT's tensor names."""

LINEARS = ("query", "key", "value", "out", "gate", "up", "down")


def linear_names(architecture: TransformerConfig) -> list[str]:
    """Returns the linear modules of all blocks, as the Hugging Face model names them."""
    sources = [architecture.names[role] for role in LINEARS if role != "gate" or architecture.gated]
    names = [
        source.name.format(layer) for layer in range(architecture.num_layers) for source in sources
    ]
    return list(dict.fromkeys(names))


def target_names(architecture: TransformerConfig, targets: str | list[str]) -> set[str]:
    """Returns the modules of `lora.targets`.

    A target is the end of a module's name, from a dot on, as in PEFT.
    """
    names = linear_names(architecture)
    if targets == "all-linear":
        return set(names)
    selected: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matches = {name for name in names if f".{name}".endswith(f".{target}")}
        if not matches:
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ConfigError(
                "lora.targets",
                target,
                "matches no linear module of the model's blocks",
                f"the modules are {ends}",
                fix={"lora.targets": "all-linear"},
            )
        selected |= matches
    return selected


class LoraLinear(ColumnParallelLinear):
    """A frozen linear and its adapter, which replace the linear."""

    def __init__(
        self,
        base: ColumnParallelLinear,
        a: nn.Parameter,
        b: nn.Parameter,
        magnitude: nn.Parameter | None,
        settings: LoraConfig,
    ) -> None:
        super().__init__(base.weight, base.bias)
        self.lora_a, self.lora_b, self.magnitude = a, b, magnitude
        self.scale = scale(settings)
        self.dropout, self.name = settings.dropout, module_name(shard_spec(base.weight))
        self.axis: MeshAxis | None = None
        self.sequence = False
        if isinstance(base, RowParallelLinear):
            self.axis, self.sequence = base.axis, base.sequence

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:  # type: ignore[override]
        """Returns the adapted linear's output, or the base's if the microbatch disables
        adapters."""
        y = linear(x, self.weight)
        if microbatch.adapters:
            y = self._adapted(x, y, microbatch)
        if self.axis is not None:
            y = collectives.leave_tensor_parallel(y, self.axis, sequence=self.sequence)
        return y if self.bias is None else y + self.bias

    def _adapted(self, x: Tensor, y: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns W x + s B A x, or DoRA's multiple, from y = W x; partial sums if W is split by
        rows."""
        dropped = x
        if self.dropout > 0.0 and self.training:
            # Tensor ranks drop independently where each has a part of the input.
            shard = None if self.axis is None else self.axis.rank
            key = microbatch.mask_key("lora", self.name, shard)
            dropped = dropout(x, self.dropout, key, training=True)
        low_rank = linear(linear(dropped, self.lora_a), self.lora_b) * self.scale
        if self.magnitude is None:
            return y + low_rank
        factor = (self.magnitude / self.norms()).to(y.dtype)
        # As in PEFT, the magnitude's change of W x sees the dropped input as well.
        base = y if dropped is x else linear(dropped, self.weight)
        return y + (factor - 1) * base + factor * low_rank

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Returns the norm of each row of W + s B A, fp32 [out]; tensor ranks sum squares of
        parts."""
        weight = torch.addmm(
            dequantize(self.weight, torch.float32).float(),
            self.lora_b.float(),
            self.lora_a.float(),
            alpha=self.scale,
        )
        squares = weight.square_().sum(1)
        if self.axis is not None:
            collectives.all_reduce(squares, self.axis)
        return squares.sqrt_()


def scale(settings: LoraConfig) -> float:
    """Returns the factor s on B A x."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def module_name(weight: ShardSpec) -> str:
    """Returns the Hugging Face module of a weight."""
    return weight.name.removesuffix(".weight")


def add_adapters(
    stage: nn.Module, architecture: TransformerConfig, settings: LoraConfig, axis: MeshAxis
) -> None:
    """Freezes every weight of a stage and adds uninitialised adapters to the target linears.

    A classifier's own matrix stays trainable, under the name of PEFT's `modules_to_save`.
    """
    targets = target_names(architecture, settings.targets)
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    for head in (module for module in stage.modules() if isinstance(module, ClassificationHead)):
        _train_head((head.weight, head.bias))
    shared: dict[str, nn.Parameter] = {}
    for module in list(stage.modules()):
        for name, child in list(module.named_children()):
            if (
                isinstance(child, ColumnParallelLinear)
                and module_name(shard_spec(child.weight)) in targets
            ):
                setattr(module, name, _adapt(child, settings, axis, shared))


def _train_head(parameters: Iterable[nn.Parameter | None]) -> None:
    for parameter in parameters:
        if parameter is not None:
            spec = shard_spec(parameter)
            set_shard_spec(parameter, replace(spec, name=PREFIX + spec.name)).requires_grad_(True)


def _adapt(
    base: ColumnParallelLinear,
    settings: LoraConfig,
    axis: MeshAxis,
    shared: dict[str, nn.Parameter],
) -> LoraLinear:
    name, outputs = module_name(shard_spec(base.weight)), base.weight.shape[0]
    if name not in shared:
        shared[name] = _make_a(base, settings, axis)
    b_spec = _output_spec(base, f"{PREFIX}{name}.lora_B.weight", (settings.rank,), axis)
    b = _make(base, b_spec, (outputs, settings.rank))
    magnitude = None
    if settings.dora:
        spec = _output_spec(base, f"{PREFIX}{name}.lora_magnitude_vector", (), axis)
        magnitude = _make(base, replace(spec, kind="norm"), (outputs,))
    return LoraLinear(base, shared[name], b, magnitude, settings)


def _make_a(base: ColumnParallelLinear, settings: LoraConfig, axis: MeshAxis) -> nn.Parameter:
    weight = shard_spec(base.weight)
    inputs = weight.shape[0 if weight.transposed else 1]
    # PEFT's initial values, those of torch's linear: kaiming-uniform with a = sqrt(5).
    spec = ShardSpec(
        f"{PREFIX}{module_name(weight)}.lora_A.weight",
        (settings.rank, inputs),
        init=Init(bound=inputs**-0.5),
    )
    if not isinstance(base, RowParallelLinear):
        spec = replace(spec, **_replicated(axis))
    elif axis.size > 1:
        spec = replace(spec, dim=1, start=weight.start, length=weight.length)
    return _make(base, spec, (settings.rank, base.weight.shape[1]))


def _output_spec(
    base: ColumnParallelLinear, name: str, more: tuple[int, ...], axis: MeshAxis
) -> ShardSpec:
    """Returns the spec of a tensor [out, *more] that is split as the outputs of a linear."""
    weight = shard_spec(base.weight)
    shape = (weight.shape[1 if weight.transposed else 0], *more)
    if isinstance(base, RowParallelLinear):
        return ShardSpec(name, shape, **_replicated(axis))
    return replace(
        weight,
        name=name,
        shape=shape,
        dim=None if weight.dim is None else 0,
        transposed=False,
        init=Init(),
        kind="matrix",
    )


def _replicated(axis: MeshAxis) -> dict[str, Any]:
    """Returns the fields of a replicated tensor of whose gradient each rank has a share."""
    return {"is_owner": axis.rank == 0, "grad_reduce_axes": (axis,) if axis.size > 1 else ()}


def _make(base: ColumnParallelLinear, spec: ShardSpec, shape: tuple[int, ...]) -> nn.Parameter:
    tensor = torch.empty(shape, dtype=base.weight.dtype, device=base.weight.device)
    return set_shard_spec(nn.Parameter(tensor), spec)


@torch.no_grad()
def set_magnitudes(stage: nn.Module) -> None:
    """Sets DoRA's initial magnitudes: the norms of the base weights, which must be loaded, and B =
    0.

    Tensor ranks call this together.
    """
    for module in stage.modules():
        if isinstance(module, LoraLinear) and module.magnitude is not None:
            module.magnitude.copy_(module.norms())
