"""Steps with a non-finite loss or gradient: which parameter, layer and rank caused them.

All ranks judge a step alike, by numbers that they have summed. The cause is looked for afterwards,
for skipped steps only. A sum over ranks would spread a NaN, so each rank keeps the largest element
of each local gradient before. A non-finite loss can come from a weight; otherwise another forward
finds the first layer with a non-finite output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.sharding import shard_spec
from megatrain.errors import UserError
from megatrain.models.microbatch import Microbatch
from megatrain.models.transformer import layer_specs
from megatrain.pipeline.stage_builder import rank_specs
from megatrain.telemetry.metrics import Value
from megatrain.training.callback import Callback

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepReport, StepRunner
    from megatrain.training.trainer import Trainer


T = TypeVar("T")


class NonFiniteSteps(Callback):
    """Ends a run that skips `limit` non-finite steps in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_step_end(self, trainer: Trainer, report: StepReport, metrics: dict[str, Value]) -> None:
        """Raises UserError at the limit, with the cause."""
        skipped = trainer.state.bad_steps
        if skipped < self.limit:
            return
        trainer.log(metrics)
        trainer.finish_saving()
        quantity = "gradient" if math.isfinite(report.loss) else "loss"
        raise UserError(
            f"{skipped} steps in a row (stability.max_nonfinite_steps) had a non-finite "
            f"{quantity}; {trainer.runner.locate_nonfinite()}"
        )


class NonFiniteStep(NamedTuple):
    """A skipped step.

    Attributes:
        losses: the loss of each microbatch, on the last stage.
        largest: the largest element of each trained parameter's local gradient.
    """

    microbatches: list[Microbatch]
    losses: list[Tensor]
    largest: Tensor


class ParameterSize(NamedTuple):
    """The largest element of a parameter, or of its gradient, on a rank.

    Attributes:
        position: the layer in the whole model, and the parameter in the layer.
    """

    position: tuple[int, int]
    name: str
    rank: int
    size: float


def describe_nonfinite(runner: StepRunner, step: NonFiniteStep) -> str:
    """Returns what is not finite, the same on all ranks; all ranks call it."""
    is_bad = any(not bool(torch.isfinite(loss).all()) for loss in step.losses)
    loss_ranks = _gather(runner, [runner.mesh.rank] if is_bad else [])
    if loss_ranks:
        weights = first_nonfinite_weight(runner)
        suffix = "" if weights is None else f": {weights}"
        return f"non-finite loss on {_format_ranks(loss_ranks)}{suffix}"
    first, last = _nonfinite_gradients(runner, step)
    if not first:
        return f"non-finite norm of finite gradients, the largest {_largest(runner, step)}"
    where = f"{first[0].name} on {_format_ranks(item.rank for item in first)}"
    if last[0].position == first[0].position:
        return f"non-finite gradient of {where}"
    last_ranks = _format_ranks(item.rank for item in last)
    return f"non-finite gradients from {where} to {last[0].name} on {last_ranks}"


def locate_nonfinite(runner: StepRunner, step: NonFiniteStep) -> str:
    """Returns where a step goes wrong; all ranks call it.

    That is a weight, the first layer with a non-finite output in another forward, a gradient, or
    only the norm.
    """
    weights = first_nonfinite_weight(runner)
    if weights is not None:
        return weights
    outputs = _gather(runner, _layers_with_nonfinite_output(runner, step))
    if outputs:
        title = layer_specs(runner.architecture)[min(outputs)].title
        return f"the first layer with a non-finite output is {title}"
    _, last = _nonfinite_gradients(runner, step)
    if last:
        return (
            "the outputs of all layers are finite; in the order of the backward, the first "
            f"non-finite gradient is that of {last[0].name}"
        )
    largest = _largest(runner, step)
    return f"each gradient is finite, but their norm is not; the largest is that of {largest}"


def first_nonfinite_weight(runner: StepRunner) -> str | None:
    """Returns the model's first non-finite parameter and its ranks; None if all are finite."""
    sizes = [
        (parameter, _largest_element(weights))
        for parameter, weights in _local_weights(runner)
        if weights.is_floating_point()
    ]
    first, _ = _ends(
        runner,
        _named_sizes(runner, [(p, size) for p, size in sizes if not math.isfinite(size)]),
    )
    if not first:
        return None
    ranks = _format_ranks(item.rank for item in first)
    return f"the weight {first[0].name} is not finite on {ranks}"


