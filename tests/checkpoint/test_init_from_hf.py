"""Runs start from a Hugging Face folder on any layout, or refuse one that does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.rank_pool import run_ranks
from helpers.training_runs import pretrain, write_tokens
from safetensors.torch import save_file

from megatrain.checkpoint.hf_folder import HFFolder
from megatrain.checkpoint.init_from_hf import Pretrained
from megatrain.config import loader as configuration
from megatrain.distributed.reshard import intervals_of, make_flat_shard
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.counts import parameter_shapes

SIZES = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SIZES,
}
MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        **SIZES,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as transformers saves it, with weights that bf16 would round."""
    from transformers import AutoModelForCausalLM

    made = {}
    for number, (name, fields) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(load_hf_config(fields)).save_pretrained(
            made[name], max_shard_size="30KB" if name == "llama" else "5GB"
        )
    return made


def settings(folder, **sections):
    raw = {
        "train": {
            "steps": 0,
            "global_batch_size": 8,
            "init_from": str(folder),
            **sections.pop("train", {}),
        },
        "data": {"sequence_length": 16},
        **sections,
    }
    config = configuration.from_dict(raw)
    configuration.check(config)
    return config


class Loaded:
    """Weights and masters of a rank after the start, with their intervals in the full tensors."""

    def __init__(self, runner, read):
        self.read = read
        self.weights, self.masters = [], []
        for fragment in runner.optimizer.state.fragments():
            s = fragment.sharding
            piece = make_flat_shard(
                s, fragment.shape, fragment.start, fragment.tensors["master"].numel()
            )
            self.masters.append(
                (s.name, piece.transposed, intervals_of(piece), fragment.tensors["master"].clone())
            )
        for parameter in runner.stage.parameters():
            s, whole = parameter.sharding, runner.optimizer.state.full_weights(parameter).clone()
            piece = make_flat_shard(s, tuple(whole.shape), 0, whole.numel())
            self.weights.append((s.name, piece.transposed, intervals_of(piece), whole.flatten()))


def start(rank, world_size, rows):
    """Returns what this rank has loaded for each config."""
    from deepspeed.runtime.zero.partition_parameters import Init

    from megatrain.distributed.mesh import make_mesh
    from megatrain.training.step_runner import StepRunner

    found = []
    for config in rows:
        before, Init.param_id = Init.param_id, 0
        p = config.parallel
        mesh = make_mesh(
            rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size)
        )
        architecture = read_config(load_hf_config(config.model))
        pretrained = Pretrained(config.train.init_from, architecture)
        runner = StepRunner(config, architecture, mesh, torch.device("cpu"), pretrained=pretrained)
        found.append(Loaded(runner, pretrained.tensors.bytes_read))
        Init.param_id = before
    return found


def assemble(pieces, folder, dtype):
    """Returns full tensors from pieces of ranks; asserts that copies are equal and cover all."""
    tensors = HFFolder(folder)
    whole = {
        name: torch.full((torch.Size(tensors.shape(name)).numel(),), float("nan"), dtype=dtype)
        for name in tensors.names()
    }
    ways = {}
    for name, transposed, runs, elements in pieces:
        ways[name] = transposed
        for start, local, length in zip(*runs, strict=True):
            target = whole[name][start : start + length]
            assert torch.equal(
                target[~target.isnan()], elements[local : local + length][~target.isnan()]
            )
            target.copy_(elements[local : local + length])
    return {
        name: flat.view(tensors.shape(name)[::-1]).t()
        if ways[name]
        else flat.view(tensors.shape(name))
        for name, flat in whole.items()
    }


ROWS = {
    1: [("llama", "bf16", {}), ("gpt2", "fp32", {}), ("tied", "bf16", {"zero": 3})],
    2: [
        ("llama", "fp32", {"tensor": 2, "sequence": True}),
        ("gpt2", "bf16", {"tensor": 2}),
        ("tied", "fp32", {"pipeline": 2, "schedule": "zb-v"}),
        ("llama", "bf16", {"zero": 3}),
        ("gpt2", "bf16", {"zero": 1}),
        ("tied", "bf16", {"zero": 2, "offload": "cpu"}),
    ],
    4: [
        ("llama", "fp32", {"tensor": 4}),
        ("tied", "bf16", {"tensor": 2, "pipeline": 2}),
        ("gpt2", "fp32", {"pipeline": 2, "zero": 1}),
        ("gpt2", "bf16", {"tensor": 2, "zero": 3}),
        ("llama", "bf16", {"tensor": 2, "zero": 0}),
    ],
}


