"""The choice of a run's task."""

from __future__ import annotations

from typing import Literal

from megatrain.config.loader import Config
from megatrain.data.text_files import is_supported
from megatrain.training.task import PretrainingTask, Task
from megatrain.training.task_classification import ClassificationTask
from megatrain.training.task_sft import SFTTask

Command = Literal["pretrain", "finetune"]


def select_command(config: Config) -> Command:
    """Returns the command that a config is written for.

    Finetuning has its own tasks, and reads text files instead of an indexed dataset.
    """
    path = config.data.train if isinstance(config.data.train, str) else ""
    return "finetune" if config.task != "sft" or is_supported(path) else "pretrain"


def select_task(config: Config, command: Command | None = None) -> Task:
    """Returns the task of a run of the command; None selects the command by the config."""
    if (command or select_command(config)) == "pretrain":
        return PretrainingTask()
    if config.task in ("classification", "token-classification"):
        return ClassificationTask()
    return SFTTask()
