"""What is done before any rank starts: everything refused that can be seen to be wrong, and a dry run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from megatrain.checkpoint import resume as loading
from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config.loader import Config
from megatrain.config.validation import check
from megatrain.data.split import Part
from megatrain.data.tokenizer import describe_load_error
from megatrain.distributed import device as device_module
from megatrain.errors import ConfigError, DataError
from megatrain.models.config import TransformerConfig
from megatrain.models.counts import count_adapter_parameters, count_parameters, parameter_shapes
from megatrain.models.lora import target_names
from megatrain.models.params import check_tensor_split
from megatrain.models.quantize import check_bitsandbytes, check_blocks
from megatrain.models.transformer import LayerSpec
from megatrain.ops.fused import check_compile
from megatrain.pipeline.stage_builder import check_pipeline, memory_schedule, plan_ranks, rank_specs
from megatrain.telemetry import console
from megatrain.telemetry.exporters import check_exporters
from megatrain.training.task import DataSource, Task


def check_without_ranks(config: Config, world_size: int, task: Task) -> None:
    """Refuse whatever can be seen to be wrong without a rank, and have the task's data made."""
    check_start(config)
    task.check(config)
    check_bitsandbytes(config.lora)
    check_exporters(config)
    architecture = task.architecture(config)
    _check_layout(config, architecture, world_size)
    check_tokenizer(config, architecture)
    _check_output(config)
    path = check_resume(config, architecture)
    check_weights(config, architecture, resumes=path is not None)
    for which in parts_of(config):
        task.prepare(config, which)
        source = task.open(config, architecture, which)
        if which == "train":
            with_steps(config, source)


def _check_layout(config: Config, a: TransformerConfig, world_size: int) -> None:
    for rule in layout_rules(config, a, world_size, on_gpu=device_module.has_gpu()):
        rule()


def layout_rules(
    config: Config, a: TransformerConfig, world_size: int, *, on_gpu: bool
) -> list[Callable[[], object]]:
    """What layout, geometry, batch and ranks must fulfil together; each refuses for itself."""
    return [
        lambda: config.microbatches(config.data_size(world_size)),
        lambda: check_tensor_split(a, config.parallel.tensor),
        lambda: _check_adapters(config, a),
        lambda: _check_stages(config, a, world_size),
        lambda: _check_dtype(config, on_gpu=on_gpu),
        lambda: _check_positions(config, a),
        lambda: (
            check_compile(a, tensor=config.parallel.tensor, on_gpu=on_gpu)
            if config.train.compile
            else None
        ),
    ]


def _check_stages(config: Config, a: TransformerConfig, world_size: int) -> None:
    check_pipeline(config, a)
    rank_specs(config, a, memory_schedule(config, config.data_size(world_size)).placement)


def _check_adapters(config: Config, a: TransformerConfig) -> None:
    if config.lora.rank:
        target_names(a, config.lora.targets)
        check_blocks(a, config.lora, config.parallel.tensor)


def _check_dtype(config: Config, *, on_gpu: bool) -> None:
    if config.train.dtype == "fp16" and not on_gpu:
        raise ConfigError("train.dtype", "fp16", "needs a GPU", "use bf16 or fp32 on CPUs")


def _check_positions(config: Config, a: TransformerConfig) -> None:
    if config.data.sequence_length > a.max_positions:
        raise ConfigError(
            "data.sequence_length",
            config.data.sequence_length,
            f"is more than the model's {a.max_positions} positions",
            f"use at most {a.max_positions}",
        )


def check_resume(config: Config, a: TransformerConfig) -> Path | None:
    """The checkpoint that the run would go on from; refuses one that it cannot."""
    path, _ = loading.choose_start(config)
    if (
        path is not None and config.checkpoint.verify != "full"
    ):  # else rank 0 reads every file to see which it is, and checks that
        loading.check(path, config, a)
    return path


def lacks_start(config: Config) -> bool:
    """Whether model and tokenizer are to be those of a folder that is not there."""
    start = config.train.init_from
    return start is not None and config.model == start and not Path(start).exists()


