"""Every setting of a run: its name, default and meaning.

Sections are frozen: nothing rewrites a setting once it is read. What follows from several settings (the data size, the number of
microbatches, the steps of a token budget) is computed here, in one place, by `Config`'s methods. How they are read is in config.py, what they
must be in rules.py.
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

MOST_MICROBATCHES = 1_000_000


def setting(default: Any, meaning: str) -> Any:
    """A section's field with its default and the sentence that `megatrain config` prints."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


def non_default(section: Any, names: Iterable[str] | None = None) -> list[str]:
    """Which of a section's settings, or of those named, are not at their defaults."""
    plain = type(section)()
    return [
        name
        for name in names or [item.name for item in fields(section)]
        if getattr(section, name) != getattr(plain, name)
    ]


@dataclass(frozen=True)
class RunConfig:
    output_dir: str = setting("runs/pretrain", "Folder for everything the run writes.")
    seed: int = setting(1234, "Seed of initial weights, sample order and dropout.")
    name: str = setting("", "Name shown in logs and pictures; the output folder's name when empty.")
    master_port: int = setting(
        0, "Port on which local ranks meet; 0 takes a free one. Launchers set their own."
    )
    stall_seconds: float = setting(
        600.0,
        "Seconds in which no rank gets on after which the run is ended, and it is said whom everyone waits for; 0 waits for ever.",
    )
    max_restarts: int = setting(
        0,
        "How often ranks that were started without a launcher are started again after a failure, from the last whole checkpoint. Launchers have their own, and refuse it.",
    )
    verbose: bool = setting(
        False,
        "Show what DeepSpeed and torch say instead of sending it to logs/ in the run's folder.",
    )
    wandb: str | None = setting(
        None,
        "Weights & Biases project that gets the figures too; WANDB_MODE=offline keeps them in the run's folder. Needs the extra `wandb`.",
    )
    prometheus: str | None = setting(
        None,
        "File ending in .prom that holds the last figures for node_exporter's textfile collector, written every `train.log_every` steps. Needs the extra `prometheus`.",
    )


