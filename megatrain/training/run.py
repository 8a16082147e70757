"""The functions that a rank of `megatrain pretrain` and `megatrain finetune` runs."""

from __future__ import annotations

from collections.abc import Callable

from megatrain.config.loader import Config
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.env import RankEnv
from megatrain.training.trainer import Trainer, TrainResult


def pretrain(config: Config, env: RankEnv, activity: RankActivity | None = None) -> TrainResult:
    """Trains on indexed datasets, as the rank `env`."""
    return Trainer(config, command="pretrain", env=env, activity=activity).train()


def finetune(config: Config, env: RankEnv, activity: RankActivity | None = None) -> TrainResult:
    """Trains on chats, preference pairs or labels, as the rank `env`."""
    return Trainer(config, command="finetune", env=env, activity=activity).train()


RANK_FUNCTIONS: dict[str, Callable[[Config, RankEnv, RankActivity], object]] = {
    "pretrain": pretrain,
    "finetune": finetune,
}
"""The function of each command."""
