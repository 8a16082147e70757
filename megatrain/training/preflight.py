"""Validation of a run before its ranks start: for the start, `--dry-run` and `megatrain check`.

`validate_run` finds all errors of a run and changes nothing on disk. A start then prepares the data
(`prepare_run`); a dry run and `megatrain check` print the plan (run_plan.py).
"""

from __future__ import annotations

import difflib
import os
from functools import partial
from pathlib import Path

from megatrain.checkpoint import resume
from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config.issues import IssueCollector
from megatrain.config.loader import Config, has_tokenizer
from megatrain.config.validation import find_errors, reset_invalid
from megatrain.data.gpt_dataset import parse_blend, select_paths
from megatrain.data.split import Part
from megatrain.data.tokenizer import load_tokenizer
from megatrain.distributed import device as device_module
from megatrain.errors import CheckpointError, ConfigError, DataError, UserError
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import parameter_shapes
from megatrain.models.quantize import check_bitsandbytes
from megatrain.planner.run_spec import (
    Cluster,
    RunSpec,
    choose_start,
    describe_run,
    layout_errors,
)
from megatrain.telemetry.exporters import check_exporters
from megatrain.training.task import PretrainingTask, Task, text_file_error

_OUTPUT_FILES = ("checkpoints", "logs", "config.yaml", "metrics.jsonl", "events.jsonl")


def check_start(config: Config, task: Task, world_size: int) -> RunSpec:
    """Validates a run and prepares its data and output folder; raises the first error."""
    device = "cuda" if device_module.has_gpu() else "cpu"
    issues = IssueCollector()
    spec = validate_run(config, task, Cluster(1, world_size, device), issues, read_data=False)
    issues.raise_first()
    assert spec is not None, "a run without errors has a spec"
    check_output_folder(Path(config.run.output_dir))
    for part in data_parts(config):
        spec = prepare_part(spec, task, part)
    return spec


def prepare_part(spec: RunSpec, task: Task, part: Part) -> RunSpec:
    """Prepares training or validation data; returns the spec with the size of training data."""
    task.prepare(spec.config, part)
    source = task.open(spec.config, spec.model, part)
    return spec.with_samples(source.per_epoch) if part == "train" else spec


def data_parts(config: Config) -> list[Part]:
    """Returns the parts of the data that a run reads."""
    return ["train", "valid"] if config.eval.every else ["train"]


def validate_run(
    config: Config,
    task: Task,
    cluster: Cluster,
    issues: IssueCollector,
    *,
    file_issues: IssueCollector | None = None,
    read_data: bool = True,
) -> RunSpec | None:
    """Validates a run without changing anything on disk.

    Args:
        issues: receives all errors.
        file_issues: receives errors of missing files and packages instead of `issues`. A dry run
            tolerates them, because another machine may have them.
        read_data: whether to look for the data and read some samples. A start and a dry run read
            all data afterwards.

    Returns:
        The spec; None if model and layout have errors.
    """
    file_issues = file_issues or issues
    _add_setting_errors(config, issues)
    config = reset_invalid(config)
    if init_from_missing := _missing_init_from(config):
        (issues if config.model == config.train.init_from else file_issues).add(init_from_missing)
    else:
        issues.attempt(lambda: task.check(config))
    missing = _add_missing_data(config, task, file_issues) if read_data else set()
    file_issues.attempt(lambda: check_bitsandbytes(config.lora))
    issues.attempt(lambda: check_exporters(config.run))
    if init_from_missing and config.model == config.train.init_from:
        return None  # model and tokenizer are missing with it
    model = issues.attempt(lambda: task.architecture(config))
    if model is None:
        return None
    conflicts = list(layout_errors(config, model, cluster))
    for conflict in conflicts:
        issues.add(conflict)
    _check_tokenizer(config, model, issues, file_issues)
    _check_initial_state(config, model, issues)
    spec = None if conflicts else RunSpec.create(config, model, cluster)
    if read_data:
        spec = _read_samples(config, model, spec, task, missing, issues)
    return spec


