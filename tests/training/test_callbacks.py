"""Callbacks: none of them changes the losses, and users can add their own."""

from __future__ import annotations

from itertools import combinations

import pytest
from helpers.rank_pool import run_ranks
from helpers.training_runs import VOCABULARY, checked, lines, place, pretrain, write_tokens

from megatrain.telemetry import events
from megatrain.training.callback import Callback

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BUILT_IN = (
    "TraceRecorder",
    "ResumeCheck",
    "ProgressLogger",
    "MemoryMonitor",
    "LossSpikes",
    "NonFiniteSteps",
    "Evaluation",
    "EarlyStopping",
    "Checkpointing",
)
"""In the order in which they are called."""
STEPS, SAVED = 6, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def settings(data, output, *, steps=STEPS, **sections):
    return {
        "run": {"output_dir": str(output)},
        "model": MODEL,
        "data": {"train": str(data), "valid": str(data), "sequence_length": 16},
        "parallel": {"pipeline": 2},
        "train": {
            "steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            **sections.pop("train", {}),
        },
        "eval": {"every": 2, "batches": 1, **sections.pop("eval", {})},
        **sections,
    }


class LossRecorder(Callback):
    """Keeps the loss and the gradient norm of each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer, report, metrics):
        self.steps.append((trainer.state.step, report.loss, report.grad_norm))


def train_with_pairs(rank, world_size, raw):
    """Returns the names of all built-in callbacks, and the losses with each pair of them."""
    from megatrain.training.trainer import Trainer

    names, losses = [], {}
    for pair in [(), *combinations(BUILT_IN, 2)]:
        raw["run"]["output_dir"] += "x"
        recorder = LossRecorder()
        trainer = Trainer(checked(raw), env=place(rank, world_size))
        names = [type(callback).__name__ for callback in trainer.callbacks]
        trainer.callbacks = [
            *(callback for callback in trainer.callbacks if type(callback).__name__ in pair),
            recorder,
        ]
        trainer.train()
        losses[pair] = recorder.steps
    return names, losses


@pytest.mark.slow
def test_pairs_of_callbacks_do_not_change_the_losses(data, tmp_path):
    run_ranks(
        pretrain,
        2,
        settings(data, tmp_path / "first", train={"exit_after_step": SAVED}),
        folder=tmp_path,
    )
    raw = settings(
        data,
        tmp_path / "run",
        checkpoint={
            "resume": str(tmp_path / "first" / "checkpoints" / f"step-{SAVED:08d}"),
            "save_every": 2,
        },
        profile={"steps": [3, 4]},
        eval={"early_stopping_patience": 5},
        stability={"on_loss_spike": "rollback"},
    )
    by_rank = run_ranks(train_with_pairs, 2, raw, folder=tmp_path)
    for names, losses in by_rank:
        assert tuple(names) == BUILT_IN
        plain = losses.pop(())
        assert [step for step, _, _ in plain] == list(range(SAVED + 1, STEPS + 1))
        assert {pair for pair, steps in losses.items() if steps != plain} == set()
        assert plain == by_rank[0][1][("LossSpikes", "Evaluation")]


class LogGradientNorms(Callback):
    """Adds the largest gradient norm so far to the metrics, and records the order of its hooks."""

    def __init__(self):
        self.norms, self.hooks = [], []

    def on_train_begin(self, trainer):
        self.hooks.append("train_begin")

    def on_step_begin(self, trainer, step):
        self.hooks.append(f"step_begin {step}")

    def on_step_end(self, trainer, report, metrics):
        self.norms.append(report.grad_norm)
        metrics["largest_grad_norm"] = max(self.norms)
        self.hooks.append("step_end")

    def on_evaluate(self, trainer, metrics):
        self.hooks.append(f"evaluate {sorted(metrics)}")

    def on_log(self, trainer, metrics):
        self.hooks.append("log")

    def on_save(self, trainer, path):
        self.hooks.append(f"save {path.name}")

    def on_train_end(self, trainer):
        self.hooks.append("train_end")


def train_with_own_callback(rank, world_size, raw):
    from megatrain.training.trainer import Trainer

    callback = LogGradientNorms()
    result = Trainer(checked(raw), [callback], env=place(rank, world_size)).train()
    return callback.norms, callback.hooks, result


def test_own_callback_logs_gradient_norms(data, tmp_path):
    raw = settings(data, tmp_path / "run", steps=2, checkpoint={"async_save": False})
    for norms, hooks, result in run_ranks(train_with_own_callback, 2, raw, folder=tmp_path):
        logged = [line for line in lines(tmp_path / "run") if line["step"]]
        assert [line["largest_grad_norm"] for line in logged] == [norms[0], max(norms)]
        evaluation = "evaluate ['valid_loss']"
        assert hooks == [
            *("train_begin", evaluation, "log"),
            *("step_begin 1", "step_end", "log"),
            *("step_begin 2", evaluation, "step_end", "save step-00000002", "log"),
            "train_end",
        ]
        assert result.step == 2
        assert result.losses == tuple(line["loss"] for line in logged)
        assert result.metrics["valid_loss"] == logged[-1]["valid_loss"]
        assert result.output_dir == tmp_path / "run"
        assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000002"
        assert result.stop_reason is None


class StopAfter(Callback):
    """Requests the end of the run after a step, on one rank only."""

    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_step_end(self, trainer, report, metrics):
        if trainer.state.step == self.step and trainer.mesh.rank == self.rank:
            trainer.request_stop("enough")


def stop_on_one_rank(rank, world_size, raw, stopping_rank):
    from megatrain.training.trainer import Trainer

    return Trainer(checked(raw), [StopAfter(3, stopping_rank)], env=place(rank, world_size)).train()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_can_stop_all(rank, data, tmp_path):
    results = run_ranks(
        stop_on_one_rank, 2, settings(data, tmp_path / "run"), rank, folder=tmp_path
    )
    assert [result.step for result in results] == [3, 3]
    assert results[rank].stop_reason == "enough"
    assert {result.checkpoint for result in results} == {
        tmp_path / "run" / "checkpoints" / "step-00000003"
    }
    assert [event.event for event in events.read(tmp_path / "run")][-1] == "finish"


def test_trainer_is_a_single_process_of_its_own(data, tmp_path):
    """A new interpreter without a launcher, such as a notebook."""
    import subprocess
    import sys

    import yaml

    raw = settings(data, tmp_path / "run", steps=2)
    raw["parallel"] = {}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    program = (
        "import os, sys, signal\n"
        "from megatrain.config.loader import load\n"
        "from megatrain.training.trainer import Trainer\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "for steps in (1, 2):\n"
        "    config = load(sys.argv[1], [f'train.exit_after_step={steps}'])\n"
        "    result = Trainer(config).train()\n"
        "    print(result.step, result.checkpoint.name)\n"
        "assert 'RANK' not in os.environ\n"
        "assert signal.getsignal(signal.SIGTERM) is before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 step-00000001" in done.stdout
    assert "2 step-00000002" in done.stdout
