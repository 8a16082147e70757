"""What settings must be, in themselves: before model, data or ranks are looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatrain.config.schema import Config, ParallelConfig, non_default
from megatrain.errors import ConfigError, format_value, truncate


def check(config: Config) -> None:
    """Refuse what is wrong in itself, before model, data or ranks are looked at."""
    for problem in problems(config):
        raise problem


def problems(config: Config) -> Iterator[ConfigError]:
    """All that is wrong in itself."""
    yield from _check_ranges(config)
    config = reset_invalid(config)
    rules = [_check_length, _check_saving, _check_early_stop, _check_spike]
    if (
        config.train.steps is not None or config.train.tokens is not None
    ):  # else once the data have said how many steps there are
        rules += [_check_schedule, _check_trace]
    for rule in [*rules, _check_parallel, _check_lora, _check_preference, _check_classification]:
        try:
            yield from rule(config)
        except ConfigError as problem:  # of something computed from settings
            yield problem


def reset_invalid(config: Config) -> Config:
    """The config with defaults for what is out of range, so that the rest can be looked at."""
    for problem in _check_ranges(config):
        section, key = problem.setting.split(".")
        plain = getattr(getattr(Config(), section), key)
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{key: plain})}
        )
    return config


_POSITIVE = [
    "data.sequence_length",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.data",
    "parallel.virtual",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.log_every",
    "train.tokens",
    "train.epochs",
    "stability.max_nonfinite_steps",
    "eval.batches",
    "stability.spike_patience",
    "stability.max_rollbacks",
    "lr_schedule.decay_steps",
]
_NOT_NEGATIVE = [
    "train.steps",
    "eval.early_stopping_patience",
    "eval.every",
    "checkpoint.save_every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.resume_loss_tolerance",
    "train.exit_after_step",
    "run.seed",
    "run.master_port",
    "run.hang_timeout",
    "run.max_restarts",
    "parallel.autotune_memory_gib",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.grad_clip",
    "lr_schedule.warmup_steps",
    "lr_schedule.min_lr",
    "lora.rank",
    "preference.margin",
]


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _check_ranges(config: Config) -> Iterator[ConfigError]:
    for names, least, words in (
        (_POSITIVE, 1, "must be at least 1"),
        (_NOT_NEGATIVE, 0, "must not be negative"),
    ):
        for name in names:
            value = _value(config, name)
            if value is not None and not value >= least:
                yield ConfigError(name, value, words)
    if not 0 <= config.optimizer.momentum < 1:
        yield ConfigError("optimizer.momentum", config.optimizer.momentum, "must be in [0, 1)")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield ConfigError(
            "optimizer.betas", betas, "must be two numbers in [0, 1)", "for example [0.9, 0.95]"
        )
    if not 0 <= config.lr_schedule.stable_fraction <= 1:
        yield ConfigError(
            "lr_schedule.stable_fraction", config.lr_schedule.stable_fraction, "must be in [0, 1]"
        )
    if config.run.master_port > 65535:
        yield ConfigError(
            "run.master_port",
            config.run.master_port,
            "is no port",
            "use 1 to 65535, or 0 for a free one",
        )


def _check_length(config: Config) -> Iterator[ConfigError]:
    lengths = {name: getattr(config.train, name) for name in ("steps", "tokens", "epochs")}
    if sum(value is not None for value in lengths.values()) != 1:
        given = [name for name, value in lengths.items() if value is not None]
        rule = "are given together" if given else "are all missing"
        yield ConfigError(
            "train.steps, train.tokens and train.epochs",
            ", ".join(format_value(value) for value in lengths.values()),
            rule,
            "give one of them",
            fix={f"train.{name}": None for name in given[1:]} or {"train.steps": 1000},
        )


def _check_schedule(config: Config) -> Iterator[ConfigError]:
    schedule = config.lr_schedule
    if config.steps and schedule.warmup_steps > (schedule.decay_steps or config.steps):
        yield ConfigError(
            "lr_schedule.warmup_steps",
            schedule.warmup_steps,
            f"is more than the {schedule.decay_steps or config.steps} steps of the schedule",
            fix={"lr_schedule.warmup_steps": (schedule.decay_steps or config.steps) // 10},
        )
    if schedule.min_lr > config.optimizer.lr:
        yield ConfigError(
            "lr_schedule.min_lr",
            schedule.min_lr,
            f"is above optimizer.lr={config.optimizer.lr}",
            fix={"lr_schedule.min_lr": float(f"{config.optimizer.lr / 10:.3g}")},
        )


def _check_saving(config: Config) -> Iterator[ConfigError]:
    if config.checkpoint.keep_every and not config.checkpoint.keep_last:
        yield ConfigError(
            "checkpoint.keep_every",
            config.checkpoint.keep_every,
            "has no meaning while checkpoint.keep_last=0 keeps all",
            "set checkpoint.keep_last, or leave it out",
        )
    if config.checkpoint.verify == "full" and config.checkpoint.resume != "auto":
        yield ConfigError(
            "checkpoint.verify",
            "full",
            f"is about checkpoint.resume=auto and checkpoint.resume={config.checkpoint.resume}",
            "leave it out: a named one is always verified in full",
        )


def _check_early_stop(config: Config) -> Iterator[ConfigError]:
    if config.eval.early_stopping_patience and not config.eval.every:
        yield ConfigError(
            "eval.early_stopping_patience",
            config.eval.early_stopping_patience,
            "goes by evaluations, and eval.every=0 makes none",
            "set eval.every",
        )
    if not config.eval.early_stopping_patience and non_default(
        config.eval, ["early_stopping_metric"]
    ):
        yield ConfigError(
            "eval.early_stopping_metric",
            config.eval.early_stopping_metric,
            "has no meaning with eval.early_stopping_patience=0",
            "set eval.early_stopping_patience, for example 3, or leave eval.early_stopping_metric out",
        )


def _check_spike(config: Config) -> Iterator[ConfigError]:
    stability = config.stability
    for name in ("spike_threshold", "spike_window", "spike_patience", "max_rollbacks"):
        needed = ("rollback",) if name == "max_rollbacks" else ("warn", "rollback")
        if config.stability.on_loss_spike not in needed and non_default(stability, [name]):
            yield ConfigError(
                f"stability.{name}",
                getattr(stability, name),
                f"has no meaning with stability.on_loss_spike={config.stability.on_loss_spike}",
                f"set stability.on_loss_spike={' or '.join(needed)}, or leave stability.{name} out",
            )
    if not config.stability.spike_threshold > 0:
        yield ConfigError(
            "stability.spike_threshold", config.stability.spike_threshold, "must be more than 0"
        )
    least = max(8, 4 * config.stability.spike_patience)
    if config.stability.on_loss_spike != "off" and config.stability.spike_window < least:
        yield ConfigError(
            "stability.spike_window",
            config.stability.spike_window,
            f"is too few losses to judge stability.spike_patience={config.stability.spike_patience} by",
            f"use {least} or more",
        )
    if config.stability.on_loss_spike == "rollback":
        yield from _check_rollback(config)


def _check_rollback(config: Config) -> Iterator[ConfigError]:
    train = config.train
    if not config.checkpoint.save_every and not config.eval.early_stopping_patience:
        yield ConfigError(
            "stability.on_loss_spike",
            "rollback",
            "goes back to a checkpoint, and checkpoint.save_every=0 makes none before the end",
            f"set checkpoint.save_every={_tenth(config)}",
        )
    if train.epochs is not None:
        yield ConfigError(
            "stability.on_loss_spike",
            "rollback",
            "passes over samples, and train.epochs asks for every one",
            "give train.steps, or use stability.on_loss_spike=warn",
        )
    if (
        config.task == "dpo"
        and config.preference.reference != "adapters-off"
        and (config.preference.reference == "beforehand" or not config.lora.rank)
    ):
        yield ConfigError(
            "stability.on_loss_spike",
            "rollback",
            "goes on with samples whose log-probabilities preference.reference=beforehand has not computed",
            "use stability.on_loss_spike=warn, or adapters and preference.reference=adapters-off",
        )


def _tenth(config: Config) -> int:
    """Of the run's steps; of a run whose data say them, a number that is seldom wrong."""
    known = config.train.steps is not None or config.train.tokens is not None
    return max(1, config.steps // 10) if known else 100


def _check_trace(config: Config) -> Iterator[ConfigError]:
    steps = config.profile.steps
    if steps is None:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        yield ConfigError(
            "profile.steps",
            steps,
            "must be two steps, the first from 1 and not after the last",
            "for example [20, 22]",
        )
    end = min(
        config.steps,
        config.train.exit_after_step if config.train.exit_after_step is not None else config.steps,
    )
    if steps[1] > end:
        way_out = f"for example [{max(1, end - 2)}, {end}]" if end else "leave profile.steps out"
        yield ConfigError(
            "profile.steps", steps, f"goes beyond the run's last step, {end}", way_out
        )


def _check_parallel(config: Config) -> Iterator[ConfigError]:
    p = config.parallel
    if p.zero >= 2 and p.pipeline > 1:
        yield ConfigError(
            "parallel.zero",
            p.zero,
            f"needs parallel.pipeline=1 and it is {p.pipeline}: every microbatch would reduce gradients across replicas "
            "while other stages still wait for it",
            f"use parallel.zero=1 with parallel.pipeline={p.pipeline} (a stage holds 1/{p.pipeline} of weights and gradients "
            f"already), or parallel.zero={p.zero} with parallel.pipeline=1 and parallel.data={p.pipeline * (p.data or 1)}",
        )
    if p.sequence and p.tensor == 1:
        yield ConfigError(
            "parallel.sequence",
            True,
            "splits the sequence among tensor ranks and parallel.tensor=1",
            "set parallel.sequence=false or parallel.tensor to 2 or more",
        )
    if p.sequence and config.data.sequence_length % p.tensor:
        yield ConfigError(
            "data.sequence_length",
            config.data.sequence_length,
            f"does not divide among parallel.tensor={p.tensor} ranks, which parallel.sequence asks for",
            f"use {config.data.sequence_length // p.tensor * p.tensor or p.tensor}",
        )
    yield from _check_auto(p)
    if p.data is not None:
        config.microbatches(p.data)


def _check_auto(p: ParallelConfig) -> Iterator[ConfigError]:
    if p.schedule != "auto":
        if p.autotune_memory_gib is not None:
            yield ConfigError(
                "parallel.autotune_memory_gib",
                p.autotune_memory_gib,
                f"limits what parallel.schedule=auto may choose, and it is {p.schedule}",
                "use parallel.schedule=auto or leave parallel.autotune_memory_gib out",
            )
        return
    for name in ("virtual", "layers_per_stage"):
        if getattr(p, name) is not None:
            yield ConfigError(
                f"parallel.{name}",
                getattr(p, name),
                "is given and parallel.schedule=auto chooses it",
                f"leave parallel.{name} out, or name a schedule",
            )


def _check_lora(config: Config) -> Iterator[ConfigError]:
    lora = config.lora
    if lora.rank == 0 and (unused := non_default(lora)):
        yield ConfigError(
            "lora.rank",
            0,
            f"leaves lora.{unused[0]} without effect",
            "set lora.rank, for example 16",
        )
    if lora.rank and config.train.init_from is None:
        yield ConfigError(
            "lora.rank",
            lora.rank,
            "freezes the weights, and without train.init_from they are random",
            "name a model as train.init_from",
        )
    if not lora.alpha > 0:
        yield ConfigError("lora.alpha", lora.alpha, "must be more than 0")
    if not 0 <= lora.dropout < 1:
        yield ConfigError("lora.dropout", lora.dropout, "must be in [0, 1)")
    if not lora.targets:
        yield ConfigError(
            "lora.targets",
            lora.targets,
            "names nothing",
            "for example [q_proj, v_proj], or all-linear",
        )


def _check_preference(config: Config) -> Iterator[ConfigError]:
    task, preference = config.task, config.preference
    compares = task in ("dpo", "simpo", "orpo")
    unused = {
        "beta": not compares,
        "margin": task != "simpo",
        "label_smoothing": task not in ("dpo", "simpo"),
        "reference": task != "dpo",
    }
    for name, is_unused in unused.items():
        if is_unused and non_default(preference, [name]):
            yield ConfigError(
                f"preference.{name}",
                getattr(preference, name),
                f"has no effect with task={task}",
                "leave it out or set task",
            )
    if preference.beta is not None and not preference.beta > 0:
        yield ConfigError("preference.beta", preference.beta, "must be more than 0")
    if not 0 <= preference.label_smoothing < 0.5:
        yield ConfigError(
            "preference.label_smoothing", preference.label_smoothing, "must be in [0, 0.5)"
        )
    if preference.reference == "adapters-off" and not config.lora.rank:
        yield ConfigError(
            "preference.reference",
            "adapters-off",
            "needs adapters and lora.rank=0",
            "use beforehand, or set lora.rank",
        )
    if compares and config.train.micro_batch_size % 2:
        yield ConfigError(
            "train.micro_batch_size",
            config.train.micro_batch_size,
            f"is odd, and with task={task} the two sequences of a pair go together",
            f"use {config.train.micro_batch_size + 1}",
        )
    if compares and config.data.packing:
        yield ConfigError(
            "data.packing",
            True,
            f"puts several samples in a sequence, and task={task} compares sequences",
            "set data.packing=false",
        )
    if compares and config.data.train_on == "all":
        yield ConfigError(
            "data.train_on",
            "all",
            f"has no meaning with task={task}: answers are compared",
            "leave it out",
        )


def _check_classification(config: Config) -> Iterator[ConfigError]:
    section = config.classification
    if config.task not in ("classification", "token-classification") and (
        unused := non_default(section)
    ):
        yield ConfigError(
            f"classification.{unused[0]}",
            truncate(getattr(section, unused[0])),
            f"has no effect with task={config.task}",
            "set task=classification or task=token-classification",
        )
    for name in ("dropout", "label_smoothing", "augment_share"):
        if not 0 <= getattr(section, name) < 1:
            yield ConfigError(f"classification.{name}", getattr(section, name), "must be in [0, 1)")
    if section.augment == "none" and non_default(section, ["augment_share"]):
        yield ConfigError(
            "classification.augment_share",
            section.augment_share,
            "has no meaning with classification.augment=none",
            "set classification.augment, for example mix",
        )
    if section.labels is not None and len(set(section.labels)) != len(section.labels):
        yield ConfigError("classification.labels", truncate(section.labels), "names a class twice")
    if section.labels is not None and (
        len(section.labels) != 1 if section.problem == "regression" else len(section.labels) < 2
    ):
        yield ConfigError(
            "classification.labels",
            truncate(section.labels),
            f"has {len(section.labels)} names",
            "a regression has 1"
            if section.problem == "regression"
            else "a classifier tells 2 classes or more",
        )
    if section.label_smoothing and section.problem != "single-label":
        yield ConfigError(
            "classification.label_smoothing",
            section.label_smoothing,
            f"has no meaning for classification.problem={section.problem}",
        )
