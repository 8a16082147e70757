"""Why a step is not taken: the gradient, weight or layer's output that is not finite, and the ranks that have it.

A step is judged alike on all ranks, by numbers that they have added up. Which of them is to blame is asked afterwards, of a bad step
alone. For its gradients the answer is there: each rank has kept the largest element of each of its own, before any was added to
those of other ranks, which would spread it. For its loss, weights can say it; layers' outputs take another forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.sharding import shard_spec
from megatrain.models.microbatch import Microbatch
from megatrain.models.transformer import layer_specs
from megatrain.pipeline.stage_builder import rank_specs

if TYPE_CHECKING:
    from megatrain.training.step_runner import StepRunner


T = TypeVar("T")


class NonFiniteStep(NamedTuple):
    """What is kept of a step that was not taken: its microbatches, their losses on the last stage, each parameter's largest gradient."""

    microbatches: list[Microbatch]
    losses: list[Tensor]
    largest: Tensor


class Found(NamedTuple):
    """A parameter with a number of it. `place`: its layer in the whole model, and where in the layer."""

    place: tuple[int, int]
    name: str
    rank: int
    size: float


def describe_nonfinite(runner: StepRunner, step: NonFiniteStep) -> str:
    """What is not finite, in words. All ranks call it together, and all get the same."""
    loss_ranks = _ranks(runner, any(not bool(torch.isfinite(loss).all()) for loss in step.losses))
    if loss_ranks:
        weights = first_nonfinite_weight(runner)
        return f"non-finite loss on {_named(loss_ranks)}{'' if weights is None else f': {weights}'}"
    first, last = _bad_gradients(runner, step)
    if not first:
        return f"non-finite norm of finite gradients, the largest {_largest(runner, step)}"
    here = f"{first[0].name} on {_named(found.rank for found in first)}"
    if last[0].place == first[0].place:
        return f"non-finite gradient of {here}"
    return f"non-finite gradients from {here} to {last[0].name} on {_named(found.rank for found in last)}"


def locate_nonfinite(runner: StepRunner, step: NonFiniteStep) -> str:
    """Where a step goes wrong: a weight; the first layer with a bad output, by another forward; a gradient; or only the norm."""
    weights = first_nonfinite_weight(runner)
    if weights is not None:
        return weights
    outputs = _gathered(runner, _bad_outputs(runner, step))
    if outputs:
        return f"the first layer with a non-finite output is {layer_specs(runner.architecture)[min(outputs)].title}"
    _, last = _bad_gradients(runner, step)
    if last:
        return f"all layers' outputs are finite, and the first gradient behind the loss that is not is that of {last[0].name}"
    return f"each gradient is finite, but not their norm; the largest is that of {_largest(runner, step)}"


def first_nonfinite_weight(runner: StepRunner) -> str | None:
    """The first parameter of the model that is not finite, with its ranks; None where all are."""
    own = [
        (parameter, _largest_element(weights))
        for parameter, weights in _weights(runner)
        if weights.is_floating_point()
    ]
    bad = [(parameter, size) for parameter, size in own if not math.isfinite(size)]
    first, _ = _ends(runner, _found(runner, bad))
    return (
        f"the weight {first[0].name} is not finite on {_named(found.rank for found in first)}"
        if first
        else None
    )


def _largest_element(tensor: Tensor) -> float:
    """Its magnitude; not a number if any element is none."""
    return float(torch.maximum(-tensor.min(), tensor.max())) if tensor.numel() else 0.0


def _weights(runner: StepRunner) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter of this rank, and what this rank holds of it: under ZeRO 3 a share."""
    return [
        (parameter, getattr(parameter, "ds_tensor", parameter).detach())
        for parameter in runner.stage.parameters()
    ]


def _bad_gradients(runner: StepRunner, step: NonFiniteStep) -> tuple[list[Found], list[Found]]:
    sizes = zip(runner.optimizer.trained, step.largest.tolist(), strict=True)
    return _ends(
        runner,
        _found(runner, [(parameter, size) for parameter, size in sizes if not math.isfinite(size)]),
    )


def _largest(runner: StepRunner, step: NonFiniteStep) -> str:
    named = [
        (parameter, size)
        for parameter, size in zip(runner.optimizer.trained, step.largest.tolist(), strict=True)
        if shard_spec(parameter).name
    ]
    mine = max(_found(runner, named), key=lambda found: found.size, default=None)
    largest = max(_gathered(runner, [] if mine is None else [mine]), key=lambda found: found.size)
    return f"{largest.name} with {largest.size:.1e}"


def _found(runner: StepRunner, sizes: Iterable[tuple[nn.Parameter, float]]) -> list[Found]:
    places = {
        id(parameter): (number, place)
        for number, layer in reversed(_own_layers(runner))
        for place, parameter in enumerate(layer.parameters())
    }
    return [
        Found(places[id(parameter)], shard_spec(parameter).name, runner.mesh.rank, size)
        for parameter, size in sizes
    ]


def _ends(runner: StepRunner, mine: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """The first and the last parameter of the whole model among those of all ranks, each once for each rank that found it."""
    ordered = sorted(mine)
    found = _gathered(runner, ordered if len(ordered) < 2 else [ordered[0], ordered[-1]])
    first, last = min(found, default=None), max(found, default=None)
    return [item for item in found if first and item.place == first.place], [
        item for item in found if last and item.place == last.place
    ]


def _bad_outputs(runner: StepRunner, step: NonFiniteStep) -> list[int]:
    """Layers of this rank, counted in the whole model, with a non-finite output in any microbatch."""
    found: list[int] = []

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
            if not torch.isfinite(tensor).all():
                found.append(number)

        return hook

    handles = [layer.register_forward_hook(watch(number)) for number, layer in _own_layers(runner)]
    runner.executor.run(runner.forward_instructions, step.microbatches, backward=None)
    for handle in handles:
        handle.remove()
    return found


def _own_layers(runner: StepRunner) -> list[tuple[int, nn.Module]]:
    """This rank's layers, numbered in the whole model."""
    everything = layer_specs(runner.architecture)
    chunks = rank_specs(runner.config, runner.architecture, runner.schedule.placement)[
        runner.mesh.pipeline.rank
    ]
    return list(
        zip(
            [everything.index(spec) for chunk in chunks for spec in chunk],
            runner.stage.layers,
            strict=True,
        )
    )


def _ranks(runner: StepRunner, mine: bool) -> list[int]:
    return _gathered(runner, [runner.mesh.rank] if mine else [])


def _gathered(runner: StepRunner, mine: list[T]) -> list[T]:
    return [item for items in gather_objects(mine, runner.mesh.world) for item in items]


def _named(ranks: Iterable[int]) -> str:
    listed = sorted(set(ranks))
    shown = ", ".join(map(str, listed[:8])) + (", ..." if len(listed) > 8 else "")
    return f"rank {shown}" if len(listed) == 1 else f"ranks {shown}"
