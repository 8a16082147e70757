"""The executor: gradients, order and live activations of every schedule.

A stage is |x W' + b|. Weights and inputs are small integers, so sums are exact in fp32 in any
order: a gradient is equal to the last bit, or wrong.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import NamedTuple

import pytest
import torch
from helpers.rank_pool import run_ranks

from megatrain.distributed.mesh import MeshAxis
from megatrain.distributed.tensor_parallel import linear
from megatrain.models.transformer import HiddenStates
from megatrain.pipeline import executor as executor_file
from megatrain.pipeline.communication import add_communication
from megatrain.pipeline.executor import Executor, receives_first
from megatrain.pipeline.p2p import P2PCommunicator
from megatrain.pipeline.schedule import Action, P2POp
from megatrain.pipeline.schedule_csv import read_schedule, write_schedule
from megatrain.pipeline.schedules import SCHEDULES, build_schedule, forward_only
from megatrain.pipeline.verify import check_instructions

WIDTH, LOSS_WEIGHT = 4, 3.0


class Case(NamedTuple):
    name: str
    ranks: int
    microbatches: int
    chunks: int | None = None
    shape: tuple[int, ...] = (2, 3, WIDTH)
    file: str = ""
    """A schedule written as CSV, in place of the named one."""

    def schedule(self):
        return (
            read_schedule(self.file, self.ranks)
            if self.file
            else build_schedule(self.name, self.ranks, self.microbatches, self.chunks)
        )


CASES = [
    *[
        Case(name, ranks, microbatches)
        for ranks, microbatches in ((2, 5), (4, 9))
        for name in SCHEDULES
    ],
    Case("1f1b", 1, 3),
    Case("zb-h1", 1, 3),
    Case("zb-v", 1, 3),
    Case("interleaved", 2, 5, 3),
    Case("interleaved", 4, 6, 3),
    Case("zb-h1", 4, 2),
    Case("1f1b", 2, 40),
    Case("zb-v", 2, 3, shape=(1, 1, WIDTH)),
    Case("1f1b", 2, 3, shape=(WIDTH,)),
    Case("interleaved", 2, 3, shape=(3, 1, 1, 2, WIDTH)),
]


class Given(NamedTuple):
    """A microbatch: its index and input."""

    index: int
    x: torch.Tensor


def weights(stage):
    """Returns integers [WIDTH, WIDTH] and [WIDTH]; the identity keeps products of moderate size."""
    generator = torch.Generator().manual_seed(stage)
    signs = torch.randint(-1, 2, (WIDTH, WIDTH), generator=generator) * (
        torch.rand(WIDTH, WIDTH, generator=generator) < 0.3
    )
    return (torch.eye(WIDTH) + signs).requires_grad_(), torch.randint(
        -2, 3, (WIDTH,), generator=generator
    ).float().requires_grad_()


def microbatches(case):
    generator = torch.Generator().manual_seed(case.microbatches)
    return [
        Given(k, torch.randint(-3, 4, case.shape, generator=generator).float())
        for k in range(case.microbatches)
    ]


class Layers:
    """A rank's chunks, and weak references to what each forward keeps for its weight's gradient."""

    def __init__(self, stages, last):
        self.weights = [weights(stage) for stage in stages]
        for weight, _ in self.weights:
            weight.main_grad = torch.zeros_like(weight)
        self.last = last
        """The chunk with the loss, if it is here."""
        self._kept = {}

    def __call__(self, hidden_states, given, chunk):
        x = given.x.clone() if hidden_states is None else hidden_states.hidden * 1
        self._kept[given.index, chunk] = weakref.ref(x)
        y = linear(x, *self.weights[chunk]).abs()
        # Not contiguous where there are dimensions to turn.
        return (
            y.sum()
            if chunk == self.last
            else HiddenStates(y.movedim(0, -1).contiguous().movedim(-1, 0))
        )

    def alive(self):
        return {place for place, kept in self._kept.items() if kept() is not None}


class Watch(list):
    """Records, and after each action what is alive and how many messages are held."""

    def __init__(self, layers, channels):
        self.layers, self.channels = layers, channels
        self.alive, self.held = [], []

    def append(self, record):
        super().append(record)
        self.alive.append(self.layers.alive())
        self.held.append(0 if self.channels is None else len(self.channels._sends))


class Outcome(NamedTuple):
    losses: list
    gradients: dict
    """(weight's, bias's) by stage."""
    records: list
    alive: list
    held: list
    left: int
    """What in_flight, deferred, arrived and the channels hold when the step is done."""


def autograd(output, grad, *, last):
    torch.autograd.backward(output, grad)


def run_case(rank, channels, case, monkeypatch, *, train=True):
    schedule = case.schedule() if train else forward_only(case.schedule())
    placement = schedule.placement
    end = placement.location(placement.stages - 1)
    layers = Layers(placement.stages_of(rank), end.chunk if end.rank == rank else None)
    steps = []
    whole = executor_file._StepExecution
    monkeypatch.setattr(
        executor_file, "_StepExecution", lambda *args: steps.append(whole(*args)) or steps[-1]
    )
    executor = Executor(
        layers,
        communicator=channels,
        hidden_shape=case.shape,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    executor.action_timings = watch = Watch(layers, channels)
    losses = executor.run(
        add_communication(schedule)[rank],
        microbatches(case),
        backward=autograd if train else None,
        loss_weight=torch.tensor(LOSS_WEIGHT),
    )
    monkeypatch.undo()
    left = sum(
        map(
            len,
            (
                steps[0].in_flight,
                steps[0].deferred,
                steps[0].inputs,
                channels._sends if channels else [],
            ),
        )
    )
    gradients = {
        stage: (w.main_grad, b.grad)
        for stage, (w, b) in zip(placement.stages_of(rank), layers.weights, strict=True)
    }
    assert not any(loss.requires_grad for loss in losses)
    return Outcome(losses, gradients, list(watch), watch.alive, watch.held, left)


def run_cases(rank, world, cases):
    """Returns the outcome of each case in training and in evaluation."""
    channels = (
        P2PCommunicator(MeshAxis(rank, world, tuple(range(world))), ring=True)
        if world > 1
        else None
    )
    monkeypatch = pytest.MonkeyPatch()
    return [
        (
            run_case(rank, channels, case, monkeypatch),
            run_case(rank, channels, case, monkeypatch, train=False),
        )
        for case in cases
    ]


def plain(case):
    """Computes losses and gradients by stage with plain torch in one process."""
    stages = [weights(stage) for stage in range(case.schedule().placement.stages)]
    losses = []
    for given in microbatches(case):
        x = given.x
        for weight, bias in stages:
            x = torch.nn.functional.linear(x, weight, bias).abs()
        losses.append(x.sum())
        (losses[-1] * LOSS_WEIGHT).backward()
    gradients = {stage: (weight.grad, bias.grad) for stage, (weight, bias) in enumerate(stages)}
    largest = max(float(gradient.abs().max()) for pair in gradients.values() for gradient in pair)
    assert largest < 2**24, "whole numbers are exact"
    assert all(gradient.any() for pair in gradients.values() for gradient in pair)
    return [loss.detach() for loss in losses], gradients


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of each case by rank, in training and in evaluation."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for world in sorted({case.ranks for case in CASES}):
        cases = [case for case in CASES if case.ranks == world]
        found |= dict(
            zip(
                cases,
                zip(*run_ranks(run_cases, world, cases, folder=folder), strict=True),
                strict=True,
            )
        )
    return found


def named(case):
    return "-".join(map(str, case[:4])) + "-" + "x".join(map(str, case.shape))


@pytest.fixture(params=CASES, ids=named)
def case(request):
    return request.param


def assert_equals_plain(case, ranks):
    losses, gradients = plain(case)
    ours = [loss for outcome in ranks for loss in outcome.losses]
    assert sorted(map(float, ours)) == sorted(map(float, losses))
    assert sorted(stage for outcome in ranks for stage in outcome.gradients) == sorted(gradients)
    for outcome in ranks:
        for stage, pair in outcome.gradients.items():
            for ours, expected in zip(pair, gradients[stage], strict=True):
                assert torch.equal(ours, expected), f"stage {stage}"


def test_losses_and_gradients_are_those_of_plain_torch(outcomes, case):
    assert_equals_plain(case, [train for train, _ in outcomes[case]])


def test_actions_are_done_in_the_schedules_order(outcomes, case):
    for actions, (train, evaluation) in zip(case.schedule().actions, outcomes[case], strict=True):
        assert [record.action for record in train.records] == actions
        assert [record.action for record in evaluation.records] == [
            action for action in actions if action.kind == "F"
        ]
        times = [moment for record in train.records for moment in record[1:]]
        assert times == sorted(times)


def test_an_activation_lives_until_its_backward_or_its_weight_gradient_is_done(outcomes, case):
    """The schedule's declared peaks hold, and W releases its inputs."""
    schedule = case.schedule()
    for actions, peak, (train, _) in zip(
        schedule.actions, schedule.peaks, outcomes[case], strict=True
    ):
        expected = set()
        for action, alive in zip(actions, train.alive, strict=True):
            place = (action.microbatch, action.chunk)
            if action.kind == "F":
                expected.add(place)
            elif action.kind in "BW":
                expected.remove(place)
            assert alive == expected, f"after {action}"
            assert len(alive) <= peak


