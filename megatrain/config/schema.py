"""All settings of a run: names, types, defaults and meanings.

Sections are frozen: no code changes a setting after it was read. Values that follow from several
settings (data size, microbatches, steps) are methods of `Config`. `loader` reads settings and
`validation` checks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatrain.errors import ConfigError

Problem = Literal["single-label", "multi-label", "regression"]
Augment = Literal["none", "delete", "swap", "mask", "mix"]

MAX_MICROBATCHES = 1_000_000


def setting(default: Any, meaning: str) -> Any:
    """Returns a field of a section: default and description."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


def non_default(section: Any, names: Iterable[str] | None = None) -> list[str]:
    """Returns the settings of a section, or those of `names`, that do not have their default."""
    defaults = type(section)()
    return [
        name
        for name in names or [item.name for item in fields(section)]
        if getattr(section, name) != getattr(defaults, name)
    ]


@dataclass(frozen=True)
class RunConfig:
    output_dir: str = setting("runs/pretrain", "Folder for everything the run writes.")
    seed: int = setting(1234, "Seed of initial weights, sample order and dropout.")
    name: str = setting("", "Name in logs and plots; default: name of the output folder.")
    master_port: int = setting(0, "Rendezvous port of local ranks; 0 picks a free port.")
    hang_timeout: float = setting(
        600.0, "Abort after this many seconds without progress of any rank; 0 disables."
    )
    max_restarts: int = setting(0, "Restarts of local ranks after a failure; 0 disables.")
    verbose: bool = setting(False, "Print library output instead of writing it to logs/.")
    wandb: str | None = setting(None, "Weights & Biases project; requires the extra `wandb`.")
    prometheus: str | None = setting(
        None, "File (.prom) for node_exporter's textfile collector; requires `prometheus`."
    )


@dataclass(frozen=True)
class DataConfig:
    train: str | list[dict[str, Any]] | None = setting(
        None, "Training dataset: prefix of PREFIX.bin and PREFIX.idx, or list of {path, weight}."
    )
    valid: str | list[dict[str, Any]] | None = setting(
        None, "Evaluation dataset, in the form of `train`."
    )
    split: str | None = setting(
        None, 'Proportions of train, valid and test documents, as "98,1,1"; replaces `valid`.'
    )
    tokenizer: str | None = setting(None, "Tokenizer folder, copied into checkpoints.")
    sequence_length: int = setting(1024, "Tokens per training sequence.")
    document_mask: bool = setting(
        False, "Restrict attention to each document and restart positions at its start."
    )
    chat_template: str | None = setting(
        None, "Finetuning: Jinja file that replaces the tokenizer's chat template."
    )
    train_on: Literal["assistant", "completion", "all"] = setting(
        "assistant", "Finetuning: tokens with a loss: all assistant turns, the last turn, or all."
    )
    packing: bool = setting(
        False, "Finetuning: pack several samples into a sequence, with separate attention."
    )
    too_long: Literal["truncate", "skip", "error"] = setting(
        "truncate", "Finetuning: treatment of samples longer than `sequence_length`."
    )


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = setting(1, "Tensor-parallel ranks, which split each layer.")
    pipeline: int = setting(1, "Pipeline-parallel ranks, which split the list of layers.")
    data: int | None = setting(None, "Data-parallel replicas; default: derived from all ranks.")
    sequence: bool = setting(
        False, "Sequence parallelism: split norms and residuals across tensor ranks."
    )
    zero: Literal[0, 1, 2, 3] = setting(
        1, "DeepSpeed ZeRO stage: shard optimizer (1), gradients (2) and weights (3)."
    )
    schedule: str = setting(
        "1f1b",
        "Pipeline schedule: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipev, auto or a .csv file.",
    )
    virtual: int | None = setting(
        None, "Virtual stages (layer chunks) per pipeline rank, for schedules with a choice."
    )
    layers_per_stage: list[int] | None = setting(
        None, "Blocks on each stage in model order, as [3, 5]; default: balanced by cost."
    )
    autotune_memory_gib: float | None = setting(
        None, "Memory limit of a rank for schedule auto, in GiB; default: 4/5 of free memory."
    )
    offload: Literal["none", "cpu"] = setting("none", "Device of optimizer and optimizer state.")


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = setting(None, "Optimizer steps; 0 initializes, evaluates and saves.")
    tokens: int | None = setting(None, "Token budget instead of `steps`, rounded up to a step.")
    epochs: int | None = setting(None, "Finetuning: passes over all samples instead of `steps`.")
    global_batch_size: int = setting(8, "Sequences per optimizer step, over all ranks.")
    micro_batch_size: int = setting(1, "Sequences per forward pass of one rank.")
    dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "Compute dtype; bf16 and fp16 keep fp32 master weights and gradients."
    )
    recompute: Literal["none", "selective", "full"] = setting(
        "none", "Activations to recompute: none, inside attention and MLP, or whole blocks."
    )
    compile: bool = setting(
        False, "Compile elementwise operations; requires a C++ compiler (CPU) or triton (GPU)."
    )
    log_every: int = setting(1, "Steps between log lines.")
    init_from: str | None = setting(
        None, "Hugging Face folder to load weights from; default for model and data.tokenizer."
    )
    exit_after_step: int | None = setting(
        None, "Save and exit after this step; learning rate schedules still span `steps`."
    )


