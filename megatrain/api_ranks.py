"""Runs the local ranks of `megatrain.train`: `python -m megatrain.api_ranks REQUEST RESULT`.

REQUEST holds the pickled config, callbacks, command and world size, which the calling process
wrote. RESULT receives the pickled result and the attributes of rank 0's callbacks, or a UserError.
"""

from __future__ import annotations

import functools
import pickle
import sys
from pathlib import Path

from megatrain.config.loader import Config
from megatrain.distributed import device
from megatrain.distributed.activity import RankActivity
from megatrain.distributed.env import RankEnv
from megatrain.errors import UserError


def main(request: Path, result_file: Path) -> int:
    """Trains on local ranks; returns the exit code."""
    config, callbacks, command, world_size = pickle.loads(request.read_bytes())
    device.set_environment(world_size)
    import cloudpickle

    from megatrain.launch.local import run_local
    from megatrain.training.preflight import check_start
    from megatrain.training.select_task import select_task

    try:
        check_start(config, select_task(config, command), world_size)
        work = functools.partial(
            _train_rank, callbacks=cloudpickle.dumps(callbacks), command=command, path=result_file
        )
        return run_local(work, config, world_size=world_size)
    except UserError as error:
        result_file.write_bytes(cloudpickle.dumps(error))
        return 1


def _train_rank(
    config: Config,
    env: RankEnv,
    activity: RankActivity,
    *,
    callbacks: bytes,
    command: str | None,
    path: Path,
) -> None:
    import cloudpickle

    from megatrain.training.trainer import Trainer

    own = pickle.loads(callbacks)
    result = Trainer(config, own, command=command, env=env, activity=activity).train()  # type: ignore[arg-type]
    if env.rank == 0:
        path.write_bytes(cloudpickle.dumps((result, [vars(callback) for callback in own])))


if __name__ == "__main__":
    from megatrain import api_ranks

    # The module under its own name: ranks find `_train_rank` there, not in `__main__`.
    sys.exit(api_ranks.main(Path(sys.argv[1]), Path(sys.argv[2])))