def test_no_state_remains_after_a_step(outcomes, case):
    for pair in outcomes[case]:
        assert [outcome.left for outcome in pair] == [0, 0]


def test_sent_messages_are_released_during_the_step(outcomes, case):
    assert all(
        held <= P2PCommunicator.MAX_PENDING_SENDS
        for train, _ in outcomes[case]
        for held in train.held
    )


def test_evaluation_holds_no_activations_and_has_the_same_losses(outcomes, case):
    losses, _ = plain(case)
    found = [loss for _, evaluation in outcomes[case] for loss in evaluation.losses]
    assert sorted(map(float, found)) == sorted(map(float, losses))
    for _, evaluation in outcomes[case]:
        assert not any(evaluation.alive)
        assert not any(w.any() or b is not None for w, b in evaluation.gradients.values())


def test_a_schedule_from_a_file_runs(tmp_path):
    """The schedule is ZB-H1, but its last rank runs each W at once."""
    named_schedule = build_schedule("zb-h1", 2, 4)
    order = [Action(kind, k) for k in range(4) for kind in "FIW"]
    path = tmp_path / "mine.csv"
    path.write_text(
        write_schedule(
            dataclasses.replace(named_schedule, actions=[named_schedule.actions[0], order])
        )
    )
    case = Case("file", 2, 4, file=str(path))
    ranks = [
        train for train, _ in (rank[0] for rank in run_ranks(run_cases, 2, [case], folder=tmp_path))
    ]
    assert [record.action for record in ranks[1].records] == order
    assert_equals_plain(case, ranks)


