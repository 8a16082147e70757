"""Functions of the Python API: load a config, check a run, train.

`evaluate` and `convert` are in evaluation/run.py and conversion/convert.py.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatrain.config import loader
from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.distributed.env import from_environment
from megatrain.errors import UserError, format_override

if TYPE_CHECKING:
    from megatrain.config.issues import Issue
    from megatrain.training.callback import Callback
    from megatrain.training.trainer import TrainResult

TrainCommand = Literal["pretrain", "finetune"]
Overrides = Mapping[str, Any] | Sequence[str]


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Overrides = ()
) -> Config:
    """Loads and validates a config.

    Args:
        source: a YAML file, its content as nested mappings, or None for the defaults.
        overrides: settings such as `{"train.steps": 1000}` or `["train.steps=1000"]`.

    Returns:
        The config. `dataclasses.replace` and `load_config` make others from it.

    Raises:
        ConfigError: the file cannot be read, a setting is unknown or a value is invalid.

    Example:
        >>> config = load_config({"train": {"steps": 10}}, {"optimizer.lr": 1e-3})
        >>> config.train.steps, config.optimizer.lr
        (10, 0.001)
    """
    texts = [
        *(
            (format_override(name, value) for name, value in overrides.items())
            if isinstance(overrides, Mapping)
            else overrides
        )
    ]
    if not isinstance(source, Mapping):
        return loader.load(source, texts)
    raw = {name: dict(v) if isinstance(v, Mapping) else v for name, v in source.items()}
    for text in texts:
        loader.apply_override(raw, text)
    config = loader.from_dict(raw)
    loader.check(config)
    return config


def check(
    config: Config,
    *,
    nodes: int = 1,
    gpus_per_node: int | None = None,
    gpu_memory_gib: float | None = None,
    command: TrainCommand | None = None,
) -> list[Issue]:
    """Checks a run without starting it, as `megatrain check` does.

    Args:
        nodes: the machines of the run.
        gpus_per_node: the ranks of each machine; None for one replica on this machine's CPUs.
        gpu_memory_gib: the memory of a GPU in GiB; None skips the check of memory.
        command: "pretrain" or "finetune"; None decides by the task and the data.

    Returns:
        The errors, each with `message`, `fix` (overrides or a command) and `error`.

    Example:
        >>> config = load_config({"model": {"model_type": "gpt2"}, "train": {"steps": 1}})
        >>> [issue.message.split("=")[0] for issue in check(config)]
        ['data.train']
    """
    from megatrain.config.issues import IssueCollector
    from megatrain.planner.run_spec import Cluster
    from megatrain.training.run_plan import check_run
    from megatrain.training.select_task import select_task

    ranks = gpus_per_node or config.local_world_size
    cluster = Cluster(nodes, ranks, "cuda" if gpus_per_node else "cpu", gpu_memory_gib)
    issues = IssueCollector()
    for _ in check_run(config, select_task(config, command), cluster, issues):
        pass  # the lines that `megatrain check` prints
    return issues.errors


def train(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    command: TrainCommand | None = None,
) -> TrainResult:
    """Trains a model, as `megatrain pretrain` and `megatrain finetune` do.

    Under a launcher (torchrun, srun, deepspeed) every rank calls this function. Without one, a
    layout of one rank trains in this process. A larger layout trains on local ranks, which a new
    process starts: their output is printed here. This is safe in notebooks and after CUDA or
    torch has been used.

    Args:
        config: the settings.
        callbacks: called after the built-in ones on every rank. Local ranks work on copies. After
            the run, the attributes of `callbacks` are those of rank 0's copies.
        command: "pretrain" or "finetune"; None decides by the task and the data.

    Returns:
        The last step, its metrics, the last losses, the output folder and the newest checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError: the settings, the data or a checkpoint are invalid.
        UserError: a local rank failed; its error was printed.

    Example:
        >>> result = train(load_config("run.yaml"))  # doctest: +SKIP
        >>> result.metrics["loss"]  # doctest: +SKIP
        5.2826
    """
    env = from_environment(os.environ)
    world_size = config.local_world_size
    if env is None and world_size > 1:
        return _train_on_local_ranks(config, callbacks, command, world_size)
    device.set_environment(env.local_size if env else 1)
    from megatrain.telemetry.rank_log import console_logger
    from megatrain.training.trainer import Trainer

    with console_logger() if env is None else contextlib.nullcontext():
        return Trainer(config, callbacks, command=command).train()


def finetune(config: Config, *, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Finetunes a model on chats, preferences or labels; see `train`.

    Example:
        >>> result = finetune(load_config("finetune.yaml"))  # doctest: +SKIP
    """
    return train(config, callbacks=callbacks, command="finetune")


def _train_on_local_ranks(
    config: Config,
    callbacks: Sequence[Callback],
    command: TrainCommand | None,
    world_size: int,
) -> TrainResult:
    """Runs megatrain/api_ranks.py in a new process; prints its output line by line."""
    import cloudpickle

    with tempfile.TemporaryDirectory(prefix="megatrain-train-") as folder:
        request, result_file = Path(folder, "request"), Path(folder, "result")
        payload = cloudpickle.dumps((config, list(callbacks), command, world_size))
        request.write_bytes(payload)
        process = subprocess.Popen(
            [sys.executable, "-m", "megatrain.api_ranks", str(request), str(result_file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        code = _forward_output(process)
        if not result_file.exists():
            raise UserError(f"training failed with exit code {code}; its error is printed above")
        outcome = pickle.loads(result_file.read_bytes())
    if isinstance(outcome, UserError):
        raise outcome
    result, states = outcome
    for callback, state in zip(callbacks, states, strict=True):
        vars(callback).update(state)
    return result


def _forward_output(process: subprocess.Popen[str]) -> int:
    """Prints the output of a process; returns its exit code. Ctrl-C ends it."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
    except BaseException:
        process.terminate()  # the supervisor then stops its ranks
        raise
    finally:
        code = process.wait()
    return code
