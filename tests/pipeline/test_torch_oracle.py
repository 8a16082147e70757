"""The executor against torch.distributed.pipelining: equal losses and gradients for equal layers.

All schedules of torch 2.13 run over gloo on CPUs. To split a backward, torch splits the autograd
graph; megatrain defers the gradients of linear weights only. torch computes the loss from complete
logits, megatrain in the model's head. Schedules that megatrain lacks (looped BFS, interleaved zero
bubble with two chunks per rank) are compared with its interleaved one on the same placement.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.rank_pool import run_ranks

from megatrain.config import loader as configuration
from megatrain.distributed.mesh import make_mesh
from megatrain.distributed.sharding import parameters
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.init import initialize
from megatrain.models.microbatch import Microbatch
from megatrain.models.rope import rotations
from megatrain.models.transformer import Head, HiddenStates
from megatrain.pipeline.stage_builder import build_stage

BATCH, LENGTH, VOCABULARY, LOSS_WEIGHT = 2, 12, 67, 0.5
MODELS = {
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 8,
        "n_head": 4,
        "n_positions": LENGTH,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
    },
}


class Case(NamedTuple):
    theirs: str
    ours: str
    world: int
    model: str = "llama"

    @property
    def microbatches(self):
        """DualPipeV's fewest: as many as stages."""
        return 2 * self.world


PAIRS = [
    ("ScheduleGPipe", "gpipe"),
    ("Schedule1F1B", "1f1b"),
    ("ScheduleLoopedBFS", "interleaved"),
    ("ScheduleInterleaved1F1B", "interleaved"),
    ("ScheduleInterleavedZeroBubble", "zb-h1"),
    ("ScheduleInterleavedZeroBubble", "interleaved"),
    ("ScheduleZBVZeroBubble", "zb-v"),
    ("ScheduleDualPipeV", "dualpipev"),
]
CASES = [
    *[Case(theirs, ours, world) for world in (2, 4) for theirs, ours in PAIRS],
    Case("ScheduleInterleavedZeroBubble", "zb-h1", 2, "gpt2"),
    Case("ScheduleZBVZeroBubble", "zb-v", 2, "gpt2"),
]


class Outcome(NamedTuple):
    losses: list
    """Of the microbatches in turn, on the rank of the last stage."""
    gradients: dict
    """By the parameter's name."""


def make_config(case):
    return configuration.from_dict(
        {
            "model": MODELS[case.model],
            "parallel": {"pipeline": case.world, "schedule": case.ours},
            "data": {"sequence_length": LENGTH},
            "train": {
                "steps": 10,
                "micro_batch_size": BATCH,
                "global_batch_size": BATCH * case.microbatches,
            },
            "lr_schedule": {"name": "constant"},
            "run": {"seed": 3},
        }
    )


def tokens(case):
    """Returns random tokens [microbatches x B, S + 1]."""
    generator = torch.Generator().manual_seed(case.microbatches)
    return torch.randint(
        0, VOCABULARY, (case.microbatches * BATCH, LENGTH + 1), generator=generator
    )


def make_context(architecture, inputs, labels):
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    turns = rotations(positions[:1], architecture, torch.float32)
    return Microbatch(inputs, labels, positions, rotations=turns)


def run_ours(config, architecture, mesh, case):
    """Runs a step with megatrain; returns the placement too."""
    from megatrain.training.step_runner import StepRunner

    runner = StepRunner(config, architecture, mesh, torch.device("cpu"))
    microbatches = [
        make_context(architecture, rows[:, :-1], rows[:, 1:]) for rows in tokens(case).split(BATCH)
    ]
    losses = runner.executor.run(
        runner.instructions,
        microbatches,
        backward=runner.optimizer.backward,
        loss_weight=torch.tensor(LOSS_WEIGHT),
    )
    gradients = {spec.name: parameter.main_grad for spec, parameter in parameters(runner.stage)}
    return Outcome([loss * LOSS_WEIGHT for loss in losses], gradients), runner.schedule.placement


