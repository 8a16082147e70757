"""Every setting of a run: its name, default and meaning.

A config is a YAML file of sections; `section.key=value` words on the command line are laid over it. Sections are
frozen: nothing rewrites a setting once it is read. What follows from several settings (the data size, the
number of microbatches, the steps of a token budget) is computed here, in one place, by `Config`'s methods.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from megatrain.errors import ConfigError, shown

Problem = Literal["single-label", "multi-label", "regression"]
Augment = Literal["none", "delete", "swap", "mask", "mix"]


def setting(default: Any, meaning: str) -> Any:
    """A section's field with its default and the sentence that `megatrain config` prints."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


def changed(section: Any, names: Iterable[str] | None = None) -> list[str]:
    """Which of a section's settings, or of those named, are not at their defaults."""
    plain = type(section)()
    return [name for name in names or [item.name for item in fields(section)] if getattr(section, name) != getattr(plain, name)]


@dataclass(frozen=True)
class Run:
    output_dir: str = setting("runs/pretrain", "Folder for everything the run writes.")
    seed: int = setting(1234, "Seed of initial weights, sample order and dropout.")
    name: str = setting("", "Name shown in logs and pictures; the output folder's name when empty.")
    master_port: int = setting(0, "Port on which local ranks meet; 0 takes a free one. Launchers set their own.")
    stall_seconds: float = setting(
        600.0, "Seconds in which no rank gets on after which the run is ended, and it is said whom everyone waits for; 0 waits for ever."
    )
    max_restarts: int = setting(
        0, "How often ranks that were started without a launcher are started again after a failure, from the last whole checkpoint. Launchers have their own."
    )
    verbose: bool = setting(False, "Show what DeepSpeed and torch say instead of sending it to logs/ in the run's folder.")
    wandb: str | None = setting(None, "Weights & Biases project that gets the figures too; WANDB_MODE=offline keeps them in the run's folder. Needs the extra `wandb`.")
    prometheus: str | None = setting(
        None, "File ending in .prom that holds the last figures for node_exporter's textfile collector, written every `train.log_every` steps. Needs the extra `prometheus`."
    )


@dataclass(frozen=True)
class Data:
    train: str | list[dict[str, Any]] | None = setting(
        None, "Indexed dataset to train on: a prefix (PREFIX.bin, PREFIX.idx) or a list of {path, weight}."
    )
    valid: str | list[dict[str, Any]] | None = setting(None, "Indexed dataset to evaluate on, written as `train` is.")
    split: str | None = setting(
        None, 'Shares of the training documents for train, valid and test, as "98,1,1"; instead of `valid`.'
    )
    tokenizer: str | None = setting(None, "Folder of the tokenizer; checked against the model and saved with checkpoints.")
    sequence_length: int = setting(1024, "Tokens in a training sequence.")
    document_mask: bool = setting(
        False, "Attend within documents only and restart positions at each; off attends across documents, as GPT-3 did."
    )
    chat_template: str | None = setting(None, "Finetuning: file of a Jinja chat template to use instead of the tokenizer's own.")
    train_on: Literal["assistant", "completion", "all"] = setting(
        "assistant", "Finetuning: which tokens have a loss, those of every assistant turn, of the last one, or all."
    )
    packing: bool = setting(False, "Finetuning: several samples in one sequence, each with its own positions and attention to itself alone.")
    too_long: Literal["truncate", "skip", "error"] = setting(
        "truncate", "Finetuning: samples beyond `sequence_length` are cut at its end, left out or refused; how many is said."
    )


@dataclass(frozen=True)
class Parallel:
    tensor: int = setting(1, "Ranks that split each layer (tensor parallelism).")
    pipeline: int = setting(1, "Ranks that split the list of layers into stages (pipeline parallelism).")
    data: int | None = setting(None, "Replicas of the model; derived from the number of ranks when left out.")
    sequence: bool = setting(False, "Split norms and residuals along the sequence among tensor ranks (sequence parallelism).")
    zero: Literal[0, 1, 2, 3] = setting(1, "DeepSpeed ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights.")
    schedule: str = setting("1f1b", "Order of forwards and backwards on a pipeline: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipev, a .csv file, or auto: what measures fastest.")
    virtual: int | None = setting(None, "Chunks of layers on each pipeline rank, for schedules that let one choose.")
    layers_per_stage: list[int] | None = setting(
        None, "Blocks on each stage in the model's order, as [3, 5]; cut by cost when left out. A stage is one chunk of one pipeline rank."
    )
    memory_gib: float | None = setting(
        None, "What a rank may hold under schedule auto, in GiB: weights, gradients, optimizer and activations; 4/5 of what is free when left out."
    )
    offload: Literal["none", "cpu"] = setting("none", "Where the optimizer and its states live: with the model, or in CPU memory.")


