"""Finetuning equals plain torch on each chat alone and unpadded, with one mean over all tokens."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.chat_templates import CHATML, WITH_MARKS
from helpers.networks import transformers_twin
from helpers.rank_pool import run_ranks
from helpers.reference_model import assert_equal, make_stage, run_steps, train
from helpers.sft_runs import CHATS, GPT2, LR, MODEL, STEPS, make_files, settings
from helpers.training_runs import assert_same_run, checked, finetune, metrics

from megatrain.__main__ import main
from megatrain.data.dataloader import DataLoader
from megatrain.data.shuffle import Shuffle, keyed_integers
from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config
from megatrain.training.task_sft import SFTTask


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("finetune"))


# -- truth from outside --------------------------------------------------------------------------


def read_chats(files):
    """Returns tokens and mask of each chat in order, as transformers' template gives them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files / "tokenizer")
    tokenizer.chat_template = WITH_MARKS
    chats = []
    for line in (files / "train.jsonl").read_text().splitlines():
        made = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        chats.append((torch.tensor(made["input_ids"]), torch.tensor(made["assistant_masks"])))
    return chats


def alone_order(position):
    """Returns the chat at a position, if each chat has its own sequence."""
    epoch, index = divmod(position, CHATS)
    return [Shuffle(CHATS, key=("chats", keyed_integers("source", 7, "train", 0)[0], epoch))(index)]


def reference(files, chats_of_step, *, steps=STEPS, model=MODEL):
    """Trains transformers' model from our initial weights; `chats_of_step` counts from 0."""
    architecture = read_config(load_hf_config(model))
    network = transformers_twin(
        model, make_stage(checked({**settings(files), "model": model}), architecture)
    ).train()
    chats = read_chats(files)

    def loss(step):
        total, count = torch.zeros(()), 0
        for number in chats_of_step(step - 1):
            tokens, mask = chats[number]
            logits = network(tokens[None, :-1]).logits[0]
            wanted = mask[1:] == 1
            total = total + torch.nn.functional.cross_entropy(
                logits[wanted], tokens[1:][wanted], reduction="sum"
            )
            count += int(wanted.sum())
        return total / count

    return train(dict(network.named_parameters()), loss, steps=steps, lr=LR)


def run_layout(rank, world_size, raw):
    """Returns the result of `run_steps`, and the tokens with a loss of each microbatch."""
    from megatrain.training.step_runner import StepRunner

    config = checked(raw)
    architecture = read_config(load_hf_config(config.model))
    source = SFTTask().open(config, architecture, "train")
    config = config.with_steps(source.per_epoch)
    p = config.parallel
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))
    runner = StepRunner(config, architecture, mesh, torch.device("cpu"))
    loader = DataLoader(
        source.samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
    )
    learnt = []

    def batches(step):
        made = loader.microbatches(step - 1)
        learnt.append([int((batch.labels >= 0).sum()) for batch in made])
        return made

    ran = run_steps(runner, batches, steps=config.train.steps)
    loader.close()
    return ran, learnt


def prepared(raw):
    """Prepares the data of the config, as rank 0 does."""
    SFTTask().prepare(checked(raw), "train")
    return raw


def assert_same(results, expected):
    assert_equal([ran for ran, _ in results], expected, losses=1e-5)


LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"tensor": 2, "zero": 2}),
    (4, {"pipeline": 2}),
    (8, {"tensor": 2, "pipeline": 2, "sequence": True}),
]


@pytest.fixture(scope="module")
def alone(files):
    return reference(
        files,
        lambda step: [
            chat for position in range(8 * step, 8 * step + 8) for chat in alone_order(position)
        ],
    )


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS, ids=str)
def test_equals_plain_torch(world, parallel, files, alone, tmp_path):
    assert_same(
        run_ranks(run_layout, world, prepared(settings(files, parallel=parallel)), folder=tmp_path),
        alone,
    )


PACKED = [
    (1, {}, 2, MODEL),
    (1, {}, 1, GPT2),
    (2, {}, 1, MODEL),
    (4, {"tensor": 2, "pipeline": 2}, 2, MODEL),
    (8, {"tensor": 2, "pipeline": 2}, 1, MODEL),
]