@dataclass(frozen=True)
class DataConfig:
    train: str | list[dict[str, Any]] | None = setting(
        None,
        "Indexed dataset to train on: a prefix (PREFIX.bin, PREFIX.idx) or a list of {path, weight}.",
    )
    valid: str | list[dict[str, Any]] | None = setting(
        None, "Indexed dataset to evaluate on, written as `train` is."
    )
    split: str | None = setting(
        None,
        'Shares of the training documents for train, valid and test, as "98,1,1"; instead of `valid`.',
    )
    tokenizer: str | None = setting(
        None, "Folder of the tokenizer; checked against the model and saved with checkpoints."
    )
    sequence_length: int = setting(1024, "Tokens in a training sequence.")
    document_mask: bool = setting(
        False,
        "Attend within documents only and restart positions at each; off attends across documents, as GPT-3 did.",
    )
    chat_template: str | None = setting(
        None, "Finetuning: file of a Jinja chat template to use instead of the tokenizer's own."
    )
    train_on: Literal["assistant", "completion", "all"] = setting(
        "assistant",
        "Finetuning: which tokens have a loss, those of every assistant turn, of the last one, or all.",
    )
    packing: bool = setting(
        False,
        "Finetuning: several samples in one sequence, each with its own positions and attention to itself alone.",
    )
    too_long: Literal["truncate", "skip", "error"] = setting(
        "truncate",
        "Finetuning: samples beyond `sequence_length` are cut at its end, left out or refused; how many is said.",
    )


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = setting(1, "Ranks that split each layer (tensor parallelism).")
    pipeline: int = setting(
        1, "Ranks that split the list of layers into stages (pipeline parallelism)."
    )
    data: int | None = setting(
        None, "Replicas of the model; derived from the number of ranks when left out."
    )
    sequence: bool = setting(
        False,
        "Split norms and residuals along the sequence among tensor ranks (sequence parallelism).",
    )
    zero: Literal[0, 1, 2, 3] = setting(
        1, "DeepSpeed ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights."
    )
    schedule: str = setting(
        "1f1b",
        "Order of forwards and backwards on a pipeline: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipev, a .csv file, or auto: what measures fastest.",
    )
    virtual: int | None = setting(
        None, "Chunks of layers on each pipeline rank, for schedules that let one choose."
    )
    layers_per_stage: list[int] | None = setting(
        None,
        "Blocks on each stage in the model's order, as [3, 5]; cut by cost when left out. A stage is one chunk of one pipeline rank.",
    )
    memory_gib: float | None = setting(
        None,
        "What a rank may hold under schedule auto, in GiB: weights, gradients, optimizer and activations; 4/5 of what is free when left out.",
    )
    offload: Literal["none", "cpu"] = setting(
        "none", "Where the optimizer and its states live: with the model, or in CPU memory."
    )


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = setting(
        None, "Optimizer steps; 0 initialises, evaluates if asked, and saves."
    )
    tokens: int | None = setting(
        None, "Token budget instead of `steps`; rounded up to whole steps."
    )
    epochs: int | None = setting(
        None,
        "Finetuning: how often to see every sample, instead of `steps`; the last step is filled with empty sequences.",
    )
    global_batch_size: int = setting(8, "Sequences in one optimizer step, over all ranks.")
    micro_batch_size: int = setting(1, "Sequences in one forward on one rank.")
    dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32",
        "Arithmetic of the model; bf16 and fp16 keep fp32 master weights and accumulate gradients in fp32.",
    )
    recompute: Literal["none", "selective", "full"] = setting(
        "none",
        "What the backward computes again instead of keeping: nothing, attention and MLP inner parts, or whole blocks.",
    )
    compile: bool = setting(
        False,
        "Compile norms, gated activations, rotations and the like into one kernel each; needs a C++ compiler on CPUs, triton on GPUs.",
    )
    eval_every: int = setting(0, "Steps between evaluations; 0 evaluates never.")
    eval_batches: int = setting(10, "Global batches in one evaluation.")
    save_every: int = setting(0, "Steps between checkpoints; 0 saves at the end only.")
    keep_last: int = setting(0, "Checkpoints to keep, newest first; 0 keeps all.")
    keep_every: int = setting(
        0,
        "Checkpoints of multiples of this many steps are kept whatever `keep_last` says; 0 keeps none of them.",
    )
    async_save: bool = setting(
        True,
        "Go on training while a checkpoint is written from a copy in CPU memory; off waits until it is there.",
    )
    log_every: int = setting(1, "Steps between printed lines.")
    init_from: str | None = setting(
        None,
        "Hugging Face folder whose weights the run starts from; `model` and `data.tokenizer` are its own when left out. A resumed run does not read it, unless adapters stand on it.",
    )
    resume: str = setting(
        "auto",
        "`auto` takes the run's newest whole checkpoint, `never` starts afresh, a folder takes that one.",
    )
    early_stop: int = setting(
        0,
        "Stop after this many evaluations in a row without a new best; each best is saved. 0 never stops early.",
    )
    early_stop_metric: str = setting(
        "valid_loss",
        "What early stopping goes by: valid_loss, or one that the task measures, such as valid_accuracy.",
    )
    verify: Literal["sizes", "full"] = setting(
        "sizes",
        "What `resume: auto` asks of a whole checkpoint: files of the sizes written, or also of the content (reads all of it).",
    )
    resume_margin: float = setting(
        1.0,
        "How far above the last losses before a checkpoint the first ones after a resume may be, unless those varied more; 0 asks nothing.",
    )
    max_bad_steps: int = setting(
        5, "Steps in a row with a non-finite loss or gradient after which the run stops."
    )
    spike: Literal["off", "warn", "rollback"] = setting(
        "warn",
        "When the loss spikes: say so, or go back to the newest checkpoint from before it and pass over the samples since. A run of `max_bad_steps` counts as a spike.",
    )
    spike_factor: float = setting(
        7.0,
        "A loss spikes above the median of the last `spike_window` by more than this many robust deviations of theirs.",
    )
    spike_window: int = setting(
        128, "Losses that a spike is judged by; none is before there are as many."
    )
    spike_steps: int = setting(
        3, "Steps in a row above that are a spike; fewer are a few odd samples."
    )
    max_rollbacks: int = setting(
        3, "Rollbacks to one and the same checkpoint, after which a run that spikes again stops."
    )
    stop_after: int | None = setting(
        None, "Save and stop after this step although `steps` goes on; schedules still see `steps`."
    )
    trace_steps: list[int] | None = setting(
        None,
        "First and last step, as [20, 22], of which every action is recorded for `megatrain xray`; nothing when left out.",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adam", "sgd", "lion"] = setting("adamw", "Update rule.")
    lr: float = setting(3e-4, "Peak learning rate.")
    betas: list[float] = setting([0.9, 0.95], "Decay of the moments of adam, adamw and lion.")
    eps: float = setting(1e-8, "Added to the root of the second moment of adam and adamw.")
    momentum: float = setting(0.9, "Momentum of sgd.")
    weight_decay: float = setting(
        0.1, "Weight decay of matrices; biases, norms and one-dimensional weights have none."
    )
    decay_embeddings: bool = setting(True, "Whether embeddings decay too, as in GPT-3 and Llama.")
    grad_clip: float = setting(1.0, "Largest norm of the whole gradient; 0 clips nothing.")


@dataclass(frozen=True)
class LrScheduleConfig:
    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = setting(
        "cosine", "Shape after the warm-up."
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0.")
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.")
    decay_steps: int | None = setting(
        None, "Steps at which the decay ends, warm-up included; the run's steps when left out."
    )
    stable_fraction: float = setting(
        0.8, "Share of the steps after warm-up that wsd keeps at the peak before it decays."
    )


@dataclass(frozen=True)
class LoraConfig:
    rank: int = setting(
        0,
        "Rank of low-rank adapters beside frozen weights, saved as a PEFT adapter; 0 trains the weights themselves.",
    )
    alpha: float = setting(16.0, "What adapters add is multiplied by alpha / rank.")
    dropout: float = setting(0.0, "Dropout of the adapters' input.")
    targets: str | list[str] = setting(
        "all-linear",
        "Modules of the Hugging Face model that get adapters, as [q_proj, v_proj]; all-linear is every linear of the blocks.",
    )
    rslora: bool = setting(
        False, "Multiply by alpha / sqrt(rank) instead, which keeps large ranks learning (rsLoRA)."
    )
    dora: bool = setting(
        False, "Also train the norm of each output's weights, apart from their direction (DoRA)."
    )
    quantize: Literal["none", "nf4"] = setting(
        "none",
        "nf4 holds the frozen linears of the blocks in 4 bits (QLoRA); needs bitsandbytes, pip install 'megatrain[qlora]'.",
    )


@dataclass(frozen=True)
class PreferenceConfig:
    beta: float | None = setting(
        None,
        "How much rewards are stretched (dpo, simpo), or the comparison's share of the loss (orpo); 0.1 when left out, for simpo 2.",
    )
    margin: float = setting(1.0, "simpo: by how much the chosen answer's reward should lead.")
    label_smoothing: float = setting(
        0.0, "dpo and simpo: share of pairs in which the rejected answer may be the better one."
    )
    reference: Literal["auto", "adapters-off", "beforehand"] = setting(
        "auto",
        "dpo: log-probabilities of the model it began from, by a forward without adapters in each step, or computed before the first and kept "
        "in the run's folder; auto is the first where lora.rank is set.",
    )


@dataclass(frozen=True)
class ClassificationConfig:
    labels: list[str] | None = setting(
        None,
        "Names of the classes in the order of their numbers; a classifier's own folder brings them. A regression has one, its value's.",
    )
    problem: Problem = setting(
        "single-label", "Of each text: one class, any number of classes, or a number."
    )
    dropout: float = setting(0.0, "Dropout of what the classifier's matrix sees.")
    label_smoothing: float = setting(
        0.0, "Share of a label's probability that training spreads over all classes."
    )
    augment: Augment = setting(
        "none",
        "Change the words of training texts at random: delete, swap, mask, or one of these for each text (mix).",
    )
    augment_share: float = setting(0.1, "Share of a text's words that are changed.")


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: str | dict[str, Any] = setting(
        "", "A Hugging Face config: a folder, a config.json, or its fields with model_type."
    )
    task: Literal["sft", "dpo", "simpo", "orpo", "classification", "token-classification"] = (
        setting(
            "sft",
            "What `megatrain finetune` learns: answers as they are, to prefer one of two (prompt, chosen, rejected), or labels of texts or of words.",
        )
    )
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica."""
        return self.parallel.tensor * self.parallel.pipeline

    def data_size(self, world_size: int) -> int:
        """Replicas among `world_size` ranks; refuses a world that the layout does not fit."""
        p = self.parallel
        layout = f"tensor {p.tensor} x pipeline {p.pipeline}"
        if p.data is None:
            if world_size % self.model_ranks:
                raise ConfigError(
                    "parallel",
                    layout,
                    f"does not divide the {world_size} ranks of this run",
                    f"start a multiple of {self.model_ranks} ranks",
                    fix=_layout_for(p, world_size),
                )
            return world_size // self.model_ranks
        if p.data * self.model_ranks != world_size:
            raise ConfigError(
                "parallel",
                f"{layout} x data {p.data}",
                f"needs {p.data * self.model_ranks} ranks and there are {world_size}",
                f"start {p.data * self.model_ranks} ranks or leave parallel.data out",
                fix={"parallel.data": None},
            )
        return p.data

    def microbatches(self, data_size: int) -> int:
        """Microbatches of one step on each replica; refuses batch sizes that do not divide."""
        unit = self.train.micro_batch_size * data_size
        if self.train.global_batch_size % unit:
            below = max(unit, self.train.global_batch_size // unit * unit)
            raise ConfigError(
                "train.global_batch_size",
                self.train.global_batch_size,
                f"is not a multiple of train.micro_batch_size={self.train.micro_batch_size} x data size {data_size}",
                f"the nearest that work are {below} and {below + unit}",
            )
        count = self.train.global_batch_size // unit
        if count > MOST_MICROBATCHES:
            raise ConfigError(
                "train.global_batch_size",
                self.train.global_batch_size,
                f"makes {count:,} microbatches of each replica in a step, and a schedule "
                f"is a list of {MOST_MICROBATCHES:,} at most",
                f"use at most {unit * MOST_MICROBATCHES}",
            )
        return count

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, (
            "checked in `check`, and epochs became steps once the data were there"
        )
        return -(-self.train.tokens // self.tokens_per_step)

    def with_steps(self, samples_per_epoch: int) -> Config:
        """This config with `train.epochs` written as steps; itself where it names none."""
        if self.train.epochs is None:
            return self
        steps = -(-self.train.epochs * samples_per_epoch // self.train.global_batch_size)
        return dataclasses.replace(
            self, train=dataclasses.replace(self.train, epochs=None, steps=steps)
        )

    @property
    def run_name(self) -> str:
        return self.run.name or Path(self.run.output_dir).name


def _layout_for(p: ParallelConfig, world_size: int) -> dict[str, int]:
    """Returns the nearest layout that divides `world_size`: with fewer stages, or tensor ranks."""
    if world_size % p.tensor == 0:
        stages = [d for d in range(1, p.pipeline + 1) if world_size % (p.tensor * d) == 0]
        return {"parallel.pipeline": max(stages)}
    ranks = [d for d in range(1, p.tensor + 1) if d == 1 or world_size % (d * p.pipeline) == 0]
    return {"parallel.tensor": max(ranks)}
