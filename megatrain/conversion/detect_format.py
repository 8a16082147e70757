"""Recognises a source by what is in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatrain.conversion.deepspeed_universal import UniversalCheckpoint
from megatrain.conversion.folders import model_folder, open_folder
from megatrain.conversion.megatron_args import args_of_config, config_fields, read_args
from megatrain.conversion.megatron_dist import is_distributed, read_distributed
from megatrain.conversion.megatron_legacy import Ranks, find_iteration, read_ranks
from megatrain.conversion.megatron_weights import MegatronCheckpoint
from megatrain.conversion.sources import Source
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config


class Hints(NamedTuple):
    """What the user says of a source that does not say all itself.

    Attributes:
        config: a Hugging Face config: a folder or config.json.
        tokenizer: a folder; its length is the vocabulary's where nothing else says it.
        vocab_size: rows of the embedding that are no padding.
    """

    config: str | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None


def open_source(path: Path, hints: Hints, *, checked: bool = True) -> Source:
    """The source at the path, as the kind of folder it is; CheckpointError when it is none that is known.

    `checked` compares the files of a checkpoint of ours with their hashes first.
    """
    folder = model_folder(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if (folder / "config.json").is_file():
        if hints.config is not None or hints.vocab_size is not None:
            raise CheckpointError(
                f"{folder} has a config.json of its own; leave --config and --vocab-size out"
            )
        return open_folder(folder, checked=checked)
    if (path / "zero").is_dir():
        if hints.config is None:
            raise CheckpointError(
                f"{path} is a DeepSpeed checkpoint, which does not say what the model is; name its Hugging Face config with --config"
            )
        return UniversalCheckpoint(path, load_hf_config(hints.config), extras=hints.tokenizer)
    iteration = find_iteration(path)
    if iteration is not None:
        return _megatron(
            read_distributed(iteration) if is_distributed(iteration) else read_ranks(iteration),
            hints,
        )
    raise CheckpointError(
        f"{path} is of no kind that is read: it holds neither config.json, nor mp_rank_XX folders or "
        "latest_checkpointed_iteration.txt, nor a folder zero"
    )


def _megatron(ranks: Ranks, hints: Hints) -> MegatronCheckpoint:
    config = None if hints.config is None else load_hf_config(hints.config)
    if ranks.args is None and config is None:
        raise CheckpointError(
            f"{ranks.folder} holds no args, which would say what the model is; name a Hugging Face config with --config"
        )
    settings = args_of_config(config) if ranks.args is None else read_args(ranks.args, ranks.folder)
    note = ""
    if config is None:
        vocabulary = hints.vocab_size or _tokenizer_size(hints.tokenizer)
        if vocabulary is None:
            vocabulary = _padded_rows(ranks)
            note = f"all {vocabulary} rows of the embedding are kept, Megatron-LM's padding among them; --vocab-size or --tokenizer says how many are real"
        config = load_hf_config(config_fields(settings, vocabulary, ranks.folder))
    elif hints.vocab_size not in (None, config.vocab_size):
        raise CheckpointError(
            f"--vocab-size {hints.vocab_size} is not the {config.vocab_size} of --config; leave one of them out"
        )
    return MegatronCheckpoint(ranks, settings, config, extras=hints.tokenizer, note=note)


def _tokenizer_size(folder: Path | None) -> int | None:
    if folder is None:
        return None
    from megatrain.data.tokenizer import load_tokenizer

    return len(load_tokenizer(folder))


def _padded_rows(ranks: Ranks) -> int:
    name = "embedding.word_embeddings.weight"
    if any(name not in part.names() or len(part.shape(name)) != 2 for part in ranks.parts):
        raise CheckpointError(f"{ranks.folder} lacks word embeddings")
    return sum(part.shape(name)[0] for part in ranks.parts)
