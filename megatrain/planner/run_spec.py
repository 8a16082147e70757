"""The specification of a run: config, model, ranks and layout, resolved and validated once.

`layout_errors` and `resolve_layout` read no files and take milliseconds, so that a search can call
them for thousands of layouts. The checks of files are in training/preflight.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.checkpoint import resume
from megatrain.checkpoint.train_state import RunDescription, describe_layout
from megatrain.config.loader import Config, to_dict
from megatrain.config.validation import find_errors
from megatrain.errors import ConfigError, UserError
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import count_adapter_parameters, count_parameters
from megatrain.models.lora import target_names
from megatrain.models.params import check_compile, check_tensor_split
from megatrain.models.quantize import check_blocks
from megatrain.models.transformer import LayerSpec
from megatrain.pipeline.schedule import Schedule
from megatrain.pipeline.stage_builder import (
    RankPlan,
    check_pipeline,
    memory_schedule,
    plan_ranks,
    rank_specs,
    run_schedule,
)


class Cluster(NamedTuple):
    """The ranks of a run.

    Attributes:
        device: `cuda` or `cpu`.
        gpu_memory_gib: memory of a GPU; None if unknown.
    """

    nodes: int
    ranks_per_node: int
    device: str
    gpu_memory_gib: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class RunSpec:
    """A run whose config, model and ranks fit each other.

    Attributes:
        model: the model that the run trains, with its task's head.
        data_size: data-parallel replicas of the model.
        microbatches: microbatches per step and replica.
        samples_per_epoch: training samples; None if unknown or endless.
        epochs: `train.epochs`, once it has been converted to steps.
    """

    config: Config
    model: TransformerConfig
    cluster: Cluster
    data_size: int
    microbatches: int
    samples_per_epoch: int | None = None
    epochs: int | None = None

    @classmethod
    def create(cls, config: Config, model: TransformerConfig, cluster: Cluster) -> RunSpec:
        """Returns the spec without validating it; see `resolve_layout`."""
        data_size = config.data_size(cluster.world_size)
        return cls(config, model, cluster, data_size, config.microbatches(data_size))

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None if they depend on data of unknown size."""
        train = self.config.train
        return self.config.steps if (train.steps, train.tokens) != (None, None) else None

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of a training step; 1f1b for `auto`, which starts from it."""
        return run_schedule(self.config, self.data_size)

    @cached_property
    def memory_schedule(self) -> Schedule:
        """A schedule with the peak memory of `schedule` and as few microbatches as that takes."""
        return memory_schedule(self.config, self.data_size)

    @cached_property
    def layers(self) -> list[list[list[LayerSpec]]]:
        """The layers of each virtual stage of each pipeline rank."""
        return rank_specs(self.config, self.model, self.memory_schedule.placement)

    @cached_property
    def rank_plans(self) -> list[RankPlan]:
        """Layers and parameters of each pipeline rank."""
        return plan_ranks(self.config, self.model, self.memory_schedule.placement)

    @cached_property
    def num_parameters(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def num_trained_parameters(self) -> int:
        """Parameters of the adapters with LoRA, else of the model."""
        if not self.config.lora.rank:
            return self.num_parameters
        return count_adapter_parameters(self.model, self.config.lora)

    def with_samples(self, samples_per_epoch: int | None) -> RunSpec:
        """Returns the spec with `train.epochs` converted to steps.

        Raises ConfigError if the data have no epochs or the steps do not fit other settings.
        """
        train = self.config.train
        if train.epochs is None:
            return dataclasses.replace(self, samples_per_epoch=samples_per_epoch)
        if samples_per_epoch is None:
            raise ConfigError(
                "train.epochs",
                train.epochs,
                "requires a single dataset, not a blend",
                "set train.steps instead",
                fix={"train.epochs": None, "train.steps": 1000},
            )
        config = self.config.with_steps(samples_per_epoch)
        for error in find_errors(config):
            raise error
        return dataclasses.replace(
            self, config=config, samples_per_epoch=samples_per_epoch, epochs=train.epochs
        )


def resolve_layout(config: Config, model: TransformerConfig, cluster: Cluster) -> RunSpec:
    """Returns the spec of a layout; raises the first of `layout_errors`."""
    for error in layout_errors(config, model, cluster):
        raise error
    return RunSpec.create(config, model, cluster)


def layout_errors(
    config: Config, model: TransformerConfig, cluster: Cluster
) -> Iterator[UserError]:
    """Yields all conflicts between config, model and ranks."""
    parallel, on_gpu = config.parallel, cluster.device == "cuda"
    checks: list[Callable[[], object]] = [
        lambda: config.microbatches(config.data_size(cluster.world_size)),
        lambda: check_tensor_split(model, parallel.tensor),
        lambda: _check_adapters(config, model),
        lambda: _check_stages(config, model, cluster),
        lambda: check_dtype(config.train.dtype, on_gpu=on_gpu),
        lambda: _check_positions(config.data.sequence_length, model),
    ]
    if config.train.compile:
        checks.append(lambda: check_compile(model, tensor=parallel.tensor, on_gpu=on_gpu))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield error


def _check_adapters(config: Config, model: TransformerConfig) -> None:
    if config.lora.rank:
        target_names(model, config.lora.targets)
        check_blocks(model, config.lora, config.parallel.tensor)


def _check_stages(config: Config, model: TransformerConfig, cluster: Cluster) -> None:
    check_pipeline(config, model)
    data_size = config.data_size(cluster.world_size)
    rank_specs(config, model, memory_schedule(config, data_size).placement)


def check_dtype(dtype: str, *, on_gpu: bool) -> None:
    """Raises ConfigError for fp16 on CPUs."""
    if dtype == "fp16" and not on_gpu:
        raise ConfigError(
            "train.dtype",
            dtype,
            "requires a GPU",
            "use bf16 or fp32 on CPUs",
            fix={"train.dtype": "bf16"},
        )


def _check_positions(sequence_length: int, model: TransformerConfig) -> None:
    if sequence_length > model.max_positions:
        raise ConfigError(
            "data.sequence_length",
            sequence_length,
            f"is more than the model's {model.max_positions} positions",
            f"use at most {model.max_positions}",
            fix={"data.sequence_length": model.max_positions},
        )


def replace_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Returns the config with other values of some settings, by `section.key`."""
    for name, value in settings.items():
        section, key = name.split(".")
        changed = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def choose_start(config: Config, *, hashes: bool = False) -> tuple[Path | None, str]:
    """Returns the checkpoint to resume from, None for a new start, and a sentence on why.

    `hashes` compares the contents of files with the manifest, which reads all of them.
    """
    return resume.choose_start(
        config.run.output_dir,
        resume=config.checkpoint.resume,
        init_from=config.train.init_from,
        has_adapters=config.lora.rank > 0,
        hashes=hashes,
    )


def describe_run(config: Config, model: TransformerConfig, *, data_size: int) -> RunDescription:
    """Returns the part of `train_state.json` that all checkpoints of this run share."""
    layout = describe_layout(config.parallel, data=data_size)
    return RunDescription(layout, to_dict(config), model.config.to_dict())
