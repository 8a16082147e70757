"""Validation of settings that requires no model, data or process group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatrain.config.schema import Config, ParallelConfig, default_of, non_default
from megatrain.errors import ConfigError, Fix, truncate


def check(config: Config) -> None:
    """Raises the first of `find_errors`."""
    for error in find_errors(config):
        raise error


def find_errors(config: Config) -> Iterator[ConfigError]:
    """Yields all errors that follow from settings alone."""
    yield from _check_ranges(config)
    config = reset_invalid(config)
    rules = [_check_length, _check_checkpoints, _check_early_stopping, _check_loss_spikes]
    if config.train.steps is not None or config.train.tokens is not None:
        rules += [_check_lr_schedule, _check_traced_steps]  # require the number of steps
    for rule in [*rules, _check_parallel, _check_lora, _check_preference, _check_classification]:
        try:
            yield from rule(config)
        except ConfigError as error:  # raised by a method of Config
            yield error


def reset_invalid(config: Config) -> Config:
    """Returns the config with defaults in place of values out of range."""
    for error in _check_ranges(config):
        config = _replace(config, error.setting, default_of(error.setting))
    return config


def _replace(config: Config, name: str, value: Any) -> Config:
    section, key = name.split(".")
    changed = dataclasses.replace(getattr(config, section), **{key: value})
    return dataclasses.replace(config, **{section: changed})


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


class _Range(NamedTuple):
    """Values that a setting may have; None is always accepted."""

    contains: Callable[[Any], bool]
    requirement: str


_AT_LEAST_1 = _Range(lambda value: value >= 1, "must be at least 1")
_AT_LEAST_0 = _Range(lambda value: value >= 0, "must be at least 0")
_POSITIVE = _Range(lambda value: value > 0, "must be above 0")
_BELOW_1 = _Range(lambda value: 0 <= value < 1, "must be in [0, 1)")
_UP_TO_1 = _Range(lambda value: 0 <= value <= 1, "must be in [0, 1]")
_BELOW_HALF = _Range(lambda value: 0 <= value < 0.5, "must be in [0, 0.5)")
_PORT = _Range(lambda value: 0 <= value <= 65535, "must be in [0, 65535]")
_TWO_BELOW_1 = _Range(
    lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    "must be two numbers in [0, 1)",
)

_RANGES = {
    "data.sequence_length": _AT_LEAST_1,
    "parallel.tensor": _AT_LEAST_1,
    "parallel.pipeline": _AT_LEAST_1,
    "parallel.data": _AT_LEAST_1,
    "parallel.virtual": _AT_LEAST_1,
    "parallel.autotune_memory_gib": _AT_LEAST_0,
    "train.steps": _AT_LEAST_0,
    "train.tokens": _AT_LEAST_1,
    "train.epochs": _AT_LEAST_1,
    "train.global_batch_size": _AT_LEAST_1,
    "train.micro_batch_size": _AT_LEAST_1,
    "train.log_every": _AT_LEAST_1,
    "train.exit_after_step": _AT_LEAST_0,
    "eval.every": _AT_LEAST_0,
    "eval.batches": _AT_LEAST_1,
    "eval.early_stopping_patience": _AT_LEAST_0,
    "checkpoint.save_every": _AT_LEAST_0,
    "checkpoint.keep_last": _AT_LEAST_0,
    "checkpoint.keep_every": _AT_LEAST_0,
    "checkpoint.resume_loss_tolerance": _AT_LEAST_0,
    "stability.max_nonfinite_steps": _AT_LEAST_1,
    "stability.spike_threshold": _POSITIVE,
    "stability.spike_patience": _AT_LEAST_1,
    "stability.max_rollbacks": _AT_LEAST_1,
    "run.seed": _AT_LEAST_0,
    "run.master_port": _PORT,
    "run.hang_timeout": _AT_LEAST_0,
    "run.max_restarts": _AT_LEAST_0,
    "optimizer.lr": _AT_LEAST_0,
    "optimizer.betas": _TWO_BELOW_1,
    "optimizer.eps": _AT_LEAST_0,
    "optimizer.momentum": _BELOW_1,
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.grad_clip": _AT_LEAST_0,
    "lr_schedule.warmup_steps": _AT_LEAST_0,
    "lr_schedule.min_lr": _AT_LEAST_0,
    "lr_schedule.decay_steps": _AT_LEAST_1,
    "lr_schedule.stable_fraction": _UP_TO_1,
    "lora.rank": _AT_LEAST_0,
    "lora.alpha": _POSITIVE,
    "lora.dropout": _BELOW_1,
    "preference.beta": _POSITIVE,
    "preference.margin": _AT_LEAST_0,
    "preference.label_smoothing": _BELOW_HALF,
    "classification.dropout": _BELOW_1,
    "classification.label_smoothing": _BELOW_1,
    "classification.augment_share": _BELOW_1,
}


def _check_ranges(config: Config) -> Iterator[ConfigError]:
    for name, allowed in _RANGES.items():
        value = _value(config, name)
        if value is not None and not allowed.contains(value):
            default = 1000 if name == "train.steps" else default_of(name)
            yield ConfigError(name, value, allowed.requirement, fix={name: default})


def _without_effect(config: Config, name: str, reason: str, hint: str = "") -> ConfigError:
    """Returns the error of a setting that nothing reads; the fix is its default."""
    value = truncate(_value(config, name))
    return ConfigError(name, value, f"has no effect with {reason}", hint, fix=default_fix(name))


def default_fix(*names: str) -> dict[str, Any]:
    """Returns the fix that resets settings to their defaults."""
    return {name: default_of(name) for name in names}


def _check_length(config: Config) -> Iterator[ConfigError]:
    lengths = {
        f"train.{name}": getattr(config.train, name) for name in ("steps", "tokens", "epochs")
    }
    given = [name for name, value in lengths.items() if value is not None]
    hint = "set exactly one of train.steps, train.tokens and train.epochs"
    if not given:
        yield ConfigError("train.steps", None, "is missing", hint, fix={"train.steps": 1000})
    for name in given[1:]:
        requirement = f"cannot be combined with {given[0]}={lengths[given[0]]}"
        yield ConfigError(name, lengths[name], requirement, hint, fix=default_fix(name))


def _check_lr_schedule(config: Config) -> Iterator[ConfigError]:
    schedule = config.lr_schedule
    end = schedule.decay_steps or config.steps
    if config.steps and schedule.warmup_steps > end:
        yield ConfigError(
            "lr_schedule.warmup_steps",
            schedule.warmup_steps,
            f"must be at most {end}, the steps of the schedule",
            fix={"lr_schedule.warmup_steps": end // 10},
        )
    if schedule.min_lr > config.optimizer.lr:
        yield ConfigError(
            "lr_schedule.min_lr",
            schedule.min_lr,
            f"must be at most optimizer.lr={config.optimizer.lr}",
            fix={"lr_schedule.min_lr": float(f"{config.optimizer.lr / 10:.3g}")},
        )


def _check_checkpoints(config: Config) -> Iterator[ConfigError]:
    checkpoint = config.checkpoint
    if checkpoint.keep_every and not checkpoint.keep_last:
        reason = "checkpoint.keep_last=0, which keeps all"
        yield _without_effect(config, "checkpoint.keep_every", reason)
    if checkpoint.verify == "full" and checkpoint.resume != "auto":
        reason = f"checkpoint.resume={checkpoint.resume}"
        hint = "a checkpoint named by its folder is always verified in full"
        yield _without_effect(config, "checkpoint.verify", reason, hint)


def _check_early_stopping(config: Config) -> Iterator[ConfigError]:
    if config.eval.early_stopping_patience and not config.eval.every:
        yield ConfigError(
            "eval.early_stopping_patience",
            config.eval.early_stopping_patience,
            "requires evaluations, but eval.every=0 disables them",
            fix={"eval.every": _tenth_of_steps(config)},
        )
    if not config.eval.early_stopping_patience and non_default(
        config.eval, ["early_stopping_metric"]
    ):
        reason = "eval.early_stopping_patience=0"
        yield _without_effect(config, "eval.early_stopping_metric", reason)


def _check_loss_spikes(config: Config) -> Iterator[ConfigError]:
    stability = config.stability
    action = stability.on_loss_spike
    for key in ("spike_threshold", "spike_window", "spike_patience", "max_rollbacks"):
        required = ("rollback",) if key == "max_rollbacks" else ("warn", "rollback")
        if action not in required and non_default(stability, [key]):
            hint = f"set stability.on_loss_spike={' or '.join(required)} to use it"
            reason = f"stability.on_loss_spike={action}"
            yield _without_effect(config, f"stability.{key}", reason, hint)
    smallest = max(8, 4 * stability.spike_patience)
    if action != "off" and stability.spike_window < smallest:
        yield ConfigError(
            "stability.spike_window",
            stability.spike_window,
            f"must be at least {smallest} with stability.spike_patience={stability.spike_patience}",
            fix={"stability.spike_window": smallest},
        )
    if action == "rollback":
        yield from _check_rollback(config)


def _check_rollback(config: Config) -> Iterator[ConfigError]:
    def error(requirement: str, hint: str = "", fix: Fix | None = None) -> ConfigError:
        fix = fix or {"stability.on_loss_spike": "warn"}
        return ConfigError("stability.on_loss_spike", "rollback", requirement, hint, fix=fix)

    if not config.checkpoint.save_every and not config.eval.early_stopping_patience:
        requirement = "requires checkpoints, but checkpoint.save_every=0 saves only at the end"
        yield error(requirement, fix={"checkpoint.save_every": _tenth_of_steps(config)})
    if config.train.epochs is not None:
        yield error(
            "skips samples, but train.epochs requires every sample",
            "set train.steps instead of train.epochs to use rollbacks",
        )
    reference = config.preference.reference
    if (
        config.task == "dpo"
        and reference != "adapters-off"
        and (reference == "beforehand" or not config.lora.rank)
    ):
        yield error(
            "trains on samples without reference log-probabilities "
            "(preference.reference=beforehand)",
            "use adapters and preference.reference=adapters-off to use rollbacks",
        )


def _tenth_of_steps(config: Config) -> int:
    """Returns a tenth of the steps, or 100 if data determine the number of steps."""
    known = config.train.steps is not None or config.train.tokens is not None
    return max(1, config.steps // 10) if known else 100


def _check_traced_steps(config: Config) -> Iterator[ConfigError]:
    steps, exit_step = config.profile.steps, config.train.exit_after_step
    if steps is None:
        return
    end = config.steps if exit_step is None else min(config.steps, exit_step)
    fix = {"profile.steps": [max(1, min(20, end - 2)), min(22, end)] if end else None}
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        requirement = "must be two steps, [first, last], with 1 <= first <= last"
        yield ConfigError("profile.steps", steps, requirement, fix=fix)
    elif steps[1] > end:
        requirement = f"must end by step {end}, the last of the run"
        fix = {"profile.steps": [max(1, end - 2), end] if end else None}
        yield ConfigError("profile.steps", steps, requirement, fix=fix)


def _check_parallel(config: Config) -> Iterator[ConfigError]:
    p = config.parallel
    if p.zero >= 2 and p.pipeline > 1:
        yield ConfigError(
            "parallel.zero",
            p.zero,
            f"requires parallel.pipeline=1, not {p.pipeline}: "
            "each microbatch would reduce gradients across replicas",
            f"or keep ZeRO with parallel.pipeline=1 and parallel.data={p.pipeline * (p.data or 1)}",
            fix={"parallel.zero": 1},
        )
    if p.sequence and p.tensor == 1:
        yield ConfigError(
            "parallel.sequence",
            True,
            "requires parallel.tensor of at least 2",
            fix={"parallel.sequence": False},
        )
    length = config.data.sequence_length
    if p.sequence and length % p.tensor:
        yield ConfigError(
            "data.sequence_length",
            length,
            f"must be a multiple of parallel.tensor={p.tensor} with parallel.sequence",
            fix={"data.sequence_length": length // p.tensor * p.tensor or p.tensor},
        )
    yield from _check_autotuning(config, p)
    if p.data is not None:
        config.microbatches(p.data)


def _check_autotuning(config: Config, p: ParallelConfig) -> Iterator[ConfigError]:
    if p.schedule != "auto":
        if p.autotune_memory_gib is not None:
            reason = f"parallel.schedule={p.schedule}"
            hint = "set parallel.schedule=auto to use it"
            yield _without_effect(config, "parallel.autotune_memory_gib", reason, hint)
        return
    for key in ("virtual", "layers_per_stage"):
        if getattr(p, key) is not None:
            reason = "parallel.schedule=auto, which chooses it"
            yield _without_effect(config, f"parallel.{key}", reason)


def _check_lora(config: Config) -> Iterator[ConfigError]:
    lora = config.lora
    if lora.rank == 0:
        for key in non_default(lora):
            hint = "set lora.rank, for example 16, to use it"
            yield _without_effect(config, f"lora.{key}", "lora.rank=0", hint)
    elif config.train.init_from is None:
        yield ConfigError(
            "lora.rank",
            lora.rank,
            "requires train.init_from, because the frozen weights would be random",
            "set train.init_from to a model to train adapters",
            fix=default_fix("lora.rank", *(f"lora.{key}" for key in non_default(lora))),
        )
    if not lora.targets:
        requirement = "must name at least one module"
        yield ConfigError(
            "lora.targets", lora.targets, requirement, fix=default_fix("lora.targets")
        )


def _check_preference(config: Config) -> Iterator[ConfigError]:
    task, preference = config.task, config.preference
    is_preference_task = task in ("dpo", "simpo", "orpo")
    is_read = {
        "beta": is_preference_task,
        "margin": task == "simpo",
        "label_smoothing": task in ("dpo", "simpo"),
        "reference": task == "dpo",
    }
    for key in non_default(preference):
        if not is_read[key]:
            yield _without_effect(config, f"preference.{key}", f"task={task}")
    if preference.reference == "adapters-off" and not config.lora.rank:
        yield ConfigError(
            "preference.reference",
            "adapters-off",
            "requires adapters, but lora.rank=0",
            fix={"preference.reference": "beforehand" if task == "dpo" else "auto"},
        )
    if is_preference_task:
        yield from _check_pairs(config)


def _check_pairs(config: Config) -> Iterator[ConfigError]:
    task, size = config.task, config.train.micro_batch_size
    if size % 2:
        batch = config.train.global_batch_size
        yield ConfigError(
            "train.micro_batch_size",
            size,
            f"must be even with task={task}, to hold both sequences of a pair",
            fix={
                "train.micro_batch_size": size + 1,
                "train.global_batch_size": -(-batch // (size + 1)) * (size + 1),
            },
        )
    for name, value in {"data.packing": True, "data.train_on": "all"}.items():
        if _value(config, name) == value:
            requirement = f"is not supported with task={task}, which compares sequences"
            yield ConfigError(name, value, requirement, fix=default_fix(name))


def _check_classification(config: Config) -> Iterator[ConfigError]:
    section = config.classification
    if config.task not in ("classification", "token-classification"):
        for key in non_default(section):
            hint = "set task=classification or task=token-classification to use it"
            yield _without_effect(config, f"classification.{key}", f"task={config.task}", hint)
        return
    if section.augment == "none" and non_default(section, ["augment_share"]):
        reason = "classification.augment=none"
        yield _without_effect(config, "classification.augment_share", reason)
    if section.label_smoothing and section.problem != "single-label":
        reason = f"classification.problem={section.problem}"
        yield _without_effect(config, "classification.label_smoothing", reason)
    if section.labels is not None:
        yield from _check_labels(section.labels, is_regression=section.problem == "regression")


def _check_labels(labels: list[str], *, is_regression: bool) -> Iterator[ConfigError]:
    unique = list(dict.fromkeys(labels))
    if is_regression:
        if len(labels) != 1:
            yield ConfigError(
                "classification.labels",
                truncate(labels),
                "must have exactly one name for a regression",
                fix={"classification.labels": [*labels, "value"][:1]},
            )
    elif len(unique) < 2:
        yield ConfigError(
            "classification.labels",
            truncate(labels),
            "must have at least two different names",
            "leave it out to use the labels of the model",
            fix={"classification.labels": None},
        )
    elif unique != labels:
        yield ConfigError(
            "classification.labels",
            truncate(labels),
            "must have different names",
            fix={"classification.labels": unique},
        )
