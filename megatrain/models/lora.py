"""Low-rank adapters beside frozen linear weights, in PEFT's names and orientation: LoRA (arXiv 2106.09685), with rsLoRA's
scale (arXiv 2312.03732) and DoRA's magnitudes (arXiv 2402.09353) as options.

    y = W x + s B A x + b          W [out, in] frozen, A [r, in], B [out, r]; s = alpha / r, under rsLoRA alpha / sqrt(r)
    y = m/|W + s B A| (W x + s B A x) + b          DoRA: m and the norms [out], the norms held constant in the backward

    W's split      A             B             m            each rank sees a share of the gradient of
    by columns     whole         as W's rows   as B         A
    by rows        as W's cols   whole         as B         B, m

Split by rows, B A x are partial sums that join those of W x before they are reduced: no message is added. A module that several
of our linears are pieces of (GPT-2's c_attn) has one A, which they share, and one B, of which each holds its own rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from megatrain.config.schema import LoraConfig
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis
from megatrain.distributed.sharding import Init, ShardSpec, declare, shard_spec
from megatrain.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear, linear
from megatrain.errors import ConfigError
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import TransformerConfig
from megatrain.models.microbatch import Microbatch
from megatrain.ops.nf4 import dequantize
from megatrain.ops.random import dropout

PREFIX = "base_model.model."
Split = Literal["rows", "columns"]

LINEARS = ("query", "key", "value", "out", "gate", "up", "down")


def linear_names(architecture: TransformerConfig) -> list[str]:
    """The linear modules of all blocks, in the Hugging Face model's names."""
    sources = [architecture.names[role] for role in LINEARS if role != "gate" or architecture.gated]
    names = [
        source.name.format(layer) for layer in range(architecture.num_layers) for source in sources
    ]
    return list(dict.fromkeys(names))


def target_names(architecture: TransformerConfig, targets: str | list[str]) -> set[str]:
    """The modules that `lora.targets` means: a target is the end of a module's name, from a dot on, as PEFT reads it."""
    names = linear_names(architecture)
    if targets == "all-linear":
        return set(names)
    wanted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        matched = {name for name in names if f".{name}".endswith(f".{target}")}
        if not matched:
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ConfigError(
                "lora.targets",
                target,
                "matches no linear module of the model's blocks",
                f"there are {ends}; or all-linear",
                fix={"lora.targets": "all-linear"},
            )
        wanted |= matched
    return wanted