@dataclass(frozen=True)
class Train:
    steps: int | None = setting(None, "Optimizer steps; 0 initialises, evaluates if asked, and saves.")
    tokens: int | None = setting(None, "Token budget instead of `steps`; rounded up to whole steps.")
    epochs: int | None = setting(None, "Finetuning: how often to see every sample, instead of `steps`; the last step is filled with empty sequences.")
    global_batch_size: int = setting(8, "Sequences in one optimizer step, over all ranks.")
    micro_batch_size: int = setting(1, "Sequences in one forward on one rank.")
    dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "Arithmetic of the model; bf16 and fp16 keep fp32 master weights and accumulate gradients in fp32."
    )
    recompute: Literal["none", "selective", "full"] = setting(
        "none", "What the backward computes again instead of keeping: nothing, attention and MLP inner parts, or whole blocks."
    )
    eval_every: int = setting(0, "Steps between evaluations; 0 evaluates never.")
    eval_batches: int = setting(10, "Global batches in one evaluation.")
    save_every: int = setting(0, "Steps between checkpoints; 0 saves at the end only.")
    keep_last: int = setting(0, "Checkpoints to keep, newest first; 0 keeps all.")
    keep_every: int = setting(0, "Checkpoints of multiples of this many steps are kept whatever `keep_last` says; 0 keeps none of them.")
    async_save: bool = setting(True, "Go on training while a checkpoint is written from a copy in CPU memory; off waits until it is there.")
    log_every: int = setting(1, "Steps between printed lines.")
    init_from: str | None = setting(
        None, "Hugging Face folder whose weights the run starts from; `model` and `data.tokenizer` are its own when left out. A resumed run does not read it, unless adapters stand on it."
    )
    resume: str = setting("auto", "`auto` takes the run's newest whole checkpoint, `never` starts afresh, a folder takes that one.")
    early_stop: int = setting(0, "Stop after this many evaluations in a row without a new best; each best is saved. 0 never stops early.")
    early_stop_metric: str = setting("valid_loss", "What early stopping goes by: valid_loss, or one that the task measures, such as valid_accuracy.")
    verify: Literal["sizes", "full"] = setting(
        "sizes", "What `resume: auto` asks of a whole checkpoint: files of the sizes written, or also of the content (reads all of it)."
    )
    resume_margin: float = setting(
        1.0, "How far above the last losses before a checkpoint the first ones after a resume may be, unless those varied more; 0 asks nothing."
    )
    max_bad_steps: int = setting(5, "Steps in a row with a non-finite loss or gradient after which the run stops.")
    spike: Literal["off", "warn", "rollback"] = setting(
        "warn", "When the loss spikes: say so, or go back to the newest checkpoint from before it and pass over the samples since. A run of `max_bad_steps` counts as a spike."
    )
    spike_factor: float = setting(7.0, "A loss spikes above the median of the last `spike_window` by more than this many robust deviations of theirs.")
    spike_window: int = setting(128, "Losses that a spike is judged by; none is before there are as many.")
    spike_steps: int = setting(3, "Steps in a row above that are a spike; fewer are a few odd samples.")
    max_rollbacks: int = setting(3, "Rollbacks to one and the same checkpoint, after which a run that spikes again stops.")
    stop_after: int | None = setting(None, "Save and stop after this step although `steps` goes on; schedules still see `steps`.")
    trace_steps: list[int] | None = setting(
        None, "First and last step, as [20, 22], of which every action is recorded for `megatrain xray`; nothing when left out."
    )


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "adam", "sgd", "lion"] = setting("adamw", "Update rule.")
    lr: float = setting(3e-4, "Peak learning rate.")
    betas: list[float] = setting([0.9, 0.95], "Decay of the moments of adam, adamw and lion.")
    eps: float = setting(1e-8, "Added to the root of the second moment of adam and adamw.")
    momentum: float = setting(0.9, "Momentum of sgd.")
    weight_decay: float = setting(0.1, "Weight decay of matrices; biases, norms and one-dimensional weights have none.")
    decay_embeddings: bool = setting(True, "Whether embeddings decay too, as in GPT-3 and Llama.")
    grad_clip: float = setting(1.0, "Largest norm of the whole gradient; 0 clips nothing.")


