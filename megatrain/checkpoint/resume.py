"""Takes a run up again from a checkpoint: bit for bit on the layout that wrote it, to rounding on any other.

What a resume must not change is refused, since the run would no longer be the one that was begun: the model, the update rule,
and what decides which samples come next. Layout, ZeRO, schedule, offload and dtype may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatrain.checkpoint import manifest, peft, retention
from megatrain.checkpoint.optimizer_state import OptimizerState
from megatrain.checkpoint.writer import TrainState, layout
from megatrain.config.loader import Config
from megatrain.config.renamed import migrate
from megatrain.distributed.collectives import gather_objects
from megatrain.distributed.mesh import ProcessMesh
from megatrain.errors import CheckpointError, format_value
from megatrain.models.config import TransformerConfig, differences
from megatrain.optim.zero import LossScale, ZeroOptimizer


def choose_start(config: Config, *, hashes: bool = False) -> tuple[Path | None, str]:
    """The checkpoint that `checkpoint.resume` means, and a sentence on why; a named one must be there and whole.

    `hashes` has `auto` compare not only the sizes of files with those written but their content as well.
    """
    wish, folder, source = (
        config.checkpoint.resume,
        Path(config.run.output_dir) / "checkpoints",
        config.train.init_from,
    )
    afresh = "starting afresh" if source is None else f"starting from {source}"
    instead = (
        ""
        if source is None or config.lora.rank
        else f"; train.init_from={source} was where the run began and is not read again"
    )
    if wish == "never":
        return None, f"{afresh}: checkpoint.resume=never{_left_by_another(folder, after=0)}"
    if wish == "auto":
        newest, passed = manifest.find_newest(folder, hashes=hashes)
        words = "".join(f"; passed over: {text}" for text in passed)
        if newest is None:
            return None, f"{afresh}: no whole checkpoint in {folder}{words}"
        return newest, f"resuming from {newest}, the newest whole checkpoint{words}{instead}"
    path = Path(wish)
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint.resume={wish} is not a folder; give a checkpoint's folder, `auto` or `never`"
        )
    wrong = manifest.find_problem(path, hashes=True)
    if wrong is not None:
        newest = max(
            [*retention.checkpoints(path / "checkpoints"), *retention.checkpoints(path)],
            default=None,
        )
        way_out = (
            "choose another checkpoint or `auto`"
            if newest is None
            else f"name one of the run's checkpoints, such as {newest}"
        )
        raise CheckpointError(f"checkpoint.resume={wish} {wrong}; {way_out}")
    return (
        path,
        f"resuming from {path}, as checkpoint.resume names it{instead}{_left_by_another(folder, after=read_train_state(path).progress.step)}",
    )


def _left_by_another(folder: Path, *, after: int) -> str:
    """What is said of checkpoints that lie ahead of where the run begins: `auto` would take one of them, not the run's own."""
    ahead = max(retention.checkpoints(folder), default=None)
    if ahead is None or retention.step_of(ahead) <= after:
        return ""
    return f"; {ahead} lies ahead, and checkpoint.resume=auto would go on from there: move it away, or give another run.output_dir"


def _another_folder(path: Path, config: Config) -> str:
    """What to do about a checkpoint that is not the run's."""
    output = config.run.output_dir
    if config.checkpoint.resume != "auto":
        return "name one of this model, or begin without any with checkpoint.resume=never"
    return (
        f"it is in the run's folder: give the run another, such as run.output_dir={_free(output)}"
    )


def _free(folder: str) -> str:
    """The folder's name with a number that is not taken."""
    number = 2
    while Path(f"{folder}-{number}").exists():
        number += 1
    return f"{folder}-{number}"


def check(path: Path, config: Config, architecture: TransformerConfig) -> None:
    """Refuse a checkpoint of another model or rule, or whose samples would not go on; needs no ranks."""
    trainer = read_train_state(path)
    peft.check(path, config)
    for name, there, here in differences(trainer.model, architecture.config)[:1]:
        raise CheckpointError(
            f"{path} is of another model: its {name} is {format_value(there)} and the run's is {format_value(here)}; {_another_folder(path, config)}"
        )
    _check_same(path, config, trainer)


