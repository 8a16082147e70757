"""Builds the DeepSpeed engine of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from megatrain.config.schema import OptimizerConfig, ParallelConfig
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis, ProcessMesh
from megatrain.distributed.sharding import ShardSpec, parameters, set_shard_spec
from megatrain.optim.param_groups import decay_groups, decays, lane_padding, make_optimizer

BUCKET = 50_000_000
"""Elements reduced at a time."""


def make_engine(
    stage: nn.Module,
    *,
    settings: OptimizerConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    mesh: ProcessMesh,
    microbatches: int,
) -> tuple[Any, Any, list[nn.Parameter]]:
    """Returns DeepSpeed's engine, its optimizer and the trained parameters; all ranks call it."""
    import deepspeed

    model = _with_placeholders(stage, settings, mesh, shard=parallel.zero > 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameter: Any
    for spec, parameter in parameters(stage):
        # DeepSpeed's norm: the first mark counts a parameter on every rank, the second on none.
        parameter.tensor_model_parallel = spec.is_owner
        parameter.ds_pipe_replicated = not spec.is_owner
    with _fp16_allowed_on_cpus():
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(decay_groups(trained, settings), settings),
            config=_engine_config(parallel, dtype, settings.grad_clip, microbatches),
            mpu=_Mpu(mesh, shard=parallel.zero > 0),
            dist_init_required=False,
        )
    return engine, optimizer, trained


def _with_placeholders(
    stage: nn.Module, settings: OptimizerConfig, mesh: ProcessMesh, *, shard: bool
) -> nn.Module:
    """Returns the stage, with parameters added that are not part of the model.

    DeepSpeed reduces the gradient norm group by group: a rank without a group that others have
    would block them. Such a group gets one element here; `lane_padding` asks for others. A
    collective of all ranks.
    """
    like = next(stage.parameters())
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    kinds: list[Literal["matrix", "bias"]] = ["matrix", "bias"]
    groups = [
        [parameter for parameter in trained if decays(parameter, settings) == (kind == "matrix")]
        for kind in kinds
    ]
    is_used = torch.tensor(
        [len(group) > 0 for group in groups], dtype=torch.int32, device=like.device
    )
    is_used = collectives.all_reduce(is_used, mesh.model_parallel_group, op=dist.ReduceOp.MAX)
    shards = mesh.data.size if shard else 1
    sizes = [
        lane_padding(group, shards=shards) if group else int(used)
        for group, used in zip(groups, is_used.tolist(), strict=True)
    ]
    placeholders = [
        set_shard_spec(
            nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device)),
            ShardSpec("", (size,), kind=kind, is_owner=False),
        )
        for kind, size in zip(kinds, sizes, strict=True)
        if size
    ]
    if not placeholders:
        return stage
    return nn.ModuleDict({"stage": stage, "placeholders": nn.ParameterList(placeholders)})


@contextlib.contextmanager
def _fp16_allowed_on_cpus() -> Iterator[None]:
    """Lets DeepSpeed build an fp16 engine on every CPU.

    DeepSpeed requires native fp16 instructions, which many CPUs lack. torch computes fp16 on all.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def _engine_config(
    parallel: ParallelConfig, dtype: torch.dtype, grad_clip: float, microbatches: int
) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": max(1, parallel.zero),
        "overlap_comm": False,
        "contiguous_gradients": parallel.zero >= 2,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": 2 * BUCKET,
        "memory_efficient_linear": False,
        "stage3_param_persistence_threshold": 0,
    }
    if parallel.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": microbatches if parallel.zero >= 2 else 1,
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }


class _Mpu:
    """The mesh in Megatron's interface, which DeepSpeed uses ("model parallel unit").

    Without `shard` the data-parallel group is this rank alone.
    """

    def __init__(self, mesh: ProcessMesh, *, shard: bool) -> None:
        self.mesh = mesh
        self.data = mesh.data if shard else MeshAxis(0, 1, (mesh.rank,))

    def _group(self, axis: MeshAxis) -> Any:
        return axis.group if axis.group is not None else self.mesh.self_group

    def get_data_parallel_group(self) -> Any:
        return self._group(self.data)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.data.ranks)

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_model_parallel_group(self) -> Any:
        return self._group(self.mesh.model_parallel_group)

    def get_model_parallel_rank(self) -> int:
        return self.mesh.model_parallel_group.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.model_parallel_group.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self._group(self.mesh.tensor)

    def get_tensor_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size

    def get_pipe_parallel_world_size(self) -> int:
        return self.mesh.pipeline.size

    def get_pipe_parallel_group(self) -> Any:
        return self._group(self.mesh.pipeline)