@pytest.mark.parametrize(
    ("world", "parallel", "micro", "model"),
    PACKED,
    ids=lambda value: value["model_type"] if "model_type" in str(value) else str(value),
)
def test_packed_equals_plain_torch_on_each_chat_alone(
    world, parallel, micro, model, files, tmp_path
):
    """GPT-2's learned positions show that they restart; rotary positions are relative."""
    train = {"global_batch_size": 4, "micro_batch_size": micro}
    raw = prepared(
        {**settings(files, parallel=parallel, data={"packing": True}, train=train), "model": model}
    )
    samples = SFTTask().open(checked(raw), read_config(load_hf_config(model)), "train").samples
    assert samples.samples_per_epoch < 0.8 * CHATS, "most share a sequence"
    chats = {tuple(tokens.tolist()): number for number, (tokens, _) in enumerate(read_chats(files))}

    def chats_of(step):
        """Returns the chats of the sequences."""
        found = []
        for position in range(4 * step, 4 * step + 4):
            sample = samples.fetch(position)
            for document in range(sample.documents.max() + 1):
                here = sample.tokens[sample.documents == document]
                found += [
                    number
                    for tokens, number in chats.items()
                    if tokens[:-1] == tuple(here.tolist())
                ][:1]
        return found

    assert_same(
        run_ranks(run_layout, world, raw, folder=tmp_path), reference(files, chats_of, model=model)
    )


def test_packing_does_not_change_loss_and_gradient(files, tmp_path):
    """All chats are in one step, in a few sequences or each in its own."""
    results = []
    for packing in (False, True):
        raw = prepared(settings(files, data={"packing": packing}, train={"steps": 1}))
        count = SFTTask().open(checked(raw), read_config(load_hf_config(MODEL)), "train").per_epoch
        raw["train"]["global_batch_size"] = count
        results += run_ranks(run_layout, 1, raw, folder=tmp_path)
    (alone, learnt), (packed, packed_learnt) = results
    assert len(packed_learnt[0]) < 0.8 * len(learnt[0])
    assert sum(learnt[0]) == sum(packed_learnt[0])
    assert abs(alone.losses[0] - packed.losses[0]) < 1e-6
    for one, other in zip(alone.pieces, packed.pieces, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("world", "parallel", "micro"), [(2, {}, 8), (4, {"pipeline": 2}, 2), (1, {}, 1)], ids=str
)
def test_microbatches_and_ranks_without_a_loss(world, parallel, micro, files, tmp_path):
    """20 chats at 16 per step: the last step has empty sequences, for some ranks only those."""
    train = {"steps": None, "epochs": 1, "global_batch_size": 16, "micro_batch_size": micro}
    results = run_ranks(
        run_layout,
        world,
        prepared(settings(files, parallel=parallel, train=train)),
        folder=tmp_path,
    )
    learnt = [sum(second) if micro == 8 else min(second) for _, (_, second) in results]
    assert 0 in learnt
    assert_same(
        results,
        reference(
            files,
            lambda step: [alone_order(p)[0] for p in range(16 * step, min(16 * step + 16, CHATS))],
            steps=2,
        ),
    )


def chats_of(samples, count):
    return [tuple(samples.fetch(position).tokens.tolist()) for position in range(count)]


def test_split_and_blend(files, tmp_path):
    """A split keeps a part for validation; a blend mixes files by weight, without epochs."""
    architecture = read_config(load_hf_config(MODEL))

    def opened(which, **data):
        raw = settings(files, run={"output_dir": str(tmp_path)}, data={"valid": None, **data})
        SFTTask().prepare(checked(raw), which)
        return SFTTask().open(checked(raw), architecture, which)

    train, valid = (opened(which, split="80,20") for which in ("train", "valid"))
    assert (train.per_epoch, valid.per_epoch) == (16, 4)
    everything = set(chats_of(opened("train").samples, CHATS))
    assert set(chats_of(train.samples, 16)) | set(chats_of(valid.samples, 4)) == everything
    assert len(everything) == CHATS
    blend = opened(
        "train",
        train=[
            {"path": str(files / f"{name}.jsonl"), "weight": weight}
            for name, weight in (("train", 3), ("valid", 1))
        ],
    )
    assert blend.per_epoch is None
    assert abs(sum(chat in everything for chat in chats_of(blend.samples, 40)) - 30) <= 1