# -- receives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.ranks > 1], ids=named)
def test_receives_first_is_legal_and_changes_nothing_else(case):
    schedule = case.schedule()
    lists = add_communication(schedule)
    first = [receives_first(instructions) for instructions in lists]
    check_instructions(first, schedule.placement)
    for before, after in zip(lists, first, strict=True):
        receives = [i for i in before if isinstance(i, P2POp) and i.direction == "receive"]
        assert after == receives + [i for i in before if i not in receives]


# -- failure -------------------------------------------------------------------------------------


def run_broken(rank, world, case, folder):
    channels = P2PCommunicator(MeshAxis(rank, world, tuple(range(world))), ring=True)
    layers = Layers([rank], 0 if rank == world - 1 else None)

    def stage(hidden_states, given, chunk):
        if rank == 1 and given.index == 2:
            raise RuntimeError("a broken layer")
        return layers(hidden_states, given, chunk)

    executor = Executor(
        stage,
        communicator=channels,
        hidden_shape=case.shape,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    try:
        executor.run(
            add_communication(case.schedule())[rank],
            microbatches(case),
            backward=autograd,
            loss_weight=torch.tensor(1.0),
        )
    except RuntimeError as error:
        (folder / f"rank-{rank}").write_text(str(error))
        raise


def test_a_stage_that_raises_ends_the_step_on_all_ranks(tmp_path):
    """The error propagates; ranks that wait for that rank lose the connection and fail too."""
    with pytest.raises(
        AssertionError, match=r"a broken layer|Connection closed by peer|Connection reset"
    ):
        run_ranks(run_broken, 2, Case("1f1b", 2, 5), tmp_path, folder=tmp_path)
    assert (tmp_path / "rank-1").read_text() == "a broken layer"