@pytest.mark.parametrize("world", ROWS)
def test_weights_and_masters_equal_the_folder(world, folders, tmp_path):
    rows = [
        settings(folders[model], parallel=parallel, train={"dtype": dtype})
        for model, dtype, parallel in ROWS[world]
    ]
    by_rank = run_ranks(start, world, rows, folder=tmp_path)
    for number, (model, dtype, _) in enumerate(ROWS[world]):
        ranks, tensors = [found[number] for found in by_rank], HFFolder(folders[model])
        run = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        masters = assemble(
            [piece for rank in ranks for piece in rank.masters], folders[model], torch.float32
        )
        weights = assemble([piece for rank in ranks for piece in rank.weights], folders[model], run)
        for name in tensors.names():
            assert torch.equal(masters[name], tensors.read(name))
            assert torch.equal(weights[name], tensors.read(name).to(run))
        for rank in ranks:
            held = sum(4 * runs.total for _, _, runs, _ in rank.weights)
            again = sum(4 * runs.total for _, _, runs, _ in rank.masters) if dtype == "bf16" else 0
            assert rank.read == held + again, "its slices, and no more"


@pytest.mark.parametrize(
    ("model", "world", "parallel"),
    [
        ("llama", 4, {"tensor": 2, "pipeline": 2}),
        ("gpt2", 2, {"zero": 3}),
        ("tied", 2, {"pipeline": 2}),
    ],
)
def test_a_run_of_no_steps_writes_the_same_bytes(model, world, parallel, folders, tmp_path):
    write_tokens(tmp_path / "tokens")
    raw = {
        "run": {"output_dir": str(tmp_path / "run")},
        "parallel": parallel,
        "data": {"train": str(tmp_path / "tokens"), "sequence_length": 16},
        "train": {"steps": 0, "init_from": str(folders[model])},
    }
    run_ranks(pretrain, world, raw, folder=tmp_path)
    there, here = (
        HFFolder(folders[model]),
        HFFolder(tmp_path / "run" / "checkpoints" / "step-00000000"),
    )
    assert set(there.names()) == set(here.names())
    for name in there.names():
        assert there.read(name).view(torch.uint8).equal(here.read(name).view(torch.uint8))
    log = (tmp_path / "run" / "config.yaml").read_text()
    assert f"model: {folders[model]}" in log


def check(folder, **fields):
    config = settings(
        folder,
        **(
            {"model": {**json.loads((folder / "config.json").read_text()), **fields}}
            if fields
            else {}
        ),
    )
    architecture = read_config(load_hf_config(config.model))
    pretrained = Pretrained(folder, architecture)
    pretrained.check(parameter_shapes(architecture))
    return pretrained


def resaved(folder, target, change):
    """Writes the folder's tensors, changed, as one file."""
    tensors = HFFolder(folder)
    held = {name: tensors.read(name) for name in tensors.names()}
    change(held)
    target.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in held.items()}, target / "model.safetensors"
    )
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def rename(prefix):
    def change(held):
        for name in list(held):
            held[name.removeprefix(prefix)] = held.pop(name)

    return change


@pytest.mark.parametrize("model", ["tied", "gpt2"])
def test_names_without_the_base_models_prefix(model, folders, tmp_path):
    """Base models are saved without prefix; old versions of transformers saved masks too."""

    def change(held):
        rename("transformer." if model == "gpt2" else "model.")(held)
        if model == "gpt2":
            held |= {
                f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)
                for layer in range(4)
            }

    stripped = check(resaved(folders[model], tmp_path / "base", change))
    assert all(
        stripped._name_of(name)
        for name in parameter_shapes(read_config(load_hf_config(str(folders[model]))))
    )