def _add_setting_errors(config: Config, issues: IssueCollector) -> None:
    for error in find_errors(config):
        if not issues.is_consequence(error):
            issues.add(error)


# -- files -----------------------------------------------------------------------------------------


def _missing_init_from(config: Config) -> ConfigError | None:
    """Returns an error if `train.init_from` does not exist, with the most similar folder as fix."""
    start = config.train.init_from
    if start is None or Path(start).exists():
        return None
    path = Path(start)
    siblings = (
        sorted(sibling.name for sibling in path.parent.iterdir() if sibling.is_dir())
        if path.parent.is_dir()
        else []
    )
    if similar := difflib.get_close_matches(path.name, siblings, n=1):
        folder = str(path.parent / similar[0])
        hint, fix = f"did you mean `{folder}`?", {"train.init_from": folder}
        return ConfigError("train.init_from", start, "does not exist", hint, fix=fix)
    command = _command_for_model(start)
    return ConfigError("train.init_from", start, "does not exist", command=command)


def _command_for_model(folder: str) -> str:
    return "make demo" if folder.startswith("demo/") else f"megatrain convert SOURCE {folder}"


def _add_missing_data(config: Config, task: Task, issues: IssueCollector) -> set[Part]:
    """Adds an error with a command for each data file that does not exist.

    Returns:
        The parts of the data with a missing file.
    """
    missing: set[Part] = set()
    for part in data_parts(config):
        if isinstance(task, PretrainingTask) and (error := text_file_error(config, part)):
            issues.add(error)
            missing.add(part)
            continue
        for path in _missing_paths(config, task, part):
            command = _command_for_data(config, task, path)
            issues.add(DataError(f"data.{part}={path} does not exist", command=command))
            missing.add(part)
    return missing


def _missing_paths(config: Config, task: Task, part: Part) -> list[str]:
    try:
        blend = parse_blend(select_paths(config.data, part)[0], setting=f"data.{part}")
    except UserError:
        return []  # reported when the data are opened
    paths = [path for path, _ in blend]
    if isinstance(task, PretrainingTask):
        return [path for path in paths if not _has_indexed_dataset(path)]
    return [path for path in paths if "*" not in path and not Path(path).exists()]


def _has_indexed_dataset(prefix: str) -> bool:
    return any(Path(f"{prefix}{suffix}").exists() for suffix in (".idx", ".bin"))


def _command_for_data(config: Config, task: Task, path: str) -> str:
    if path.startswith("demo/functions"):
        return f"python tools/gather_functions.py {config.data.train} --valid {config.data.valid}"
    if path.startswith("demo/"):
        return "make demo"
    if isinstance(task, PretrainingTask):
        tokenizer = config.data.tokenizer or "TOKENIZER"
        return f"megatrain preprocess TEXTS.jsonl --tokenizer {tokenizer} --output {path}"
    return f"cp YOURS.jsonl {path}"


def _check_tokenizer(
    config: Config, model: TransformerConfig, issues: IssueCollector, file_issues: IssueCollector
) -> None:
    """Adds an error if the tokenizer is missing, unreadable or larger than the vocabulary."""
    folder = config.data.tokenizer
    if folder is None:
        return
    if not Path(folder).exists():
        file_issues.add(_missing_tokenizer(config, folder, model.vocab_size))
        return
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        hint = "use the tokenizer of the model"
        issues.add(ConfigError("data.tokenizer", folder, f"cannot be loaded: {error}", hint))
        return
    if len(tokenizer) > model.vocab_size:
        requirement = f"is less than the {len(tokenizer)} tokens of data.tokenizer={folder}"
        fix = {"model.vocab_size": len(tokenizer)}
        hint = f"set model.vocab_size={len(tokenizer)}"
        issues.add(ConfigError("model.vocab_size", model.vocab_size, requirement, hint, fix=fix))