def _largest_element(tensor: Tensor) -> float:
    """Returns the largest magnitude; NaN if any element is NaN."""
    return float(torch.maximum(-tensor.min(), tensor.max())) if tensor.numel() else 0.0


def _local_weights(runner: StepRunner) -> list[tuple[nn.Parameter, Tensor]]:
    """Returns each parameter of this rank with the weights it holds: under ZeRO 3 a shard."""
    return [
        (parameter, getattr(parameter, "ds_tensor", parameter).detach())
        for parameter in runner.stage.parameters()
    ]


def _gradient_sizes(runner: StepRunner, step: NonFiniteStep) -> list[tuple[nn.Parameter, float]]:
    return list(zip(runner.optimizer.trained, step.largest.tolist(), strict=True))


def _nonfinite_gradients(
    runner: StepRunner, step: NonFiniteStep
) -> tuple[list[ParameterSize], list[ParameterSize]]:
    bad = [item for item in _gradient_sizes(runner, step) if not math.isfinite(item[1])]
    return _ends(runner, _named_sizes(runner, bad))


def _largest(runner: StepRunner, step: NonFiniteStep) -> str:
    named = [item for item in _gradient_sizes(runner, step) if shard_spec(item[0]).name]
    local = max(_named_sizes(runner, named), key=lambda item: item.size, default=None)
    largest = max(_gather(runner, [] if local is None else [local]), key=lambda item: item.size)
    return f"{largest.name} with {largest.size:.1e}"


def _named_sizes(
    runner: StepRunner, sizes: Iterable[tuple[nn.Parameter, float]]
) -> list[ParameterSize]:
    indices = {
        id(parameter): (number, index)
        for number, layer in reversed(_local_layers(runner))
        for index, parameter in enumerate(layer.parameters())
    }
    return [
        ParameterSize(indices[id(parameter)], shard_spec(parameter).name, runner.mesh.rank, size)
        for parameter, size in sizes
    ]


def _ends(
    runner: StepRunner, local: Sequence[ParameterSize]
) -> tuple[list[ParameterSize], list[ParameterSize]]:
    """Returns the first and the last parameter of all ranks, once for each rank that has it."""
    ordered = sorted(local)
    found = _gather(runner, ordered if len(ordered) < 2 else [ordered[0], ordered[-1]])
    first, last = min(found, default=None), max(found, default=None)
    return [item for item in found if first and item.position == first.position], [
        item for item in found if last and item.position == last.position
    ]


def _layers_with_nonfinite_output(runner: StepRunner, step: NonFiniteStep) -> list[int]:
    """Returns this rank's layers, numbered in the whole model, by another forward of the step."""
    found: list[int] = []

    def hook_of(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
            if not torch.isfinite(tensor).all():
                found.append(number)

        return hook

    handles = [
        layer.register_forward_hook(hook_of(number)) for number, layer in _local_layers(runner)
    ]
    runner.executor.run(runner.forward_instructions, step.microbatches, backward=None)
    for handle in handles:
        handle.remove()
    return found


def _local_layers(runner: StepRunner) -> list[tuple[int, nn.Module]]:
    """Returns this rank's layers with their numbers in the whole model."""
    all_specs = layer_specs(runner.architecture)
    chunks = rank_specs(runner.config, runner.architecture, runner.schedule.placement)[
        runner.mesh.pipeline.rank
    ]
    numbers = [all_specs.index(spec) for chunk in chunks for spec in chunk]
    return list(zip(numbers, runner.stage.layers, strict=True))


def _gather(runner: StepRunner, local: list[T]) -> list[T]:
    return [item for items in gather_objects(local, runner.mesh.world) for item in items]


def _format_ranks(ranks: Iterable[int]) -> str:
    """Returns text such as `ranks 0, 1`, with at most 8 numbers."""
    ordered = sorted(set(ranks))
    numbers = ", ".join(map(str, ordered[:8])) + (", ..." if len(ordered) > 8 else "")
    return f"rank {numbers}" if len(ordered) == 1 else f"ranks {numbers}"