def test_a_saved_tied_head_must_equal_the_embedding(folders, tmp_path):
    def copied(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()

    def moved(held):
        held["lm_head.weight"] = held.pop("model.embed_tokens.weight")

    def changed(held):
        copied(held)
        held["lm_head.weight"][5, 3] += 1

    check(resaved(folders["tied"], tmp_path / "copied", copied))
    assert (
        check(resaved(folders["tied"], tmp_path / "moved", moved))._name_of(
            "model.embed_tokens.weight"
        )
        == "lm_head.weight"
    )
    with pytest.raises(
        CheckpointError,
        match=r"ties lm_head\.weight to model\.embed_tokens\.weight: the folder.s differ; set",
    ):
        check(resaved(folders["tied"], tmp_path / "apart", changed))


def put(name, tensor):
    return lambda held: held.update({name: tensor})


REFUSALS = {
    "missing: model.norm.weight$": lambda held: held.pop("model.norm.weight"),
    "missing: lm_head.weight; a tied head requires model.tie_word_embeddings=true": lambda held: (
        held.pop("lm_head.weight")
    ),
    "unexpected: model.layers.0.extra": put("model.layers.0.extra", torch.zeros(2)),
    r"of another shape: model.norm.weight \(31 in the folder, 32 by the config\)": put(
        "model.norm.weight", torch.zeros(31)
    ),
    "both with and without the prefix: norm.weight$": put("norm.weight", torch.zeros(32)),
    "not floating point: model.norm.weight$": put(
        "model.norm.weight", torch.zeros(32, dtype=torch.int32)
    ),
    "missing: .* and 1 more; unexpected: .* and 1 more$": lambda held: [
        held.update({f"{n}.old": held.pop(n)}) for n in list(held) if "layers.2" in n
    ],
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_a_folder_that_does_not_fit_is_refused(sentence, folders, tmp_path):
    with pytest.raises(
        CheckpointError, match=f"train.init_from={tmp_path}.* does not fit the model: {sentence}"
    ):
        check(resaved(folders["llama"], tmp_path / "other", REFUSALS[sentence]))


def test_a_config_of_another_size_is_refused(folders):
    with pytest.raises(
        CheckpointError,
        match=r"mlp.down_proj.weight \(32 x 48 in the folder, 32 x 40 by the config\)",
    ):
        check(folders["llama"], intermediate_size=40)
    with pytest.raises(
        CheckpointError, match=r"missing: model\.layers\.4\.input_layernorm\.weight"
    ):
        check(folders["llama"], num_hidden_layers=5)
    with pytest.raises(
        CheckpointError, match=r"unexpected: model\.layers\.3\.input_layernorm\.weight"
    ):
        check(folders["llama"], num_hidden_layers=3)


def test_model_and_tokenizer_default_to_init_from(folders, tmp_path):
    raw = {"train": {"steps": 1, "init_from": "pretrained"}}
    (tmp_path / "pretrained").mkdir()
    config = configuration.from_dict(raw, base=tmp_path)
    assert (config.train.init_from, config.model, config.data.tokenizer) == (
        *[str(tmp_path / "pretrained")] * 2,
        None,
    )
    (tmp_path / "pretrained" / "tokenizer_config.json").write_text("{}")
    assert configuration.from_dict(raw, base=tmp_path).data.tokenizer == str(
        tmp_path / "pretrained"
    )
    mine = configuration.from_dict(
        {**raw, "model": LLAMA, "data": {"tokenizer": "mine"}}, base=tmp_path
    )
    assert (mine.model, mine.data.tokenizer) == (LLAMA, "mine")


def test_differences_of_config_fields_are_described(folders):
    theirs = Pretrained(folders["llama"], read_config(load_hf_config(LLAMA)))
    assert theirs.describe_differences(load_hf_config(LLAMA).to_dict()) == []
    longer = load_hf_config({**LLAMA, "rope_theta": 500000.0})
    assert [note.split(" ")[0] for note in theirs.describe_differences(longer.to_dict())] == [
        "model.rope_parameters"
    ]
    assert "'rope_theta': 500000.0" in theirs.describe_differences(longer.to_dict())[0]