def check_start(config: Config) -> None:
    """Refuse it by its own name, before model and tokenizer are missed."""
    if lacks_start(config):
        raise no_start(str(config.train.init_from))


def no_start(start: str) -> ConfigError:
    """With the folder beside it that has nearly its name."""
    path = Path(start)
    beside = (
        sorted(other.name for other in path.parent.iterdir() if other.is_dir())
        if path.parent.is_dir()
        else []
    )
    close = difflib.get_close_matches(path.name, beside, n=1)
    if not close:
        return ConfigError("train.init_from", start, "does not exist", command=make_start(start))
    return ConfigError(
        "train.init_from", start, "does not exist", f"did you mean `{path.parent / close[0]}`?"
    )


def make_start(start: str) -> str:
    """The command that makes a folder to start from."""
    return "make demo" if start.startswith("demo/") else f"megatrain convert SOURCE {start}"


def check_weights(config: Config, a: TransformerConfig, *, resumes: bool) -> None:
    """Refuse weights to start from that do not fit."""
    if config.train.init_from is not None and (not resumes or config.lora.rank):
        if not Path(config.train.init_from).exists():
            raise no_start(config.train.init_from)
        Pretrained(config.train.init_from, a).check(parameter_shapes(a))


def check_tokenizer(config: Config, a: TransformerConfig) -> None:
    """Refuse a tokenizer that cannot be read or has tokens that the model does not."""
    if config.data.tokenizer is None:
        return
    if not Path(config.data.tokenizer).is_dir():
        raise ConfigError("data.tokenizer", config.data.tokenizer, "is not a folder")
    from transformers import AutoTokenizer

    try:
        size = len(AutoTokenizer.from_pretrained(config.data.tokenizer, local_files_only=True))
    except Exception as error:
        raise ConfigError(
            "data.tokenizer",
            config.data.tokenizer,
            describe_load_error(config.data.tokenizer, error),
        ) from None
    if size > a.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            a.vocab_size,
            f"is less than the {size} tokens of data.tokenizer={config.data.tokenizer}",
            f"set model.vocab_size={size}",
        )


