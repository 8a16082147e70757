"""The one adapter to DeepSpeed: sharding of the optimizer, reduction over replicas, norm, clipping and the step.

Gradients of stages below 2 accumulate in fp32 buffers, `parameter.main_grad`, that live as long as the run: linear layers add
to them in place, the rest is added after each backward. Before a step they are summed over the axes that each
parameter declares, then handed to DeepSpeed. ZeRO 0 is ZeRO 1 over a group of this rank alone, after a reduction of ours. ZeRO 2
and 3 let DeepSpeed take the gradients as autograd makes them.

Of a tied matrix first and last stage update a copy each, and checkpoints hold one: the two stay the same to the bit.

All private calls into DeepSpeed 0.19 are in this file; tests/optim/test_zero.py holds them to plain torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.loader import Config
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis, ProcessMesh
from megatrain.distributed.sharding import ShardSpec, declare, parameters, shard_spec
from megatrain.optim.loss_scale import LossScale
from megatrain.optim.param_groups import (
    STATES,
    decay_groups,
    decays,
    is_at_both_ends,
    lane_padding,
    make_optimizer,
)

BUCKET = 50_000_000
"""Elements reduced at a time."""


class StepResult(NamedTuple):
    """`rescaled`: not applied, since gradients were too large for fp16 at the loss scale, which can still fall."""

    grad_norm: float
    applied: bool
    rescaled: bool = False


class Fragment(NamedTuple):
    """The run of elements of one parameter whose optimizer state this rank holds, as views that can be written to.

    Attributes:
        shape: of this rank's parameter, padding included; under ZeRO 3 the parameter itself has none.
        start: of the flattened parameter.
        tensors: by name: `master` and the states of the update rule, each fp32 [n].
    """

    sharding: ShardSpec
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]


class ZeroOptimizer:
    """A stage's optimizer.

    Attributes:
        module: what to call for a forward: the stage, or under ZeRO 2 and 3 DeepSpeed's engine around it.
        trained: parameters that are trained; the frozen ones have neither gradients nor masters nor states.
    """

    def __init__(
        self, stage: nn.Module, *, config: Config, mesh: ProcessMesh, microbatches: int
    ) -> None:
        import deepspeed

        self.config, self.mesh, self.stage = config, mesh, stage
        self.partitioned = config.parallel.zero >= 2
        model = _with_stand_ins(stage, config, mesh)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for declaration, parameter in parameters(stage):
            # DeepSpeed's norm: the first mark counts a parameter on every rank, the second on none.
            parameter.tensor_model_parallel = declaration.is_owner  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = not declaration.is_owner  # type: ignore[attr-defined]
        groups = decay_groups(self.trained, config.optimizer)
        with _fp16_allowed_on_cpus():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(groups, config.optimizer),
                config=_engine_config(config, microbatches),
                mpu=_Mpu(mesh, shard=config.parallel.zero > 0),
                dist_init_required=False,
            )
        self.engine.enable_backward_allreduce = self.partitioned
        # With fp32 buffers of its own for gradients.
        self._bf16 = not self.partitioned and hasattr(self.optimizer, "fp32_groups_gradients")
        if self.partitioned:
            self._watch_in_hooks()
            self._sum_in_hooks()
        else:
            self._take_main_grads()
        self._make_states()
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # bad steps are counted by who calls

    @property
    def module(self) -> Callable[..., Any]:
        return self.engine if self.partitioned else self.stage

    @property
    def loss_scale(self) -> float:
        """What a loss's gradient is to be multiplied by; DeepSpeed's own backward, which ZeRO 2 and 3 take, does it itself."""
        return (
            float(self.optimizer.loss_scale)
            if self.config.train.dtype == "fp16" and not self.partitioned
            else 1.0
        )

    @property
    def _scaler(self) -> Any:
        return self.optimizer.loss_scaler if self.config.train.dtype == "fp16" else None

    @property
    def loss_scaling(self) -> LossScale | None:
        """Its state, None where there is none: a resume goes on with it."""
        scaler = self._scaler
        return (
            None
            if scaler is None
            else LossScale(
                scaler.cur_scale, scaler.cur_hysteresis, scaler.last_overflow_iter, scaler.cur_iter
            )
        )

    @loss_scaling.setter
    def loss_scaling(self, state: LossScale | None) -> None:
        if state is not None and (scaler := self._scaler) is not None:
            scaler.cur_scale, scaler.cur_hysteresis, scaler.last_overflow_iter, scaler.cur_iter = (
                state
            )

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _take_main_grads(self) -> None:
        """DeepSpeed's own fp32 buffers where it keeps them (bf16), else ours."""
        if self._bf16:
            for group, grads in zip(
                self.optimizer.bf16_groups, self.optimizer.fp32_groups_gradients, strict=True
            ):
                for parameter, grad in zip(group, grads, strict=True):
                    parameter.main_grad = grad.view_as(parameter)
        else:
            for parameter in self.trained:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]

    def _watch_in_hooks(self) -> None:
        """Keep the largest element of each gradient that autograd makes, over the microbatches of a step."""
        self._largest = [torch.zeros((), device=parameter.device) for parameter in self.trained]

        def watch(place: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                self._largest[place] = torch.maximum(
                    self._largest[place], _largest_of([grad])[0].float()
                )

            return hook

        for place, parameter in enumerate(self.trained):
            parameter.register_hook(watch(place))

    def max_abs_gradients(self) -> Tensor:
        """Of each trained parameter the largest element of this rank's own gradient since the last step; not a number if one is none.

        Before the step, in which ranks add up theirs. Over the microbatches' sum, with ZeRO 2 and 3 over each of them.
        """
        if not self.trained:
            return torch.zeros(0)
        if not self.partitioned:
            return _largest_of([parameter.main_grad for parameter in self.trained])  # type: ignore[attr-defined]
        largest, self._largest = (
            torch.stack(self._largest),
            [torch.zeros_like(size) for size in self._largest],
        )
        return largest

    def has_nonfinite(self, largest: Tensor) -> bool:
        """Whether no step is to be taken with these gradients. In fp16 the step itself finds out, since it looks for the loss scale."""
        return self.config.train.dtype != "fp16" and not bool(torch.isfinite(largest).all())

    def _sum_in_hooks(self) -> None:
        """ZeRO 2 and 3 reduce a gradient as soon as it is there, so what must be summed first is summed in its hook."""

        def summed(axes: tuple[MeshAxis, ...]) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                grad = grad.clone()
                for axis in axes:
                    collectives.all_reduce(grad, axis)
                return grad

            return hook

        for parameter in self.trained:
            if shard_spec(parameter).grad_reduce_axes:
                parameter.register_hook(summed(shard_spec(parameter).grad_reduce_axes))

    def backward(self, output: Tensor, grad: Tensor, *, last: bool) -> None:
        """Autograd from a stage's output; gradients are accumulated in fp32 afterwards."""
        if self.partitioned:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward((output * grad).sum(), scale_wrt_gas=False)
            return
        torch.autograd.backward(output, grad)
        for parameter in self.trained:
            # In half precision without its own buffers DeepSpeed's hook has moved the gradient to grad_accum.
            for name in ("grad", "grad_accum"):
                if getattr(parameter, name, None) is not None:
                    parameter.main_grad.add_(getattr(parameter, name))  # type: ignore[attr-defined]
                    setattr(parameter, name, None)

    def zero_grad(self) -> None:
        """Forget the gradients of a step that is not to be taken."""
        if self.partitioned:
            self.optimizer.zero_grad()
            self._forget_reduced()
            return
        for parameter in self.trained:
            parameter.main_grad.zero_()  # type: ignore[attr-defined]

    def _forget_reduced(self) -> None:
        """Drop what DeepSpeed has reduced and not used; its own step leaves it when gradients overflow under offload."""
        self.optimizer.averaged_gradients = {}
        if self.config.parallel.zero < 3:
            self.optimizer.all_grad_tensors = {}
            self.optimizer.micro_step_id = -1
        if self.config.parallel.offload == "cpu":
            self.optimizer.reset_cpu_buffers()

    def _sum_declared(self, *, ends: bool) -> None:
        """All-reduce main_grads over the axes their parameters declare, one message an axis; those at both ends of the pipeline, or all others."""
        by_axis: dict[tuple[int, ...], tuple[MeshAxis, list[Tensor]]] = {}
        for parameter in self.trained:
            for axis in (
                shard_spec(parameter).grad_reduce_axes if is_at_both_ends(parameter) == ends else ()
            ):
                by_axis.setdefault(axis.ranks, (axis, []))[1].append(parameter.main_grad)  # type: ignore[attr-defined]
        for axis, grads in by_axis.values():
            _all_reduce_together(grads, axis)

    def _reduce(self) -> None:
        """Average over replicas and put the result where DeepSpeed's step looks.

        In which order replicas are added depends on the place in a message. So the two ends come last: a sum of two numbers has one order.
        """
        self._sum_declared(ends=False)
        if self._bf16:
            self.optimizer.fp32_groups_has_gradients = [
                [True] * len(group) for group in self.optimizer.bf16_groups
            ]
            for flat in (
                self.optimizer.fp32_groups_gradients_flat if self.mesh.data.size > 1 else []
            ):
                for part in flat.split(BUCKET):
                    collectives.all_reduce(part, self.mesh.data)
                flat.div_(self.mesh.data.size)
            self._sum_declared(ends=True)
            return
        if self.config.parallel.zero == 0 and self.mesh.data.size > 1:
            grads = [parameter.main_grad for parameter in self.trained]  # type: ignore[attr-defined]
            _all_reduce_together(grads, self.mesh.data)
            for grad in grads:
                grad.div_(self.mesh.data.size)
        elif self.mesh.data.size > 2:
            self._add_replicas_of_ends()
        self._sum_declared(ends=True)
        for parameter in self.trained:
            if parameter.dtype == torch.float32:
                parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
            else:
                parameter.grad_accum = parameter.main_grad.clone()  # type: ignore[attr-defined]
        self.optimizer.set_gradient_accumulation_boundary(True)
        with self.mesh.activity.collective("all-reduce", self.mesh.data):
            self.optimizer.reduce_gradients(pipeline_parallel=False)

    def _add_replicas_of_ends(self) -> None:
        """Where DeepSpeed adds replicas up, the first brings the sum of what both ends hold, and the others nothing."""
        for parameter in filter(is_at_both_ends, self.trained):
            collectives.all_reduce(parameter.main_grad, self.mesh.data)  # type: ignore[attr-defined]
            if self.mesh.data.rank > 0:
                parameter.main_grad.zero_()  # type: ignore[attr-defined]

    # -- the step ----------------------------------------------------------------------------------------------------

    def step(self, lr: float) -> StepResult:
        """Reduce, clip and update; gradients are empty afterwards. Not applied when the norm is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        falls = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        activity, world = self.mesh.activity, self.mesh.world
        activity.set("optimizer step")
        if self.partitioned:
            with activity.collective("update", world):
                self.engine.step()
        else:
            self._reduce()
            with activity.collective("update", world):
                self.engine._take_model_step(None)
            if not self._bf16:
                self.zero_grad()
        overflow = bool(getattr(self.optimizer, "overflow", False))
        if overflow and not self._bf16:
            self._forget_reduced()
        return StepResult(
            float(self.optimizer._global_grad_norm), not overflow, rescaled=overflow and falls
        )

    # -- state by name and slice -------------------------------------------------------------------------------------

    def _make_states(self) -> None:
        """Create the states before the first step, so that saving and loading never meet an optimizer without them."""
        rule = self.config.optimizer.name
        if self.config.parallel.zero == 3:
            masters = self.optimizer.fp32_partitioned_groups_flat
        else:
            masters = [
                flat for group in self.optimizer.optimizer.param_groups for flat in group["params"]
            ]
        for flat in masters:
            state = self.optimizer.optimizer.state[flat]
            for name in STATES[rule]:
                state[name] = torch.zeros_like(flat.detach())
            if rule in ("adam", "adamw"):
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)

    @property
    def states(self) -> tuple[str, ...]:
        """What a fragment has tensors of."""
        return ("master", *STATES[self.config.optimizer.name])

    @property
    def updates(self) -> int:
        """Updates applied so far, as the rule's bias correction counts them."""
        return int(
            max(
                (
                    float(state["step"])
                    for state in self.optimizer.optimizer.state.values()
                    if "step" in state
                ),
                default=0,
            )
        )

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(count))

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of masters and states, in the order of the parameters."""
        if self.config.parallel.zero == 3:
            yield from self._fragments_of_weights()
            return
        lp_groups = (
            self.optimizer.bf16_groups
            if hasattr(self.optimizer, "bf16_groups")
            else self.optimizer.bit16_groups
        )
        for lp_group, group in zip(lp_groups, self.optimizer.optimizer.param_groups, strict=True):
            (flat,) = group["params"]
            state = self.optimizer.optimizer.state[flat]
            for parameter in lp_group:
                mapping = parameter._hp_mapping
                if mapping is None or not shard_spec(parameter).name:
                    continue
                place = mapping.hp_fragment_address
                held = {"master": flat.detach()} | {
                    name: state[name]
                    for name in STATES[self.config.optimizer.name]
                    if name in state
                }
                tensors = {
                    name: tensor.narrow(0, place.start, place.numel)
                    for name, tensor in held.items()
                }
                yield Fragment(
                    shard_spec(parameter),
                    parameter,
                    tuple(parameter.shape),
                    mapping.lp_fragment_address.start,
                    tensors,
                )

    def _fragments_of_weights(self) -> Iterator[Fragment]:
        keys = {"master": None, **{name: name for name in STATES[self.config.optimizer.name]}}
        view = self.optimizer._get_fp32_opt_state_partition
        for parameter in self.trained:
            share = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = self.mesh.data.rank * share
            count = max(0, min(share, parameter.ds_numel - start))  # type: ignore[attr-defined]
            if count:
                tensors = {
                    name: view(parameter, True, key)[0].detach().view(-1)[:count]
                    for name, key in keys.items()
                }
                yield Fragment(
                    shard_spec(parameter), parameter, tuple(parameter.ds_shape), start, tensors
                )  # type: ignore[attr-defined]

    def copy_masters_to_weights(self) -> None:
        """Make the model's weights what the masters say, on all replicas; after loading."""
        if self.config.parallel.zero == 3:
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self.optimizer.update_lp_params()

    def full_weights(self, parameter: nn.Parameter) -> Tensor:
        """This tensor rank's weights, gathered over replicas under ZeRO 3; all of them call it together."""
        if self.config.parallel.zero != 3:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()


