"""What a user can do once a run has ended before its time: the last words below its cause, whoever launched it."""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint import manifest, retention
from megatrain.config.loader import Config
from megatrain.launch.failures import FailureReport, RankExit


def recovery_hint(config: Config, failure: FailureReport | RankExit, *, step: int | None) -> str:
    """Where the same command would go on, or what is lost; `step` is the one that was being done, 0 or None before the first.

    Empty where the failure says itself what to do, as mistakes of the user's do, and where nothing was trained.
    """
    train = config.train
    if train.steps == 0 or (isinstance(failure, FailureReport) and failure.kind == "user"):
        return ""
    saved = _newest(Path(config.run.output_dir) / "checkpoints")
    if config.checkpoint.resume == "auto" and saved is not None:
        return f"started again, the same command goes on from step {saved}"
    begins = (
        "begins afresh"
        if config.checkpoint.resume in ("auto", "never")
        else f"begins again from {config.checkpoint.resume}"
    )
    if saved is not None:
        return f"started again, the same command {begins} (checkpoint.resume={config.checkpoint.resume}); with checkpoint.resume=auto it goes on from step {saved}"
    if not step or step == 1:
        return f"no step was done: started again, the same command {begins}"
    why = f"checkpoint.save_every={config.checkpoint.save_every}" + (
        "" if config.checkpoint.save_every else " saves at the end only"
    )
    return f"there is no whole checkpoint ({why}): started again, the same command {begins}, and the steps done are lost"


def _newest(folder: Path) -> int | None:
    """The step of the checkpoint that `checkpoint.resume=auto` would take, as far as sizes of files can tell."""
    try:
        path, _ = manifest.find_newest(folder)
        return None if path is None else retention.step_number(path)
    except (OSError, ValueError):
        return None