@dataclass(frozen=True)
class LrSchedule:
    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = setting("cosine", "Shape after the warm-up.")
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0.")
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.")
    decay_steps: int | None = setting(None, "Steps at which the decay ends, warm-up included; the run's steps when left out.")
    stable_fraction: float = setting(0.8, "Share of the steps after warm-up that wsd keeps at the peak before it decays.")


@dataclass(frozen=True)
class Lora:
    rank: int = setting(0, "Rank of low-rank adapters beside frozen weights, saved as a PEFT adapter; 0 trains the weights themselves.")
    alpha: float = setting(16.0, "What adapters add is multiplied by alpha / rank.")
    dropout: float = setting(0.0, "Dropout of the adapters' input.")
    targets: str | list[str] = setting(
        "all-linear", "Modules of the Hugging Face model that get adapters, as [q_proj, v_proj]; all-linear is every linear of the blocks."
    )
    rslora: bool = setting(False, "Multiply by alpha / sqrt(rank) instead, which keeps large ranks learning (rsLoRA).")
    dora: bool = setting(False, "Also train the norm of each output's weights, apart from their direction (DoRA).")
    quantize: Literal["none", "nf4"] = setting("none", "nf4 holds the frozen linears of the blocks in 4 bits (QLoRA); needs bitsandbytes, pip install 'megatrain[qlora]'.")


@dataclass(frozen=True)
class Preference:
    beta: float | None = setting(
        None, "How much rewards are stretched (dpo, simpo), or the comparison's share of the loss (orpo); 0.1 when left out, for simpo 2."
    )
    margin: float = setting(1.0, "simpo: by how much the chosen answer's reward should lead.")
    label_smoothing: float = setting(0.0, "dpo and simpo: share of pairs in which the rejected answer may be the better one.")
    reference: Literal["auto", "adapters-off", "beforehand"] = setting(
        "auto", "dpo: log-probabilities of the model it began from, by a forward without adapters in each step, or computed before the first and kept "
        "in the run's folder; auto is the first where lora.rank is set."
    )