@dataclass(frozen=True)
class EvalConfig:
    every: int = setting(0, "Steps between evaluations; 0 disables.")
    batches: int = setting(10, "Global batches per evaluation.")
    early_stopping_patience: int = setting(
        0, "Stop after this many evaluations without a new best, which is saved; 0 disables."
    )
    early_stopping_metric: str = setting(
        "valid_loss", "Metric of early stopping: valid_loss or one of the task's metrics."
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save_every: int = setting(0, "Steps between checkpoints; 0 saves only at the end.")
    keep_last: int = setting(0, "Newest checkpoints to keep; 0 keeps all.")
    keep_every: int = setting(
        0, "Keep all checkpoints at multiples of this many steps; 0 disables."
    )
    async_save: bool = setting(
        True, "Write checkpoints in the background from a copy in CPU memory."
    )
    resume: str = setting("auto", "auto: newest complete checkpoint; never; or a folder.")
    verify: Literal["sizes", "full"] = setting(
        "sizes", "Check of a checkpoint before resume=auto: file sizes, or all hashes."
    )
    resume_loss_tolerance: float = setting(
        1.0, "Allowed loss increase after a resume over the losses before it; 0 disables."
    )


@dataclass(frozen=True)
class StabilityConfig:
    max_nonfinite_steps: int = setting(
        5, "Stop after this many steps in a row with a non-finite loss or gradient."
    )
    on_loss_spike: Literal["off", "warn", "rollback"] = setting(
        "warn", "Action on a loss spike; rollback resumes before it and skips its samples."
    )
    spike_threshold: float = setting(
        7.0, "Robust deviations above the median of recent losses that make a spike."
    )
    spike_window: int = setting(128, "Recent losses that the threshold is computed from.")
    spike_patience: int = setting(3, "Consecutive steps above the threshold that make a spike.")
    max_rollbacks: int = setting(
        3, "Rollbacks to the same checkpoint after which another spike stops the run."
    )


@dataclass(frozen=True)
class ProfileConfig:
    steps: list[int] | None = setting(None, "First and last step to trace, as [20, 22].")


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adam", "sgd", "lion"] = setting("adamw", "Update rule.")
    lr: float = setting(3e-4, "Peak learning rate.")
    betas: list[float] = setting([0.9, 0.95], "Decay rates of the moments of adam, adamw, lion.")
    eps: float = setting(1e-8, "Term added to the denominator of adam and adamw.")
    momentum: float = setting(0.9, "Momentum of sgd.")
    weight_decay: float = setting(0.1, "Weight decay of matrices (not of biases and norms).")
    decay_embeddings: bool = setting(True, "Apply weight decay to embeddings, as GPT-3 and Llama.")
    grad_clip: float = setting(1.0, "Maximum gradient norm; 0 disables clipping.")


@dataclass(frozen=True)
class LrScheduleConfig:
    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = setting(
        "cosine", "Decay shape after the warmup."
    )
    warmup_steps: int = setting(0, "Steps of linear warmup from 0.")
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.")
    decay_steps: int | None = setting(
        None, "Steps until the end of the decay, with warmup; default: all steps."
    )
    stable_fraction: float = setting(
        0.8, "wsd: fraction of the steps after warmup at the peak learning rate."
    )


@dataclass(frozen=True)
class LoraConfig:
    rank: int = setting(0, "Rank of LoRA adapters on frozen weights; 0 trains the weights.")
    alpha: float = setting(16.0, "Adapter outputs are scaled by alpha / rank.")
    dropout: float = setting(0.0, "Dropout on adapter inputs.")
    targets: str | list[str] = setting(
        "all-linear", "Hugging Face modules with adapters, as [q_proj, v_proj]."
    )
    rslora: bool = setting(False, "Scale by alpha / sqrt(rank) instead (rsLoRA).")
    dora: bool = setting(False, "Train the norm of each output's weights separately (DoRA).")
    quantize: Literal["none", "nf4"] = setting(
        "none", "Quantization of frozen linears; nf4 (QLoRA) requires the extra `qlora`."
    )


@dataclass(frozen=True)
class PreferenceConfig:
    beta: float | None = setting(
        None,
        "Inverse temperature (dpo, simpo) or odds-ratio weight (orpo); default: 0.1, simpo 2.",
    )
    margin: float = setting(1.0, "simpo: target margin between chosen and rejected rewards.")
    label_smoothing: float = setting(0.0, "dpo, simpo: probability of a wrong preference label.")
    reference: Literal["auto", "adapters-off", "beforehand"] = setting(
        "auto", "dpo: reference log-probabilities: without adapters, or computed before training."
    )


@dataclass(frozen=True)
class ClassificationConfig:
    labels: list[str] | None = setting(
        None, "Class names in index order; default: those of the model. Regression: one name."
    )
    problem: Problem = setting(
        "single-label", "Problem type: single-label, multi-label or regression."
    )
    dropout: float = setting(0.0, "Dropout before the classification head.")
    label_smoothing: float = setting(0.0, "Probability spread over all classes in training.")
    augment: Augment = setting(
        "none", "Random changes of words in training texts; mix chooses one for each text."
    )
    augment_share: float = setting(0.1, "Fraction of words changed in each text.")


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: str | dict[str, Any] = setting(
        "", "A Hugging Face config: a folder, a config.json, or its fields with model_type."
    )
    task: Literal["sft", "dpo", "simpo", "orpo", "classification", "token-classification"] = (
        setting("sft", "Objective of `megatrain finetune`.")
    )
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica."""
        return self.parallel.tensor * self.parallel.pipeline

    @property
    def local_world_size(self) -> int:
        """Ranks that start without a launcher: those of one replica, or of `parallel.data`."""
        return self.model_ranks * (self.parallel.data or 1)

    def data_size(self, world_size: int) -> int:
        """Returns the number of replicas among `world_size` ranks.

        Raises:
            ConfigError: if the layout requires another number of ranks.
        """
        p = self.parallel
        layout = f"tensor {p.tensor} x pipeline {p.pipeline}"
        if p.data is None:
            if world_size % self.model_ranks:
                raise ConfigError(
                    "parallel",
                    layout,
                    f"does not divide the {world_size} ranks of this run",
                    f"start a multiple of {self.model_ranks} ranks",
                    fix=_nearest_layout(p, world_size),
                )
            return world_size // self.model_ranks
        if p.data * self.model_ranks != world_size:
            raise ConfigError(
                "parallel",
                f"{layout} x data {p.data}",
                f"requires {p.data * self.model_ranks} ranks, not {world_size}",
                f"start {p.data * self.model_ranks} ranks or change the layout",
                fix={"parallel.data": None, **_nearest_layout(p, world_size)},
            )
        return p.data

    def microbatches(self, data_size: int) -> int:
        """Returns the number of microbatches per step of each replica.

        Raises:
            ConfigError: if the global batch size cannot be divided or makes too many of them.
        """
        unit, size = self.train.micro_batch_size * data_size, self.train.global_batch_size
        if size % unit:
            below = size // unit * unit
            raise ConfigError(
                "train.global_batch_size",
                size,
                f"must be a multiple of train.micro_batch_size={self.train.micro_batch_size} "
                f"x data size {data_size}",
                f"the nearest are {below} and {below + unit}" if below else "",
                fix={"train.global_batch_size": below or unit},
            )
        count = size // unit
        if count > MAX_MICROBATCHES:
            raise ConfigError(
                "train.global_batch_size",
                size,
                f"makes {count:,} microbatches per replica and step, "
                f"more than the limit of {MAX_MICROBATCHES:,}",
                fix={"train.global_batch_size": unit * MAX_MICROBATCHES},
            )
        return count

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "`with_steps` replaces epochs"
        return -(-self.train.tokens // self.tokens_per_step)

    def with_steps(self, samples_per_epoch: int) -> Config:
        """Returns the config with `train.epochs` replaced by steps, if it is set."""
        if self.train.epochs is None:
            return self
        steps = -(-self.train.epochs * samples_per_epoch // self.train.global_batch_size)
        return dataclasses.replace(
            self, train=dataclasses.replace(self.train, epochs=None, steps=steps)
        )

    @property
    def run_name(self) -> str:
        return self.run.name or Path(self.run.output_dir).name


def default_of(name: str) -> Any:
    """Returns the default of a setting `section.key`."""
    section, key = name.split(".")
    return getattr(getattr(Config(), section), key)


def _nearest_layout(p: ParallelConfig, world_size: int) -> dict[str, int]:
    """Returns the fix for a layout that does not divide the world: fewer stages or tensor ranks."""
    if world_size % (p.tensor * p.pipeline) == 0:
        return {}
    if world_size % p.tensor == 0:
        stages = [d for d in range(1, p.pipeline + 1) if world_size % (p.tensor * d) == 0]
        return {"parallel.pipeline": max(stages)}
    ranks = [d for d in range(1, p.tensor + 1) if world_size % (d * p.pipeline) == 0]
    if ranks:
        return {"parallel.tensor": max(ranks)}
    return {"parallel.tensor": 1, "parallel.pipeline": 1}
