"""The state of a run between two steps, as `train_state.json` in a checkpoint stores it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.checkpoint import manifest
from megatrain.config.renamed import migrate
from megatrain.config.schema import ParallelConfig
from megatrain.errors import CheckpointError
from megatrain.optim.loss_scale import LossScale

STATE_FILES = ("train_state.json", "trainer.json")
"""The name of the file, and its name in formats 1 and 2, which are still read."""


class TrainState(NamedTuple):
    """The state of a run apart from tensors.

    Attributes:
        step: steps done.
        tokens: tokens trained on.
        updates: updates that the optimizer applied.
        bad_steps: steps in a row without an update, because a loss or gradient was not finite.
        losses: losses of the last steps, oldest first; a resumed run is compared with them.
        loss_scaling: state of the loss scale; fp16 only.
        samples: position of the next step's first sample, counting samples that rollbacks skipped.
            -1 if the step alone determines it.
        spike_since: first step of the loss spike that the last step belongs to; 0 for none.
    """

    step: int
    tokens: int
    updates: int
    bad_steps: int = 0
    losses: tuple[float, ...] = ()
    loss_scaling: LossScale | None = None
    samples: int = -1
    spike_since: int = 0


class RunDescription(NamedTuple):
    """The part of `train_state.json` that is the same in all checkpoints of an attempt.

    Attributes:
        layout: sizes of the mesh axes and what else decides how tensors are sharded.
        config: the run's config, by section.
        model: the model's Hugging Face config.
    """

    layout: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]


class TrainStateFile(NamedTuple):
    """The content of `train_state.json`."""

    state: TrainState
    run: RunDescription


def describe_layout(parallel: ParallelConfig, *, data: int) -> dict[str, Any]:
    """Returns how tensors are sharded; a resume on the same layout is bit-exact.

    `data` is the number of data-parallel ranks.
    """
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": data,
        "zero": parallel.zero,
        "sequence": parallel.sequence,
        "schedule": parallel.schedule,
        "offload": parallel.offload,
    }


def train_state_path(folder: Path) -> Path:
    """Returns the path of a checkpoint's `train_state.json`, or of the older `trainer.json`."""
    new, old = (folder / name for name in STATE_FILES)
    return old if old.exists() and not new.exists() else new


def write_train_state(folder: Path, state: TrainState, run: RunDescription) -> None:
    """Writes `train_state.json`."""
    content = {**state._asdict(), **run._asdict()}
    text = json.dumps(content, indent=1, default=str)
    (folder / STATE_FILES[0]).write_text(text, encoding="utf-8")


def read_train_state(folder: Path) -> TrainStateFile:
    """Reads a checkpoint's `train_state.json`; raises CheckpointError if it is damaged."""
    path = train_state_path(folder)
    content = manifest.read_json(path)
    try:
        config = content["config"]
        sections = [config[name] for name in ("train", "data", "run", "optimizer")]
        objects = (content["layout"], content["model"], config, *sections)
        if not all(isinstance(value, dict) for value in objects):
            raise ValueError("a section must be a JSON object")
        run = RunDescription(content["layout"], migrate(config), content["model"])
        return TrainStateFile(_parse_state(content), run)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__} {str(error)[:120]})"
        ) from None


def _parse_state(content: dict[str, Any]) -> TrainState:
    counts = {name: content[name] for name in ("step", "tokens", "updates", "bad_steps")}
    samples, spike_since = content.get("samples", -1), content.get("spike_since", 0)
    for number in (*counts.values(), samples + 1, spike_since):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} must be an integer of at least 0")
    scaling = content.get("loss_scaling")
    return TrainState(
        **counts,
        losses=tuple(float(loss) for loss in content.get("losses", [])),
        loss_scaling=None
        if scaling is None
        else LossScale(float(scaling[0]), *map(int, scaling[1:])),
        samples=samples,
        spike_since=spike_since,
    )