@dataclass(frozen=True)
class Classification:
    labels: list[str] | None = setting(
        None, "Names of the classes in the order of their numbers; a classifier's own folder brings them. A regression has one, its value's."
    )
    problem: Problem = setting("single-label", "Of each text: one class, any number of classes, or a number.")
    dropout: float = setting(0.0, "Dropout of what the classifier's matrix sees.")
    label_smoothing: float = setting(0.0, "Share of a label's probability that training spreads over all classes.")
    augment: Augment = setting("none", "Change the words of training texts at random: delete, swap, mask, or one of these for each text (mix).")
    augment_share: float = setting(0.1, "Share of a text's words that are changed.")


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: str | dict[str, Any] = setting("", "A Hugging Face config: a folder, a config.json, or its fields with model_type.")
    task: Literal["sft", "dpo", "simpo", "orpo", "classification", "token-classification"] = setting(
        "sft", "What `megatrain finetune` learns: answers as they are, to prefer one of two (prompt, chosen, rejected), or labels of texts or of words."
    )
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    lora: Lora = field(default_factory=Lora)
    preference: Preference = field(default_factory=Preference)
    classification: Classification = field(default_factory=Classification)

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
                    "parallel", layout, f"does not divide the {world_size} ranks of this run",
                    f"start a multiple of {self.model_ranks} ranks", paste=_layout_for(p, world_size),
                )
            return world_size // self.model_ranks
        if p.data * self.model_ranks != world_size:
            raise ConfigError(
                "parallel", f"{layout} x data {p.data}", f"needs {p.data * self.model_ranks} ranks and there are {world_size}",
                f"start {p.data * self.model_ranks} ranks or leave parallel.data out", paste="parallel.data=null",
            )
        return p.data

    def microbatches(self, data_size: int) -> int:
        """Microbatches of one step on each replica; refuses batch sizes that do not divide."""
        unit = self.train.micro_batch_size * data_size
        if self.train.global_batch_size % unit:
            below = max(unit, self.train.global_batch_size // unit * unit)
            raise ConfigError(
                "train.global_batch_size", self.train.global_batch_size,
                f"is not a multiple of train.micro_batch_size={self.train.micro_batch_size} x data size {data_size}",
                f"the nearest that work are {below} and {below + unit}",
            )
        return self.train.global_batch_size // unit

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "checked in `check`, and epochs became steps once the data were there"
        return -(-self.train.tokens // self.tokens_per_step)

    def with_steps(self, samples_per_epoch: int) -> Config:
        """This config with `train.epochs` written as steps; itself where it names none."""
        if self.train.epochs is None:
            return self
        steps = -(-self.train.epochs * samples_per_epoch // self.train.global_batch_size)
        config = dataclasses.replace(self, train=dataclasses.replace(self.train, epochs=None, steps=steps))
        check(config)
        return config

    @property
    def run_name(self) -> str:
        return self.run.name or Path(self.run.output_dir).name


def _layout_for(p: Parallel, world_size: int) -> str:
    """The nearest layout with fewer stages, or one of tensor ranks alone, that divides the world."""
    if world_size % p.tensor == 0:
        return f"parallel.pipeline={max(d for d in range(1, p.pipeline + 1) if world_size % (p.tensor * d) == 0)}"
    return f"parallel.tensor={max(d for d in range(1, p.tensor + 1) if world_size % (d * p.pipeline) == 0 or d == 1)}"


def load(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and lay `section.key=value` words over it.

    Raises ConfigError for a file that cannot be read, an unknown setting, a wrong type or a value out of range.
    """
    config, wrong = read(path, overrides)
    if wrong:
        raise wrong[0]
    check(config)
    return config


def read(path: str | Path | None, overrides: list[str] | None = None) -> tuple[Config, list[ConfigError]]:
    """What `load` reads, unchecked, and all that cannot be read. In its stead stands the default; a misspelt setting counts as the one it is like.

    Raises ConfigError only for a file that cannot be read.
    """
    wrong: list[ConfigError] = []
    raw = _read_yaml(Path(path)) if path is not None else {}
    for word in overrides or []:
        try:
            lay_over(raw, word)
        except ConfigError as error:
            wrong.append(error)
    base = Path(path).parent if path is not None else Path()
    return _from_dict(raw, base, wrong.append), wrong


def from_dict(raw: dict[str, Any], *, base: Path = Path()) -> Config:
    """A typed config from nested mappings; a relative `model` path is looked up beside the config file too."""
    return _from_dict(raw, base, _refuse)


Refuse = Callable[[ConfigError], None]
"""What is done about a setting that cannot be read."""


def _refuse(error: ConfigError) -> None:
    raise error


def _from_dict(raw: dict[str, Any], base: Path, refuse: Refuse) -> Config:
    values: dict[str, Any] = {}
    sections = typing.get_type_hints(Config)
    for written, content in raw.items():
        name = written
        if name not in sections:
            refuse(ConfigError(name, _short(content), "is not a section of the config", _did_you_mean(name, list(sections))))
            name = next((like for like in _alike(name, list(sections)) if like not in raw), "")
        try:
            if name == "model":
                values[name] = _model_value(content, base)
            elif name == "task":
                values[name] = _typed(name, content, sections[name])
            elif name:
                values[name] = _section(sections[name], name, content, refuse)
        except ConfigError as error:
            refuse(error)
    return _with_folder(Config(**values), base)


def _with_folder(config: Config, base: Path) -> Config:
    """Model and tokenizer default to those of `train.init_from`."""
    if config.train.init_from is None:
        return config
    folder = _beside(config.train.init_from, base)
    tokenizer = config.data.tokenizer
    if tokenizer is None and any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = folder
    return dataclasses.replace(config, model=config.model or folder, data=dataclasses.replace(config.data, tokenizer=tokenizer),
                               train=dataclasses.replace(config.train, init_from=folder))  # fmt: skip


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def check(config: Config) -> None:
    """Refuse what is wrong in itself, before model, data or ranks are looked at."""
    for problem in problems(config):
        raise problem


def problems(config: Config) -> Iterator[ConfigError]:
    """All that is wrong in itself."""
    yield from _check_ranges(config)
    config = within_ranges(config)
    rules = [_check_length, _check_saving, _check_early_stop, _check_spike]
    if config.train.steps is not None or config.train.tokens is not None:  # else once the data have said how many steps there are
        rules += [_check_schedule, _check_trace]
    for rule in [*rules, _check_parallel, _check_lora, _check_preference, _check_classification]:
        try:
            yield from rule(config)
        except ConfigError as problem:  # of something computed from settings
            yield problem


def within_ranges(config: Config) -> Config:
    """The config with defaults for what is out of range, so that the rest can be looked at."""
    for problem in _check_ranges(config):
        section, key = problem.setting.split(".")
        plain = getattr(getattr(Config(), section), key)
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: plain})})
    return config


def describe() -> str:
    """Every setting with its default and meaning, as `megatrain config` prints it (valid YAML)."""
    lines: list[str] = []
    for section in fields(Config):
        if section.metadata:
            default = "{}" if section.name == "model" else section.default
            lines += [f"# {section.metadata['meaning']}", f"{section.name}: {default}", ""]
            continue
        lines.append(f"{section.name}:")
        cls = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(cls)
        for item in fields(cls):
            default = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc, operator]
            shown = yaml.safe_dump(default, default_flow_style=True).strip().removesuffix("...").strip()
            choices = f" ({_type_name(hints[item.name])})"
            lines.append(f"  {item.name}: {shown}".ljust(34) + f"  # {item.metadata['meaning']}{choices}")
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    except FileNotFoundError:
        raise ConfigError("CONFIG", path, "does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", path, f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError("CONFIG", path, f"is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", path, "must hold sections such as `train:`")
    return raw


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _add_float_resolver() -> None:
    import re

    pattern = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d+([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
    _YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))


_add_float_resolver()


def lay_over(raw: dict[str, Any], word: str) -> None:
    """Put one `section.key=value` word of the command line into nested mappings."""
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise ConfigError("argument", word, "is not of the form section.key=value", "for example train.steps=100")
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError:
        raise ConfigError(path, text, "is not a YAML value", "quote it") from None
    *parents, key = path.split(".")
    target = raw
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(path, text, f"cannot be set: `{parent}` is not a section here")
        target = child
    target[key] = value


def _section(cls: type, name: str, content: Any, refuse: Refuse) -> Any:
    if content is None:
        return cls()
    if not isinstance(content, dict):
        raise ConfigError(name, _short(content), "must be a section of settings", f"write `{name}:` with settings below it")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        meant = key
        if key not in hints:
            refuse(ConfigError(f"{name}.{key}", _short(value), "is not a setting", _did_you_mean(str(key), list(hints))))
            meant = next((like for like in _alike(str(key), list(hints)) if like not in content), None)
        try:
            if meant is not None:
                values[meant] = _typed(f"{name}.{meant}", value, hints[meant])
        except ConfigError as error:
            refuse(error)
    return cls(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` asks for; only what loses nothing is converted (2 → 2.0, 100.0 → 100)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value is False and "off" in typing.get_args(option):
                return "off"  # as YAML reads it
            same = [choice for choice in typing.get_args(option) if choice == value and not isinstance(value, bool)]
            if same:
                return same[0]  # 1 where 1.0 was written
            if value is not None:
                choices = ", ".join(str(c) for c in typing.get_args(option))
                close = _did_you_mean(str(value), [str(c) for c in typing.get_args(option)], always="")
                raise ConfigError(name, _short(value), f"is not one of {choices}", close)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:
                raise ConfigError(name, _short(value), "must be a finite number")
            return float(value)
        elif option is int and isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
            return int(value)
        elif (option is bool and isinstance(value, bool)) or (option is str and isinstance(value, str)):
            return value
        elif typing.get_origin(option) is list and isinstance(value, list):
            (inner,) = typing.get_args(option)
            return [_typed(f"{name}[{i}]", item, inner) for i, item in enumerate(value)]
        elif (typing.get_origin(option) or option) is dict and isinstance(value, dict):
            return value
    raise ConfigError(name, _short(value), f"must be {_type_name(hint)}", f"it is {_a(type(value).__name__)}")


def _model_value(content: Any, base: Path) -> str | dict[str, Any]:
    if isinstance(content, dict):
        return content
    if not isinstance(content, str):
        raise ConfigError("model", _short(content), "must be a folder, a config.json or a Hugging Face config's fields")
    return _beside(content, base)


def _beside(path: str, base: Path) -> str:
    """The path, or what is there from the config's own folder where it is not found from here."""
    beside = base / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def _did_you_mean(word: str, known: list[str], always: str | None = None) -> str:
    close = _alike(word, known)
    if close:
        return f"did you mean `{close[0]}`?"
    return "known are " + ", ".join(known) if always is None else always


def _alike(word: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.5)


def _type_name(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null", dict: "a mapping"}
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list"
    return names.get(typing.get_origin(hint) or hint, str(hint))


def _a(name: str) -> str:
    return {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "empty",
            "list": "a list", "dict": "a mapping"}.get(name, name)  # fmt: skip


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# checking


_POSITIVE = ["data.sequence_length", "parallel.tensor", "parallel.pipeline", "parallel.data", "parallel.virtual", "train.global_batch_size",
             "train.micro_batch_size", "train.log_every", "train.tokens", "train.epochs", "train.max_bad_steps", "train.eval_batches",
             "train.spike_steps", "train.max_rollbacks",
             "lr_schedule.decay_steps"]  # fmt: skip
_NOT_NEGATIVE = ["train.steps", "train.early_stop", "train.eval_every", "train.save_every", "train.keep_last", "train.keep_every", "train.resume_margin", "train.stop_after", "run.seed",
                 "run.master_port", "run.stall_seconds", "run.max_restarts", "parallel.memory_gib", "optimizer.lr", "optimizer.eps", "optimizer.weight_decay", "optimizer.grad_clip",
                 "lr_schedule.warmup_steps", "lr_schedule.min_lr", "lora.rank", "preference.margin"]  # fmt: skip


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _check_ranges(config: Config) -> Iterator[ConfigError]:
    for names, least, words in ((_POSITIVE, 1, "must be at least 1"), (_NOT_NEGATIVE, 0, "must not be negative")):
        for name in names:
            value = _value(config, name)
            if value is not None and not value >= least:
                yield ConfigError(name, value, words)
    if not 0 <= config.optimizer.momentum < 1:
        yield ConfigError("optimizer.momentum", config.optimizer.momentum, "must be in [0, 1)")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield ConfigError("optimizer.betas", betas, "must be two numbers in [0, 1)", "for example [0.9, 0.95]")
    if not 0 <= config.lr_schedule.stable_fraction <= 1:
        yield ConfigError("lr_schedule.stable_fraction", config.lr_schedule.stable_fraction, "must be in [0, 1]")
    if config.run.master_port > 65535:
        yield ConfigError("run.master_port", config.run.master_port, "is no port", "use 1 to 65535, or 0 for a free one")


def _check_length(config: Config) -> Iterator[ConfigError]:
    lengths = {name: getattr(config.train, name) for name in ("steps", "tokens", "epochs")}
    if sum(value is not None for value in lengths.values()) != 1:
        given = [name for name, value in lengths.items() if value is not None]
        rule = "are given together" if given else "are all missing"
        yield ConfigError(
            "train.steps, train.tokens and train.epochs", ", ".join(shown(value) for value in lengths.values()), rule, "give one of them",
            paste=" ".join(f"train.{name}=null" for name in given[1:]) or "train.steps=1000",
        )  # fmt: skip


def _check_schedule(config: Config) -> Iterator[ConfigError]:
    schedule = config.lr_schedule
    if config.steps and schedule.warmup_steps > (schedule.decay_steps or config.steps):
        yield ConfigError("lr_schedule.warmup_steps", schedule.warmup_steps,
                          f"is more than the {schedule.decay_steps or config.steps} steps of the schedule",
                          paste=f"lr_schedule.warmup_steps={(schedule.decay_steps or config.steps) // 10}")  # fmt: skip
    if schedule.min_lr > config.optimizer.lr:
        yield ConfigError("lr_schedule.min_lr", schedule.min_lr, f"is above optimizer.lr={config.optimizer.lr}",
                          paste=f"lr_schedule.min_lr={config.optimizer.lr / 10:.3g}")  # fmt: skip


def _check_saving(config: Config) -> Iterator[ConfigError]:
    train = config.train
    if train.keep_every and not train.keep_last:
        yield ConfigError("train.keep_every", train.keep_every, "has no meaning while train.keep_last=0 keeps all", "set train.keep_last, or leave it out")
    if train.verify == "full" and train.resume != "auto":
        yield ConfigError("train.verify", "full", f"is about train.resume=auto and train.resume={train.resume}", "leave it out: a named one is always verified in full")


def _check_early_stop(config: Config) -> Iterator[ConfigError]:
    train = config.train
    if train.early_stop and not train.eval_every:
        yield ConfigError("train.early_stop", train.early_stop, "goes by evaluations, and train.eval_every=0 makes none", "set train.eval_every")
    if not train.early_stop and changed(train, ["early_stop_metric"]):
        yield ConfigError("train.early_stop_metric", train.early_stop_metric, "has no meaning with train.early_stop=0",
                          "set train.early_stop, for example 3, or leave train.early_stop_metric out")  # fmt: skip


def _check_spike(config: Config) -> Iterator[ConfigError]:
    train = config.train
    for name in ("spike_factor", "spike_window", "spike_steps", "max_rollbacks"):
        needed = ("rollback",) if name == "max_rollbacks" else ("warn", "rollback")
        if train.spike not in needed and changed(train, [name]):
            yield ConfigError(f"train.{name}", getattr(train, name), f"has no meaning with train.spike={train.spike}",
                              f"set train.spike={' or '.join(needed)}, or leave train.{name} out")  # fmt: skip
    if not train.spike_factor > 0:
        yield ConfigError("train.spike_factor", train.spike_factor, "must be more than 0")
    least = max(8, 4 * train.spike_steps)
    if train.spike != "off" and train.spike_window < least:
        yield ConfigError("train.spike_window", train.spike_window, f"is too few losses to judge train.spike_steps={train.spike_steps} by", f"use {least} or more")
    if train.spike == "rollback":
        yield from _check_rollback(config)


def _check_rollback(config: Config) -> Iterator[ConfigError]:
    train = config.train
    if not train.save_every and not train.early_stop:
        yield ConfigError("train.spike", "rollback", "goes back to a checkpoint, and train.save_every=0 makes none before the end", "set train.save_every")
    if train.epochs is not None:
        yield ConfigError("train.spike", "rollback", "passes over samples, and train.epochs asks for every one", "give train.steps, or use train.spike=warn")
    if config.task == "dpo" and config.preference.reference != "adapters-off" and (config.preference.reference == "beforehand" or not config.lora.rank):
        yield ConfigError("train.spike", "rollback", "goes on with samples whose log-probabilities preference.reference=beforehand has not computed",
                          "use train.spike=warn, or adapters and preference.reference=adapters-off")  # fmt: skip


def _check_trace(config: Config) -> Iterator[ConfigError]:
    steps = config.train.trace_steps
    if steps is None:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        yield ConfigError("train.trace_steps", steps, "must be two steps, the first from 1 and not after the last", "for example [20, 22]")
    end = min(config.steps, config.train.stop_after if config.train.stop_after is not None else config.steps)
    if steps[1] > end:
        way_out = f"for example [{max(1, end - 2)}, {end}]" if end else "leave train.trace_steps out"
        yield ConfigError("train.trace_steps", steps, f"goes beyond the run's last step, {end}", way_out)


def _check_parallel(config: Config) -> Iterator[ConfigError]:
    p = config.parallel
    if p.zero >= 2 and p.pipeline > 1:
        yield ConfigError(
            "parallel.zero", p.zero,
            f"needs parallel.pipeline=1 and it is {p.pipeline}: every microbatch would reduce gradients across replicas "
            "while other stages still wait for it",
            f"use parallel.zero=1 with parallel.pipeline={p.pipeline} (a stage holds 1/{p.pipeline} of weights and gradients "
            f"already), or parallel.zero={p.zero} with parallel.pipeline=1 and parallel.data={p.pipeline * (p.data or 1)}",
        )
    if p.sequence and p.tensor == 1:
        yield ConfigError("parallel.sequence", True, "splits the sequence among tensor ranks and parallel.tensor=1",
                          "set parallel.sequence=false or parallel.tensor to 2 or more")  # fmt: skip
    if p.sequence and config.data.sequence_length % p.tensor:
        yield ConfigError("data.sequence_length", config.data.sequence_length,
                          f"does not divide among parallel.tensor={p.tensor} ranks, which parallel.sequence asks for",
                          f"use {config.data.sequence_length // p.tensor * p.tensor or p.tensor}")  # fmt: skip
    yield from _check_auto(p)
    if p.data is not None:
        config.microbatches(p.data)


def _check_auto(p: Parallel) -> Iterator[ConfigError]:
    if p.schedule != "auto":
        if p.memory_gib is not None:
            yield ConfigError("parallel.memory_gib", p.memory_gib, f"limits what parallel.schedule=auto may choose, and it is {p.schedule}",
                              "use parallel.schedule=auto or leave parallel.memory_gib out")  # fmt: skip
        return
    for name in ("virtual", "layers_per_stage"):
        if getattr(p, name) is not None:
            yield ConfigError(f"parallel.{name}", getattr(p, name), "is given and parallel.schedule=auto chooses it",
                              f"leave parallel.{name} out, or name a schedule")  # fmt: skip


def _check_lora(config: Config) -> Iterator[ConfigError]:
    lora = config.lora
    if lora.rank == 0 and (unused := changed(lora)):
        yield ConfigError("lora.rank", 0, f"leaves lora.{unused[0]} without effect", "set lora.rank, for example 16")
    if lora.rank and config.train.init_from is None:
        yield ConfigError("lora.rank", lora.rank, "freezes the weights, and without train.init_from they are random", "name a model as train.init_from")
    if not lora.alpha > 0:
        yield ConfigError("lora.alpha", lora.alpha, "must be more than 0")
    if not 0 <= lora.dropout < 1:
        yield ConfigError("lora.dropout", lora.dropout, "must be in [0, 1)")
    if not lora.targets:
        yield ConfigError("lora.targets", lora.targets, "names nothing", "for example [q_proj, v_proj], or all-linear")


def _check_preference(config: Config) -> Iterator[ConfigError]:
    task, preference = config.task, config.preference
    compares = task in ("dpo", "simpo", "orpo")
    unused = {"beta": not compares, "margin": task != "simpo", "label_smoothing": task not in ("dpo", "simpo"), "reference": task != "dpo"}
    for name, is_unused in unused.items():
        if is_unused and changed(preference, [name]):
            yield ConfigError(f"preference.{name}", getattr(preference, name), f"has no effect with task={task}", "leave it out or set task")
    if preference.beta is not None and not preference.beta > 0:
        yield ConfigError("preference.beta", preference.beta, "must be more than 0")
    if not 0 <= preference.label_smoothing < 0.5:
        yield ConfigError("preference.label_smoothing", preference.label_smoothing, "must be in [0, 0.5)")
    if preference.reference == "adapters-off" and not config.lora.rank:
        yield ConfigError("preference.reference", "adapters-off", "needs adapters and lora.rank=0", "use beforehand, or set lora.rank")
    if compares and config.train.micro_batch_size % 2:
        yield ConfigError("train.micro_batch_size", config.train.micro_batch_size,
                          f"is odd, and with task={task} the two sequences of a pair go together", f"use {config.train.micro_batch_size + 1}")  # fmt: skip
    if compares and config.data.packing:
        yield ConfigError("data.packing", True, f"puts several samples in a sequence, and task={task} compares sequences", "set data.packing=false")
    if compares and config.data.train_on == "all":
        yield ConfigError("data.train_on", "all", f"has no meaning with task={task}: answers are compared", "leave it out")


def _check_classification(config: Config) -> Iterator[ConfigError]:
    section = config.classification
    if config.task not in ("classification", "token-classification") and (unused := changed(section)):
        yield ConfigError(f"classification.{unused[0]}", _short(getattr(section, unused[0])), f"has no effect with task={config.task}",
                          "set task=classification or task=token-classification")  # fmt: skip
    for name in ("dropout", "label_smoothing", "augment_share"):
        if not 0 <= getattr(section, name) < 1:
            yield ConfigError(f"classification.{name}", getattr(section, name), "must be in [0, 1)")
    if section.augment == "none" and changed(section, ["augment_share"]):
        yield ConfigError("classification.augment_share", section.augment_share, "has no meaning with classification.augment=none",
                          "set classification.augment, for example mix")  # fmt: skip
    if section.labels is not None and len(set(section.labels)) != len(section.labels):
        yield ConfigError("classification.labels", _short(section.labels), "names a class twice")
    if section.labels is not None and (len(section.labels) != 1 if section.problem == "regression" else len(section.labels) < 2):
        yield ConfigError("classification.labels", _short(section.labels), f"has {len(section.labels)} names",
                          "a regression has 1" if section.problem == "regression" else "a classifier tells 2 classes or more")  # fmt: skip
    if section.label_smoothing and section.problem != "single-label":
        yield ConfigError("classification.label_smoothing", section.label_smoothing, f"has no meaning for classification.problem={section.problem}")