class TheirStage(torch.nn.Module):
    """megatrain's layers for torch: map tokens or hidden states to hidden states or logits."""

    def __init__(self, layers, architecture):
        super().__init__()
        self.layers, self.architecture = layers, architecture

    def forward(self, x):
        first = not x.is_floating_point()
        inputs = x if first else torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        microbatch, hidden_states = (
            make_context(self.architecture, inputs, inputs),
            None if first else HiddenStates(x),
        )
        for layer in self.layers:
            hidden_states = (
                layer.logits(hidden_states)
                if isinstance(layer, Head)
                else layer(hidden_states, microbatch)
            )
        return hidden_states.hidden if isinstance(hidden_states, HiddenStates) else hidden_states


def their_loss(logits, labels):
    """Logits [S, B, V], labels [B, S]."""
    return (
        F.cross_entropy(logits.flatten(0, 1), labels.t().reshape(-1), reduction="sum") * LOSS_WEIGHT
    )


def run_theirs(config, architecture, mesh, case, placement):
    from torch.distributed.pipelining import PipelineStage, schedules

    stage = build_stage(config, architecture, mesh, "cpu", placement)
    initialize(stage, config.run.seed)
    rank = mesh.pipeline.rank
    stages = [
        PipelineStage(
            TheirStage(layers, architecture), index, placement.stages, torch.device("cpu")
        )
        for layers, index in zip(stage.chunks, placement.stages_of(rank), strict=True)
    ]
    cls = getattr(schedules, case.theirs)
    single = issubclass(cls, schedules.PipelineScheduleSingle)
    schedule = cls(
        stages[0] if single else stages, case.microbatches, loss_fn=their_loss, scale_grads=False
    )
    rows, losses = tokens(case), []
    inputs = [rows[:, :-1]] if any(each.is_first for each in stages) else []
    schedule.step(
        *inputs,
        target=rows[:, 1:] if any(each.is_last for each in stages) else None,
        losses=losses,
        return_outputs=False,
    )
    gradients = {spec.name: parameter.grad for spec, parameter in parameters(stage)}
    return Outcome([loss.detach() for loss in losses], gradients)


def run_cases(rank, world, cases):
    mesh = make_mesh(rank, pipeline=world)
    found = []
    for case in cases:
        config, architecture = make_config(case), read_config(load_hf_config(MODELS[case.model]))
        ours, placement = run_ours(config, architecture, mesh, case)
        found.append((ours, run_theirs(config, architecture, mesh, case, placement)))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcomes of megatrain and torch by case and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for world in (2, 4):
        cases = [case for case in CASES if case.world == world]
        by_rank = run_ranks(run_cases, world, cases, folder=folder)
        found |= dict(zip(cases, zip(*by_rank, strict=True), strict=True))
    return found


def test_every_schedule_of_torch_is_here():
    from torch.distributed.pipelining import schedules

    public = {name for name in dir(schedules) if name.startswith("Schedule")}
    assert {case.theirs for case in CASES} >= public


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_losses_and_gradients_equal_torchs(outcomes, case):
    with_loss = [rank for rank in outcomes[case] if rank[0].losses]
    ((ours, theirs),) = with_loss
    assert len(ours.losses) == case.microbatches
    torch.testing.assert_close(
        torch.stack(ours.losses), torch.stack(theirs.losses), rtol=1e-6, atol=0
    )
    names = set()
    for ours, theirs in outcomes[case]:
        assert ours.gradients.keys() == theirs.gradients.keys()
        names |= ours.gradients.keys()
        for name, expected in theirs.gradients.items():
            assert expected.norm() > 0.01
            assert float((ours.gradients[name] - expected).norm() / expected.norm()) < 1e-6, name
    assert len(names) == sum(len(ours.gradients) for ours, _ in outcomes[case]), (
        "each parameter is on one rank"
    )