def _missing_tokenizer(config: Config, folder: str, vocab_size: int) -> ConfigError:
    """Returns the error with a command that creates the tokenizer.

    Pretrained weights need their own tokenizer: a new one would assign other meanings to token ids.
    """
    error = partial(ConfigError, "data.tokenizer", folder, "does not exist")
    start = config.train.init_from
    if folder == "demo/tokenizer" or (folder == start and folder.startswith("demo/")):
        return error(command="make demo")
    if folder == start:
        return error(command=_command_for_model(folder))
    if start is not None and (has_tokenizer(start) or not Path(start).exists()):
        return error(fix={"data.tokenizer": start})
    if start is not None or config.lora.rank:
        return error(fix={"data.tokenizer": "FOLDER_OF_THE_MODEL"})
    texts = config.data.train if folder.startswith("demo/") else "TEXTS.jsonl"
    return error(
        command=f"megatrain train-tokenizer {texts} --vocab-size {vocab_size} --output {folder}"
    )


def _check_initial_state(config: Config, model: TransformerConfig, issues: IssueCollector) -> None:
    """Adds an error if the checkpoint to resume from, or the pretrained weights, do not fit."""
    checkpoint = None
    try:
        checkpoint = find_checkpoint(config, model)
    except UserError as error:
        if not error.fix_text and config.checkpoint.resume not in ("auto", "never"):
            error.fix = {"checkpoint.resume": "auto"}
        issues.add(error)
    start = config.train.init_from
    if start is None or not Path(start).exists() or (checkpoint and not config.lora.rank):
        return
    try:
        Pretrained(start, model).check(parameter_shapes(model))
    except CheckpointError as error:
        has_config = (Path(start) / "config.json").is_file()
        if not error.fix_text and config.model != start and has_config:
            error.fix = {"model": start}
        issues.add(error)


def find_checkpoint(config: Config, model: TransformerConfig) -> Path | None:
    """Returns the checkpoint that the run would resume from; raises if it does not fit the run.

    With `checkpoint.verify=full` rank 0 checks it later, when it reads all files to choose one.
    """
    path, _ = choose_start(config)
    if path is not None and config.checkpoint.verify != "full":
        resume.check(path, describe_run(config, model, data_size=1))  # layouts may differ
    return path


# -- data ------------------------------------------------------------------------------------------


def _read_samples(
    config: Config,
    model: TransformerConfig,
    spec: RunSpec | None,
    task: Task,
    missing: set[Part],
    issues: IssueCollector,
) -> RunSpec | None:
    """Reads some samples; returns the spec with the size of the training data if it is known."""
    readable = [
        part
        for part in data_parts(config)
        if part not in missing and issues.passes(partial(task.sanity_check, config, model, part))
    ]
    has_epochs = config.train.epochs is not None and not isinstance(task, PretrainingTask)
    if spec is None or not has_epochs or "train" not in readable:
        return spec
    source = issues.attempt(lambda: task.estimate_samples(config, model))
    if source is None:
        return spec
    return issues.attempt(lambda: spec.with_samples(source.per_epoch)) or spec


# -- output ----------------------------------------------------------------------------------------


def check_output_folder(folder: Path) -> None:
    """Creates the output folder; raises ConfigError if it or a file in it is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_probe(folder)
    except OSError as error:
        raise output_error(folder, f"cannot be written ({error.strerror})") from None
    for name in _OUTPUT_FILES:
        path = folder / name
        try:
            if path.exists():
                _write_probe(path) if "." not in name else path.open("ab").close()
        except OSError as error:
            requirement = f"contains {name}, which cannot be written ({error.strerror})"
            raise output_error(folder, requirement) from None


def output_error(folder: Path, requirement: str) -> ConfigError:
    """Returns the error of an output folder, with another folder as fix."""
    fix = {"run.output_dir": f"runs/{folder.name}"}
    return ConfigError("run.output_dir", str(folder), requirement, fix=fix)


def _write_probe(folder: Path) -> None:
    """Writes a file: permissions alone do not show whether a folder is writable."""
    probe = folder / f".probe-{os.getpid()}"
    probe.write_text("")
    probe.unlink()
