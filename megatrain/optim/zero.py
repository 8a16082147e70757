"""The optimizer of a stage: DeepSpeed ZeRO for sharding, reduction over replicas, norm and step.

Below ZeRO 2, gradients accumulate in fp32 buffers, `parameter.main_grad`, that live as long as the
run: linear layers add to them in place, other gradients are added after each backward. Before a
step they are summed over the axes that each parameter declares, then handed to DeepSpeed. ZeRO 0
is ZeRO 1 over a group of this rank alone, after a reduction over replicas here. ZeRO 2 and 3 let
DeepSpeed take the gradients as autograd creates them.

First and last stage each update a copy of a tied matrix, and checkpoints hold one of them. The two
copies are bit-identical.

All private calls into DeepSpeed 0.19 are in this file and zero_state.py; tests/optim/test_zero.py
compares the results with plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatrain.config.schema import OptimizerConfig, ParallelConfig
from megatrain.distributed import collectives
from megatrain.distributed.mesh import MeshAxis, ProcessMesh
from megatrain.distributed.sharding import shard_spec
from megatrain.optim import zero_engine
from megatrain.optim.loss_scale import LossScale
from megatrain.optim.param_groups import is_at_both_ends
from megatrain.optim.zero_state import ZeroState


class StepResult(NamedTuple):
    """The outcome of a step.

    Attributes:
        grad_norm: norm of the whole gradient before clipping.
        applied: False if the gradients were not finite.
        rescaled: the step was skipped and the loss scale lowered, as gradients overflowed fp16.
    """

    grad_norm: float
    applied: bool
    rescaled: bool = False


class ZeroOptimizer:
    """A stage's optimizer.

    Args:
        stage: the stage, whose parameters carry a `ShardSpec`.
        settings: update rule, weight decay and clipping.
        parallel: ZeRO stage and offloading.
        dtype: of weights and activations.
        mesh: the process mesh.
        microbatches: microbatches of a step.

    Attributes:
        zero_stage: 0 to 3.
        trained: the trained parameters; frozen ones have neither gradients nor optimizer state.
        partitions_gradients: True for ZeRO 2 and 3.
        state: masters and moments by name and slice.
    """

    def __init__(
        self,
        stage: nn.Module,
        *,
        settings: OptimizerConfig,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        mesh: ProcessMesh,
        microbatches: int,
    ) -> None:
        self.stage, self.dtype, self.mesh = stage, dtype, mesh
        self.zero_stage = parallel.zero
        self.partitions_gradients = parallel.zero >= 2
        self._offloads = parallel.offload == "cpu"
        self.engine, self.optimizer, self.trained = zero_engine.make_engine(
            stage,
            settings=settings,
            parallel=parallel,
            dtype=dtype,
            mesh=mesh,
            microbatches=microbatches,
        )
        self.engine.enable_backward_allreduce = self.partitions_gradients
        self._has_own_main_grads = not self.partitions_gradients and hasattr(
            self.optimizer, "fp32_groups_gradients"
        )
        """DeepSpeed keeps fp32 buffers for gradients itself (bf16)."""
        if self.partitions_gradients:
            self._track_max_in_hooks()
            self._reduce_in_hooks()
        else:
            self._attach_main_grads()
        self.state = ZeroState(
            self.optimizer,
            rule=settings.name,
            zero_stage=parallel.zero,
            trained=self.trained,
            data_rank=mesh.data.rank,
        )
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False  # the caller counts skipped steps

    @property
    def module(self) -> Callable[..., Any]:
        """The module to call for a forward pass: the stage, or DeepSpeed's engine around it."""
        return self.engine if self.partitions_gradients else self.stage

    @property
    def loss_scale(self) -> float:
        """Factor to multiply the loss's gradient by; DeepSpeed's own backward includes it."""
        if self._scaler is None or self.partitions_gradients:
            return 1.0
        return float(self.optimizer.loss_scale)

    @property
    def _scaler(self) -> Any:
        return self.optimizer.loss_scaler if self.dtype == torch.float16 else None

    @property
    def loss_scaling(self) -> LossScale | None:
        """State of the loss scale, for checkpoints; None unless the dtype is fp16."""
        scaler = self._scaler
        if scaler is None:
            return None
        return LossScale(
            scaler.cur_scale, scaler.cur_hysteresis, scaler.last_overflow_iter, scaler.cur_iter
        )

    @loss_scaling.setter
    def loss_scaling(self, state: LossScale | None) -> None:
        scaler = self._scaler
        if state is not None and scaler is not None:
            scaler.cur_scale, scaler.cur_hysteresis = state.scale, state.patience
            scaler.last_overflow_iter, scaler.cur_iter = state.last_overflow, state.steps

    # -- gradients ---------------------------------------------------------------------------------

    def _attach_main_grads(self) -> None:
        """Gives each parameter a `main_grad`: DeepSpeed's fp32 buffer (bf16), else a new one."""
        parameter: Any
        if self._has_own_main_grads:
            for group, grads in zip(
                self.optimizer.bf16_groups, self.optimizer.fp32_groups_gradients, strict=True
            ):
                for parameter, grad in zip(group, grads, strict=True):
                    parameter.main_grad = grad.view_as(parameter)
        else:
            for parameter in self.trained:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)

    def _main_grads(self) -> list[Tensor]:
        return [parameter.main_grad for parameter in self.trained]  # type: ignore[misc]

    def _track_max_in_hooks(self) -> None:
        """Tracks the largest element of each gradient over the microbatches of a step."""
        self._max_abs = [torch.zeros((), device=parameter.device) for parameter in self.trained]

        def track(index: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                largest = _max_abs_of([grad])[0].float()
                self._max_abs[index] = torch.maximum(self._max_abs[index], largest)

            return hook

        for index, parameter in enumerate(self.trained):
            parameter.register_hook(track(index))

    def max_abs_gradients(self) -> Tensor:
        """Returns the largest absolute local gradient of each trained parameter, fp32 [n].

        Covers the time since the last step, before ranks sum their gradients; NaN if an element
        is NaN. It is the maximum of the summed microbatches, or with ZeRO 2 and 3 of each of them.
        """
        if not self.trained:
            return torch.zeros(0)
        if not self.partitions_gradients:
            return _max_abs_of(self._main_grads())
        largest = torch.stack(self._max_abs)
        self._max_abs = [torch.zeros_like(value) for value in self._max_abs]
        return largest

    def has_nonfinite(self, max_abs: Tensor) -> bool:
        """Returns True if the step must be skipped; in fp16 the step itself checks for overflow."""
        return self.dtype != torch.float16 and not bool(torch.isfinite(max_abs).all())

    def _reduce_in_hooks(self) -> None:
        """Sums gradients over their declared axes in hooks, before DeepSpeed reduces them."""

        def reduce(axes: tuple[MeshAxis, ...]) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                grad = grad.clone()
                for axis in axes:
                    collectives.all_reduce(grad, axis)
                return grad

            return hook

        for parameter in self.trained:
            if axes := shard_spec(parameter).grad_reduce_axes:
                parameter.register_hook(reduce(axes))

    def backward(self, output: Tensor, grad: Tensor, *, last: bool) -> None:
        """Runs autograd from a stage's output and accumulates gradients in fp32.

        `last` marks the last microbatch of a step.
        """
        if self.partitions_gradients:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward((output * grad).sum(), scale_wrt_gas=False)
            return
        torch.autograd.backward(output, grad)
        parameter: Any
        for parameter in self.trained:
            # In half precision without its own buffers DeepSpeed moves the gradient to grad_accum.
            for name in ("grad", "grad_accum"):
                if getattr(parameter, name, None) is not None:
                    parameter.main_grad.add_(getattr(parameter, name))
                    setattr(parameter, name, None)

    def zero_grad(self) -> None:
        """Discards the gradients of a step that is skipped."""
        if self.partitions_gradients:
            self.optimizer.zero_grad()
            self._drop_reduced()
            return
        for grad in self._main_grads():
            grad.zero_()

    def _drop_reduced(self) -> None:
        """Drops reduced gradients that DeepSpeed did not use.

        Its own step keeps them when gradients overflow under offloading.
        """
        self.optimizer.averaged_gradients = {}
        if self.zero_stage < 3:
            self.optimizer.all_grad_tensors = {}
            self.optimizer.micro_step_id = -1
        if self._offloads:
            self.optimizer.reset_cpu_buffers()

    def _reduce_declared_axes(self, *, both_ends: bool) -> None:
        """Sums main_grads over the axes that their parameters declare, one message for each axis.

        `both_ends` selects the parameters that first and last stage share, or all others.
        """
        by_axis: dict[tuple[int, ...], tuple[MeshAxis, list[Tensor]]] = {}
        for parameter, grad in zip(self.trained, self._main_grads(), strict=True):
            if is_at_both_ends(parameter) == both_ends:
                for axis in shard_spec(parameter).grad_reduce_axes:
                    by_axis.setdefault(axis.ranks, (axis, []))[1].append(grad)
        for axis, grads in by_axis.values():
            _all_reduce_together(grads, axis)

    def _reduce(self) -> None:
        """Averages gradients over replicas and puts the result where DeepSpeed's step reads it.

        The order in which replicas are summed depends on the position in a message. Parameters at
        both ends are therefore summed over the ends last: a sum of two numbers has one order.
        """
        self._reduce_declared_axes(both_ends=False)
        data = self.mesh.data
        if self._has_own_main_grads:
            self._average_flat_grads(data)
            self._reduce_declared_axes(both_ends=True)
            return
        if self.zero_stage == 0 and data.size > 1:
            grads = self._main_grads()
            _all_reduce_together(grads, data)
            for grad in grads:
                grad.div_(data.size)
        elif data.size > 2:
            self._sum_replicas_of_both_ends()
        self._reduce_declared_axes(both_ends=True)
        parameter: Any
        for parameter in self.trained:
            if parameter.dtype == torch.float32:
                parameter.grad = parameter.main_grad
            else:
                parameter.grad_accum = parameter.main_grad.clone()
        self.optimizer.set_gradient_accumulation_boundary(True)
        with self.mesh.activity.collective("all-reduce", data):
            self.optimizer.reduce_gradients(pipeline_parallel=False)

    def _average_flat_grads(self, data: MeshAxis) -> None:
        groups = self.optimizer.bf16_groups
        self.optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in groups]
        if data.size == 1:
            return
        for flat in self.optimizer.fp32_groups_gradients_flat:
            for bucket in flat.split(zero_engine.BUCKET):
                collectives.all_reduce(bucket, data)
            flat.div_(data.size)

    def _sum_replicas_of_both_ends(self) -> None:
        """Sums what both ends hold here; DeepSpeed then adds the first replica's sum and zeros."""
        for parameter, grad in zip(self.trained, self._main_grads(), strict=True):
            if is_at_both_ends(parameter):
                collectives.all_reduce(grad, self.mesh.data)
                if self.mesh.data.rank > 0:
                    grad.zero_()

    # -- the step ----------------------------------------------------------------------------------

    def step(self, lr: float) -> StepResult:
        """Reduces and clips the gradients, updates the weights and clears the gradients.

        The update is skipped if the norm is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scaler, activity, world = self._scaler, self.mesh.activity, self.mesh.world
        can_fall = scaler is not None and scaler.cur_scale > scaler.min_scale
        activity.set("optimizer step")
        if self.partitions_gradients:
            with activity.collective("update", world):
                self.engine.step()
        else:
            self._reduce()
            with activity.collective("update", world):
                self.engine._take_model_step(None)
            if not self._has_own_main_grads:
                self.zero_grad()
        overflow = bool(getattr(self.optimizer, "overflow", False))
        if overflow and not self._has_own_main_grads:
            self._drop_reduced()
        grad_norm = float(self.optimizer._global_grad_norm)
        return StepResult(grad_norm, not overflow, rescaled=overflow and can_fall)


def _max_abs_of(grads: list[Tensor]) -> Tensor:
    """Returns the largest magnitude of each tensor, reading it once; NaN if an element is NaN."""
    bounds = [
        torch.aminmax(grad.detach()) if grad.numel() else (grad.new_zeros(()),) * 2
        for grad in grads
    ]
    return torch.maximum(
        -torch.stack([low for low, _ in bounds]), torch.stack([high for _, high in bounds])
    )


def _all_reduce_together(grads: list[Tensor], axis: MeshAxis) -> None:
    """Sums over the axis in place, in messages of at most BUCKET elements."""
    bucket: list[Tensor] = []
    for grad in [*grads, None]:
        if grad is None or sum(t.numel() for t in bucket) + grad.numel() > zero_engine.BUCKET:
            if bucket:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                collectives.all_reduce(flat, axis)
                parts = flat.split([t.numel() for t in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))
            bucket = []
        if grad is not None:
            bucket.append(grad)
