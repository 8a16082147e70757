"""The reference for ranks: a network of transformers or peft, trained by plain torch.

    make_stage -> give_weights -> train            ours are only the initial weights
    run_steps on every rank    -> assert_equal     losses, norms, gradient of the first step

A rank returns its shards of the first gradient, clipped, as Adam's first moment holds them. They
are assembled here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatrain.config.loader import Config
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import ShardSpec, parameters
from megatrain.models.config import TransformerConfig
from megatrain.models.init import initialize
from megatrain.models.lora import PREFIX, add_adapters, set_magnitudes
from megatrain.pipeline.stage_builder import build_stage

BETAS, DECAY = (0.9, 0.95), 0.1
"""The defaults of runs; vectors do not decay."""


class Trained(NamedTuple):
    """The result of plain torch: losses, norms, and the first step's clipped gradients."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


class Piece(NamedTuple):
    """Some elements of a rank's flattened part of a parameter."""

    spec: ShardSpec
    shape: tuple[int, ...]
    start: int
    values: Tensor


class Ran(NamedTuple):
    """The result of a rank."""

    losses: list[float]
    norms: list[float]
    pieces: list[Piece]


def make_stage(config: Config, architecture: TransformerConfig) -> nn.Module:
    """Builds the initial model on this process, with adapters if the config has them."""
    mesh = make_mesh(0, connect=False)
    stage = build_stage(config, architecture, mesh, "cpu")
    if config.lora.rank:
        add_adapters(stage, architecture, config.lora, mesh.tensor)
    initialize(stage, config.run.seed)
    set_magnitudes(stage)
    return stage


@torch.no_grad()
def give_weights(stage: nn.Module, network: nn.Module) -> dict[str, Tensor]:
    """Copies the stage's weights into a network of transformers; returns those of adapters."""
    state, own = network.state_dict(), {}
    # Biases that ours lacks would stay at zero there, and nobody would see it.
    assert {name for name, _ in network.named_parameters()} <= {
        spec.name.removeprefix(PREFIX) for spec, _ in parameters(stage)
    }
    for spec, parameter in parameters(stage):
        name = spec.name
        whole = (
            state[name]
            if name in state
            else own.setdefault(name, torch.full(spec.shape, float("nan")))
        )
        spec.unshard_into(spec.local_view(parameter.detach()), whole)
    network.load_state_dict(state)
    return own


def train(
    trained: dict[str, nn.Parameter],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    clip: float = 0.5,
) -> Trained:
    """Trains with `loss_of(step)`, which counts from 1."""
    matrices, vectors = (
        [p for p in trained.values() if (p.dim() > 1) == large] for large in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=BETAS
    )
    losses, norms, gradients = [], [], {}
    for step in range(1, steps + 1):
        loss = loss_of(step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), clip)))
        if step == 1:
            gradients = {name: p.grad.clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return Trained(losses, norms, gradients)


# -- on ranks ------------------------------------------------------------------------------------


def run_steps(runner, batches: Callable[[int], list[Batch]], *, steps: int) -> Ran:
    """Runs steps of a StepRunner with the microbatches of `batches(step)`, from 1 on."""
    ran = Ran([], [], [])
    for step in range(1, steps + 1):
        report = runner.train_step(step, batches(step))
        assert report.applied
        ran.losses.append(report.loss)
        ran.norms.append(report.grad_norm)
        if step == 1:
            ran.pieces.extend(_first_gradient(runner.optimizer))
    return ran


def _first_gradient(optimizer) -> list[Piece]:
    return [
        Piece(
            replace(f.sharding, grad_reduce_axes=()),
            tuple(f.shape),
            f.start,
            f.tensors["exp_avg"].clone() / (1 - BETAS[0]),
        )
        for f in optimizer.state.fragments()
    ]


# -- held against each other ---------------------------------------------------------------------


def assert_equal(
    ranks: list[Ran], plain: Trained, *, losses: float, norms: float = 1e-5, gradient: float = 1e-5
) -> None:
    """Checks that all ranks agree with each other, and with plain torch within tolerances.

    The tolerance of the gradient is relative to the norm of each tensor.
    """
    for ran in ranks:
        assert ran.losses == ranks[0].losses
        torch.testing.assert_close(
            torch.tensor(ran.losses), torch.tensor(plain.losses), rtol=losses, atol=0
        )
        torch.testing.assert_close(
            torch.tensor(ran.norms), torch.tensor(plain.norms), rtol=norms, atol=0
        )
    assert worst_gradient(ranks, plain.gradients) < gradient


def worst_gradient(ranks: list[Ran], gradients: dict[str, Tensor]) -> float:
    """Returns the largest relative norm of a difference; ranks must cover every element."""
    whole = {name: torch.full_like(g, float("nan")) for name, g in gradients.items()}
    parts: dict[tuple[ShardSpec, tuple[int, ...]], Tensor] = {}
    for piece in (piece for ran in ranks for piece in ran.pieces):
        key = replace(piece.spec, is_owner=True), piece.shape
        flat = parts.setdefault(key, torch.full((torch.Size(piece.shape).numel(),), float("nan")))
        flat[piece.start : piece.start + piece.values.numel()] = piece.values
    for (spec, shape), flat in parts.items():
        spec.unshard_into(spec.local_view(flat.view(shape)), whole[spec.name])
    worst = 0.0
    for name, gradient in gradients.items():
        assert not whole[name].isnan().any(), f"{name} is not whole"
        if gradient.norm() > 1e-8:
            worst = max(worst, float((whole[name] - gradient).norm() / gradient.norm()))
    return worst
