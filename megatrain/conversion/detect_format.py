"""Detects the format of a source by the files in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatrain.checkpoint.retention import find_model_folder
from megatrain.conversion.deepspeed_universal import UniversalCheckpoint
from megatrain.conversion.megatron_args import args_of_config, config_fields, read_args
from megatrain.conversion.megatron_dist import is_distributed, read_distributed
from megatrain.conversion.megatron_legacy import RankShards, find_iteration, read_rank_files
from megatrain.conversion.megatron_weights import MegatronCheckpoint
from megatrain.conversion.sources import Source, open_folder
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config


class Hints(NamedTuple):
    """Facts about the model that some formats do not store.

    Attributes:
        config: a Hugging Face config, as a folder or config.json.
        tokenizer: a folder; the length of its tokenizer is the default of `vocab_size`.
        vocab_size: rows of the embedding without padding.
    """

    config: str | None = None
    tokenizer: Path | None = None
    vocab_size: int | None = None


def open_source(path: Path, hints: Hints, *, verify_hashes: bool = True) -> Source:
    """Opens the source at a path.

    Args:
        path: a model's folder, or a run's folder for its best or newest checkpoint.
        hints: what the user adds to what the folder stores.
        verify_hashes: compare the files of our checkpoints with the hashes of their manifest.

    Raises:
        CheckpointError: the format is unknown, a file damaged, or a hint missing or redundant.
    """
    folder = find_model_folder(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    if (folder / "config.json").is_file():
        if hints.config is not None or hints.vocab_size is not None:
            raise CheckpointError(
                f"{folder} has a config.json; leave --config and --vocab-size out"
            )
        return open_folder(folder, verify_hashes=verify_hashes)
    if (path / "zero").is_dir():
        if hints.config is None:
            raise CheckpointError(
                f"{path} is a DeepSpeed checkpoint, which does not store the model's config; "
                "name its Hugging Face config with --config"
            )
        config = load_hf_config(hints.config)
        return UniversalCheckpoint(path, config, metadata_folder=hints.tokenizer)
    iteration = find_iteration(path)
    if iteration is None:
        raise CheckpointError(
            f"{path} has no supported format (supported: folders with config.json, with mp_rank_XX "
            "folders or latest_checkpointed_iteration.txt, or with a folder zero)"
        )
    read = read_distributed if is_distributed(iteration) else read_rank_files
    return _open_megatron(read(iteration), hints)


def _open_megatron(ranks: RankShards, hints: Hints) -> MegatronCheckpoint:
    config = None if hints.config is None else load_hf_config(hints.config)
    if ranks.args is not None:
        args = read_args(ranks.args, ranks.folder)
    elif config is not None:
        args = args_of_config(config)
    else:
        raise CheckpointError(
            f"{ranks.folder} has no args, which describe the model; name its Hugging Face config "
            "with --config"
        )
    note = ""
    if config is None:
        vocab_size = hints.vocab_size or _tokenizer_size(hints.tokenizer)
        if vocab_size is None:
            vocab_size = _padded_rows(ranks)
            note = (
                f"keeping all {vocab_size} rows of the embedding, including Megatron-LM's padding; "
                "--vocab-size or --tokenizer removes it"
            )
        config = load_hf_config(config_fields(args, vocab_size, ranks.folder))
    elif hints.vocab_size not in (None, config.vocab_size):
        raise CheckpointError(
            f"--vocab-size {hints.vocab_size} differs from vocab_size={config.vocab_size} of "
            "--config; leave one of them out"
        )
    return MegatronCheckpoint(ranks, args, config, metadata_folder=hints.tokenizer, note=note)


def _tokenizer_size(folder: Path | None) -> int | None:
    if folder is None:
        return None
    from megatrain.data.tokenizer import load_tokenizer

    return len(load_tokenizer(folder))


def _padded_rows(ranks: RankShards) -> int:
    name = "embedding.word_embeddings.weight"
    if any(name not in shard.names() or len(shard.shape(name)) != 2 for shard in ranks.shards):
        raise CheckpointError(f"{ranks.folder} lacks word embeddings")
    return sum(shard.shape(name)[0] for shard in ranks.shards)