def load(path: Path, *, zero: ZeroOptimizer, config: Config, mesh: ProcessMesh) -> TrainState:
    """Fill masters, states and weights from the pieces that are this rank's; all ranks call it together."""
    trainer = read_train_state(path)
    folder = OptimizerState(path / "optimizer")
    wanted = set()
    for fragment in zero.fragments():
        folder.fill(fragment)
        wanted.add(fragment.sharding.name)
    unused = folder.names().difference(*gather_objects(wanted, mesh.world))
    if unused:
        raise CheckpointError(
            f"{folder.folder} holds {min(unused)}, which this run has no place for"
        )
    zero.updates = trainer.progress.updates
    zero.loss_scaling = trainer.progress.loss_scaling
    zero.masters_to_weights()
    if trainer.progress.samples < 0:
        return trainer.progress._replace(
            samples=trainer.progress.step * config.train.global_batch_size
        )
    return trainer.progress


class TrainStateFile(NamedTuple):
    """What trainer.json says: where the run stood, how its model was split, its config and its model's."""

    progress: TrainState
    layout: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]


def read_train_state(path: Path) -> TrainStateFile:
    """A checkpoint's trainer.json."""
    content = manifest.read_json(path / "trainer.json")
    try:
        counts = {name: content[name] for name in ("step", "tokens", "updates", "bad_steps")}
        samples, spike_since = content.get("samples", -1), content.get("spike_since", 0)
        if any(
            type(number) is not int or number < 0
            for number in (*counts.values(), samples + 1, spike_since)
        ):
            raise ValueError(f"{counts} are not all natural numbers")
        losses = tuple(float(loss) for loss in content.get("losses", []))
        scaling = content.get("loss_scaling")
        loss_scaling = (
            None
            if scaling is None
            else LossScale(float(scaling[0]), *(int(number) for number in scaling[1:]))
        )
        sections = [content["config"][name] for name in ("train", "data", "run", "optimizer")]
        if not all(
            isinstance(section, dict)
            for section in (content["layout"], content["model"], content["config"], *sections)
        ):
            raise ValueError("a section is no mapping")
        progress = TrainState(
            **counts,
            losses=losses,
            loss_scaling=loss_scaling,
            samples=samples,
            spike_since=spike_since,
        )
        return TrainStateFile(
            progress, content["layout"], migrate(content["config"]), content["model"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'trainer.json'} is damaged ({type(error).__name__} {str(error)[:120]})"
        ) from None


def _check_same(path: Path, config: Config, trainer: TrainStateFile) -> None:
    """Refuse settings that a resume must not change."""
    for section, name, why in _FIXED:
        here = getattr(getattr(config, section), name)
        there = trainer.config[section].get(name, here)  # a converted checkpoint binds no run
        if there != here:
            raise CheckpointError(
                f"{path} was written with {section}.{name}={format_value(there)} and this run has {format_value(here)}: {why}; set "
                f"{section}.{name}={format_value(there)}, or start a new run from its weights with train.init_from={path}"
            )


_FIXED = [
    ("optimizer", "name", "one rule's states mean nothing to another"),
    ("train", "global_batch_size", "which samples come next follows from the step and the batch"),
    ("data", "sequence_length", "which tokens are a sample follows from it"),
    ("run", "seed", "the order of samples follows from it"),
]


def describe_differences(path: Path, config: Config, mesh: ProcessMesh) -> list[str]:
    """What is not as it was when the checkpoint was written, in words for the user."""
    trainer = read_train_state(path)
    there, here = trainer.layout, layout(config, mesh)
    found = []
    moved = [
        f"{name} {there[name]} -> {value}"
        for name, value in here.items()
        if there.get(name, value) != value
    ]
    if moved:
        found.append(f"resuming on another layout, equal up to rounding: {', '.join(moved)}")
    dtype = trainer.config["train"].get("dtype", config.train.dtype)
    if dtype != config.train.dtype:
        found.append(
            f"train.dtype was {dtype} and is {config.train.dtype}: fp32 masters and moments go on exactly, weights are rounded anew"
        )
    if trainer.config["data"].get("train", config.data.train) != config.data.train:
        found.append(
            f"data.train was {trainer.config['data'].get('train')} and is {config.data.train}: the order goes on at the same sample"
        )
    return found