class LoraLinear(ColumnParallelLinear):
    """A frozen linear and its adapter, in the linear's place.

    `part` is the tensor rank where the input is split among tensor ranks, so that their dropout differs.
    """

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
        self.rows = (base.axis, base.sequence) if isinstance(base, RowParallelLinear) else None
        self.part = base.axis.rank if isinstance(base, RowParallelLinear) else None

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:  # type: ignore[override]
        y = linear(x, self.weight)
        if microbatch.adapters:
            y = self._adapted(x, y, microbatch)
        if self.rows is not None:
            axis, sequence = self.rows
            y = collectives.leave_tensor_parallel(y, axis, sequence=sequence)
        return y if self.bias is None else y + self.bias

    def _adapted(self, x: Tensor, y: Tensor, microbatch: Microbatch) -> Tensor:
        """y = W x becomes W x + s B A x, or DoRA's multiple of it; partial sums where the weight is split by rows."""
        dropped = x
        if self.dropout > 0.0 and self.training:
            dropped = dropout(
                x, self.dropout, microbatch.mask_key("lora", self.name, self.part), training=True
            )
        low = linear(linear(dropped, self.lora_a), self.lora_b) * self.scale
        if self.magnitude is None:
            return y + low
        factor = (self.magnitude / self.norms()).to(y.dtype)
        # As PEFT has it: what the magnitude adds to W x sees the dropped input too.
        return (
            y + (factor - 1) * (y if dropped is x else linear(dropped, self.weight)) + factor * low
        )

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Norm of each row of W + s B A, fp32 [out]; of parts of rows the squares are summed over tensor ranks."""
        whole = torch.addmm(
            dequantize(self.weight, torch.float32).float(),
            self.lora_b.float(),
            self.lora_a.float(),
            alpha=self.scale,
        )
        squares = whole.square_().sum(1)
        if self.rows is not None:
            collectives.all_reduce(squares, self.rows[0])
        return squares.sqrt_()


def scale(settings: LoraConfig) -> float:
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def module_name(weight: ShardSpec) -> str:
    return weight.name.removesuffix(".weight")


def add_adapters(
    stage: nn.Module, architecture: TransformerConfig, settings: LoraConfig, axis: MeshAxis
) -> None:
    """Freeze every weight of the stage and put adapters, uninitialised, beside the linears that are targets.

    A classifier's own matrix is trained itself, under the name that PEFT saves it by (`modules_to_save`).
    """
    targets = target_names(architecture, settings.targets)
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    for head in (module for module in stage.modules() if isinstance(module, ClassificationHead)):
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                declare(
                    parameter,
                    replace(shard_spec(parameter), name=PREFIX + shard_spec(parameter).name),
                ).requires_grad_(True)
    shared: dict[str, nn.Parameter] = {}
    for module in list(stage.modules()):
        for name, child in list(module.named_children()):
            if (
                isinstance(child, ColumnParallelLinear)
                and module_name(shard_spec(child.weight)) in targets
            ):
                setattr(module, name, _adapt(child, settings, axis, shared))


def _adapt(
    base: ColumnParallelLinear,
    settings: LoraConfig,
    axis: MeshAxis,
    shared: dict[str, nn.Parameter],
) -> LoraLinear:
    weight = shard_spec(base.weight)
    split: Split = "rows" if isinstance(base, RowParallelLinear) else "columns"
    name = module_name(weight)
    if name not in shared:
        shared[name] = _make_a(base, settings, axis, split)
    b = _make(
        base,
        _output_part(weight, f"{PREFIX}{name}.lora_B.weight", (settings.rank,), split, axis),
        (base.weight.shape[0], settings.rank),
    )
    magnitude = None
    if settings.dora:
        declaration = replace(
            _output_part(weight, f"{PREFIX}{name}.lora_magnitude_vector", (), split, axis),
            kind="norm",
        )
        magnitude = _make(base, declaration, (base.weight.shape[0],))
    return LoraLinear(base, shared[name], b, magnitude, settings)


def _make_a(
    base: ColumnParallelLinear, settings: LoraConfig, axis: MeshAxis, split: Split
) -> nn.Parameter:
    weight = shard_spec(base.weight)
    inputs = weight.shape[0 if weight.transposed else 1]
    # torch's initial weights of a linear, as PEFT takes them: kaiming-uniform with a = sqrt(5).
    declaration = ShardSpec(
        f"{PREFIX}{module_name(weight)}.lora_A.weight",
        (settings.rank, inputs),
        init=Init(bound=inputs**-0.5),
    )
    if split == "columns":
        declaration = replace(
            declaration, is_owner=axis.rank == 0, grad_reduce_axes=(axis,) if axis.size > 1 else ()
        )
    elif axis.size > 1:
        declaration = replace(declaration, dim=1, start=weight.start, length=weight.length)
    return _make(base, declaration, (settings.rank, base.weight.shape[1]))


def _output_part(
    weight: ShardSpec, name: str, more: tuple[int, ...], split: Split, axis: MeshAxis
) -> ShardSpec:
    """Of a tensor with the weight's outputs as its first dim: the part that goes with this rank's outputs."""
    shape = (weight.shape[1 if weight.transposed else 0], *more)
    if split == "rows":
        return ShardSpec(
            name, shape, is_owner=axis.rank == 0, grad_reduce_axes=(axis,) if axis.size > 1 else ()
        )
    return replace(
        weight,
        name=name,
        shape=shape,
        dim=None if weight.dim is None else 0,
        transposed=False,
        init=Init(),
        kind="matrix",
    )


def _make(
    base: ColumnParallelLinear, declaration: ShardSpec, shape: tuple[int, ...]
) -> nn.Parameter:
    return declare(
        nn.Parameter(torch.empty(shape, dtype=base.weight.dtype, device=base.weight.device)),
        declaration,
    )


@torch.no_grad()
def set_magnitudes(stage: nn.Module) -> None:
    """DoRA's magnitudes as they start: the norms of the base weights, which must be in place, and B zero. Tensor ranks call it together."""
    for module in stage.modules():
        if isinstance(module, LoraLinear) and module.magnitude is not None:
            module.magnitude.copy_(module.norms())