def test_check_counts_the_steps_of_epochs(files, tmp_path, capfd, monkeypatch):
    """A check prepares few data to count them, and many only if they are prepared already."""
    for name, value in (("DS_ACCELERATOR", "cpu"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    raw = settings(
        files,
        run={"output_dir": str(tmp_path / "run")},
        data={"packing": True},
        train={"steps": None, "epochs": 3, "global_batch_size": 4},
        checkpoint={"save_every": 2},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))

    def said(*words):
        assert main(["check", str(tmp_path / "run.yaml"), *words]) == 0
        return capfd.readouterr()

    few = said()
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    monkeypatch.setattr("megatrain.training.task_sft.FEW_BYTES", 1000)
    many = said()
    assert "  work    3 epochs, in steps of 384 tokens" in many.out
    assert "only the data determine" in many.err
    SFTTask().prepare(checked(raw), "train")
    assert said().out.rpartition("checkpoints: ")[0] == few.out.rpartition("checkpoints: ")[0]
    sequences = SFTTask().open(checked(raw), read_config(load_hf_config(MODEL)), "train").per_epoch
    steps = -(-3 * sequences // 4)
    assert f"  work    {steps} steps x 384 tokens = " in few.out
    assert f"  epochs  3 x {sequences} samples" in few.out
    assert f" each, {-(-steps // 2)} at once; " in few.out


# -- whole runs ----------------------------------------------------------------------------------


def test_resumed_run_is_bit_identical_and_its_folder_generates_chats(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(folder, **train):
        raw = settings(
            files,
            run={"output_dir": str(tmp_path / folder)},
            data={"packing": True},
            parallel={"pipeline": 2},
            train={
                "steps": None,
                "epochs": 3,
                "global_batch_size": 4,
                **train,
            },
            eval={"every": 3, "batches": 50},
        )
        run_ranks(finetune, 2, raw, folder=tmp_path)

    run("whole")
    last = metrics(tmp_path / "whole")[-1]["step"]
    assert last >= 6
    run("parts", exit_after_step=3)
    run("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=last)
    assert "epochs: 3" in (tmp_path / "whole" / "config.yaml").read_text()
    saved = tmp_path / "whole" / "checkpoints" / f"step-{last:08d}"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == CHATML
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        0,
    ]
    # every validation chat once, though more batches were asked for
    total, count = 0.0, 0
    for line in (files / "valid.jsonl").read_text().splitlines():
        made = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            chat_template=WITH_MARKS,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        wanted = torch.tensor(made["assistant_masks"][1:]) == 1
        tokens = torch.tensor(made["input_ids"])
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        total += float(
            torch.nn.functional.cross_entropy(logits[wanted], tokens[1:][wanted], reduction="sum")
        )
        count += int(wanted.sum())
    assert abs(metrics(tmp_path / "whole")[-1]["valid_loss"] - total / count) < 1e-5


def test_generation_config_is_kept_with_the_end_of_answers(tmp_path):
    """The generation config of the tokenizer's folder is kept, also if transformers rejects it."""
    from megatrain.checkpoint.hf_metadata import Chat, write_hf_metadata

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
    (theirs / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false, "eos_token_id": 5}'
    )
    for name in (
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors",
        "train_state.json",
        "modeling.py",
    ):
        (theirs / name).write_text("{}")
    write_hf_metadata(
        ours,
        read_config(load_hf_config(MODEL)),
        dtype=torch.float32,
        tokenizer=str(theirs),
        chat=Chat("mine", [7, 5]),
    )
    assert json.loads((ours / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "do_sample": False,
        "eos_token_id": [7, 5],
    }
    assert (ours / "chat_template.jinja").read_text() == "mine"
    assert {path.name for path in ours.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