def _check_output(config: Config) -> None:
    folder = Path(config.run.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
    except OSError as error:
        raise ConfigError(
            "run.output_dir", config.run.output_dir, f"cannot be written ({error.strerror})"
        ) from None
    for name in ("checkpoints", "logs", "config.yaml", "metrics.jsonl", "events.jsonl"):
        # Of a run before, perhaps somebody else's; the first save would tell, hours later.
        try:
            if (folder / name).exists():
                _probe_file(folder / name) if "." in name else _probe(folder / name)
        except OSError as error:
            raise ConfigError(
                "run.output_dir",
                config.run.output_dir,
                f"holds {name} that cannot be written to ({error.strerror})",
            ) from None


def _probe(folder: Path) -> None:
    """Write into it, as who may is not only a matter of modes."""
    probe = folder / f".probe-{os.getpid()}"
    probe.write_text("")
    probe.unlink()


def _probe_file(path: Path) -> None:
    with path.open("ab"):
        pass


def parts_of(config: Config) -> list[Part]:
    """The data that a run reads."""
    return ["train", "valid"] if config.eval.every else ["train"]


def with_steps(config: Config, source: DataSource) -> Config:
    """The config with its epochs of the training data as steps."""
    if config.train.epochs is None:
        return config
    if source.per_epoch is None:
        raise ConfigError(
            "train.epochs",
            config.train.epochs,
            "has no meaning for a blend of data",
            "give train.steps",
        )
    config = config.with_steps(source.per_epoch)
    check(config)
    return config


def dry_run(config: Config, task: Task) -> str:
    """What the run would be: layers and parameters by stage, batches, and whether its data are there."""
    check_start(config)
    task.check(config)
    check_exporters(config)
    architecture = task.architecture(config)
    p = config.parallel
    world_size = config.model_ranks * (p.data or 1)
    _check_layout(config, architecture, world_size)
    notes = [
        *_try_bitsandbytes(config),
        *_try_weights(config, architecture),
        *_try_tokenizer(config, architecture),
    ]
    check_resume(config, architecture)
    data_size = config.data_size(world_size)
    config, more = _try_data(config, architecture, task)
    notes += more
    lines = [
        run_header(config, architecture, world_size, "(dry run)"),
        f"  batch   {config.train.global_batch_size} sequences = {config.microbatches(data_size)} microbatches of "
        f"{config.train.micro_batch_size} on each of {data_size} replicas",
        *(
            [
                "  schedule auto is settled by measuring before the first step; shown is 1f1b's cut, which it starts from"
            ]
            if p.schedule == "auto" and p.pipeline > 1
            else []
        ),
        "",
        "pipeline rank  layers                                  parameters on each tensor rank",
    ]
    for number, plan in enumerate(
        plan_ranks(config, architecture, memory_schedule(config, data_size).placement)
    ):
        layers = ", ".join(span(chunk) for chunk in plan.chunks)
        lines.append(f"{number:>13}  {layers:<40}{plan.parameters_per_rank:>15,}")
    return "\n".join(lines + notes)


def _try_bitsandbytes(config: Config) -> list[str]:
    """A plan may be made on a machine that does not train."""
    try:
        check_bitsandbytes(config.lora)
    except ConfigError as error:
        return [f"note: {error}"]
    return []


def _try_weights(config: Config, architecture: TransformerConfig) -> list[str]:
    """Refuse weights to start from that do not fit; what is said where there are none."""
    folder = config.train.init_from
    if folder is None:
        return []
    if not Path(folder).exists():
        return [f"note: train.init_from={folder} does not exist"]
    check_weights(config, architecture, resumes=False)
    return []


def _try_tokenizer(config: Config, architecture: TransformerConfig) -> list[str]:
    """Refuse one that does not fit; what is said where there is none yet."""
    if config.data.tokenizer is not None and not Path(config.data.tokenizer).exists():
        return [f"note: data.tokenizer={config.data.tokenizer} does not exist"]
    check_tokenizer(config, architecture)
    return []


def _try_data(
    config: Config, architecture: TransformerConfig, task: Task
) -> tuple[Config, list[str]]:
    """The config with its steps where the data can say them, and what is wrong with the data."""
    notes = []
    for which in parts_of(config):
        try:
            task.prepare(config, which)
            source = task.open(config, architecture, which)
            config = with_steps(config, source) if which == "train" else config
        except (DataError, ConfigError) as error:
            notes.append(f"note: {error}")
    return config, notes


def span(specs: list[LayerSpec]) -> str:
    """Layers that follow each other, in words."""
    titles = specs[0].title if len(specs) == 1 else f"{specs[0].title} ... {specs[-1].title}"
    return f"{len(specs)}: {titles}"


def run_header(
    config: Config, architecture: TransformerConfig, world_size: int, device: str
) -> str:
    """The lines that open a run."""
    p = config.parallel
    layout = (
        f"tensor {p.tensor} x pipeline {p.pipeline} x data {config.data_size(world_size)}"
        f"{', sequence' if p.sequence else ''}, {p.schedule}, ZeRO {p.zero}"
    )
    words = console.header(
        name=config.run_name,
        model=architecture.model_type,
        num_parameters=count_parameters(architecture),
        layout=layout,
        device=f"{world_size} ranks, {device}",
        dtype=config.train.dtype,
        tokens_per_step=config.tokens_per_step,
        steps=config.steps
        if config.train.steps is not None or config.train.tokens is not None
        else None,
        epochs=config.train.epochs,
    )
    if config.train.compile:
        words += "\n  compile the first step also compiles kernels, which can take a minute"
    if not config.lora.rank:
        return words
    trained = count_adapter_parameters(architecture, config.lora)
    beside = " beside weights in 4 bits" if config.lora.quantize != "none" else ""
    return f"{words}\n  lora    adapters of rank {config.lora.rank}{beside}: {trained:,} parameters are trained, {trained / count_parameters(architecture):.2%} of the model's"