def _with_stand_ins(stage: nn.Module, config: Config, mesh: ProcessMesh) -> nn.Module:
    """The stage, and numbers that are no part of the model: one for each of the optimizer's groups that another stage has and this one has
    not, and what `lane_padding` asks for.

    DeepSpeed reduces the norm group by group: a rank without a group would leave the others waiting for ever. All ranks call it together.
    """
    like, trained = (
        next(stage.parameters()),
        [parameter for parameter in stage.parameters() if parameter.requires_grad],
    )
    kinds: list[Literal["matrix", "bias"]] = ["matrix", "bias"]
    groups = [
        [
            parameter
            for parameter in trained
            if decays(parameter, config.optimizer) == (kind == "matrix")
        ]
        for kind in kinds
    ]
    anywhere = torch.tensor(
        [len(group) > 0 for group in groups], dtype=torch.int32, device=like.device
    )
    anywhere = collectives.all_reduce(anywhere, mesh.model_parallel_group, op=dist.ReduceOp.MAX)
    shards = mesh.data.size if config.parallel.zero else 1
    sizes = [
        lane_padding(group, shards=shards) if group else int(there)
        for group, there in zip(groups, anywhere.tolist(), strict=True)
    ]
    stand_ins = [
        declare(
            nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device)),
            ShardSpec("", (size,), kind=kind, is_owner=False),
        )
        for kind, size in zip(kinds, sizes, strict=True)
        if size
    ]
    return (
        nn.ModuleDict({"stage": stage, "stand_ins": nn.ParameterList(stand_ins)})
        if stand_ins
        else stage
    )


def _largest_of(grads: list[Tensor]) -> Tensor:
    """Each one's largest magnitude, in one read of it; not a number if an element is none."""
    ends = [
        torch.aminmax(grad.detach()) if grad.numel() else (grad.new_zeros(()),) * 2
        for grad in grads
    ]
    return torch.maximum(
        -torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])
    )


def _all_reduce_together(grads: list[Tensor], axis: MeshAxis) -> None:
    """Sum over the axis in messages of at most BUCKET elements, in place."""
    bucket: list[Tensor] = []
    for grad in [*grads, None]:
        if grad is None or sum(t.numel() for t in bucket) + grad.numel() > BUCKET:
            if bucket:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                collectives.all_reduce(flat, axis)
                for tensor, part in zip(
                    bucket, flat.split([t.numel() for t in bucket]), strict=True
                ):
                    tensor.copy_(part.view_as(tensor))
            bucket = []
        if grad is not None:
            bucket.append(grad)


@contextlib.contextmanager
def _fp16_allowed_on_cpus() -> Iterator[None]:
    """Lets DeepSpeed build an fp16 engine on every CPU.

    DeepSpeed asks oneDNN for native fp16 instructions, which many CPUs lack. torch computes fp16 on all of them.
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


def _engine_config(config: Config, microbatches: int) -> dict[str, Any]:
    p = config.parallel
    zero: dict[str, Any] = {
        "stage": max(1, p.zero),
        "overlap_comm": False,
        "contiguous_gradients": p.zero >= 2,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": 2 * BUCKET,
        "memory_efficient_linear": False,
        "stage3_param_persistence_threshold": 0,
    }
    if p.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": microbatches if p.zero >= 2 else 1,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.dtype == "bf16"},
        "fp16": {"enabled": config.train.dtype == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }


class _Mpu:
    """Our grid in the words DeepSpeed asks for; without `shard` its data-parallel group is this rank alone."""

    def __init__(self, mesh: ProcessMesh, *, shard: bool) -> None:
        self.mesh = mesh
        alone = MeshAxis(0, 1, (mesh.rank,))
        self.data = mesh.data if shard else alone

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
