"""DPO, SimPO and ORPO on each layout equal the papers' formulas on transformers and peft."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.networks import transformers_twin
from helpers.rank_pool import run_ranks
from helpers.reference_model import give_weights, make_stage, train
from helpers.training_runs import laid_over

from megatrain.config import loader as configuration
from megatrain.config.schema import LoraConfig
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.errors import CheckpointError
from megatrain.models.config import load_hf_config, read_config
from megatrain.ops.random import normal_slice

STEPS, PAIRS, LENGTH, LR = 3, 4, 14, 1e-3
MODEL = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "initializer_range": 0.1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "dpo": {"beta": 0.3},
    "smooth": {"label_smoothing": 0.2},
    "simpo": {"margin": 0.5},
    "orpo": {"beta": 0.7},
    "lora": {"beta": 0.5},
    "lora-beforehand": {"beta": 0.5, "reference": "beforehand"},
}
LORA = {"rank": 4, "alpha": 6}


def make_config(kind: str, folder: Path, **settings):
    values = {
        "train.steps": STEPS,
        "train.global_batch_size": 2 * PAIRS,
        "train.micro_batch_size": 2,
        "data.sequence_length": LENGTH,
        "optimizer.lr": LR,
        "lr_schedule.name": "constant",
        "optimizer.grad_clip": 0.5,
        "run.seed": 7,
        "run.output_dir": str(folder),
    }
    raw: dict = {
        "model": MODEL,
        "task": kind if kind in ("simpo", "orpo") else "dpo",
        "preference": KINDS[kind],
    }
    if kind.startswith("lora"):
        raw["lora"] = LORA
    return configuration.from_dict(laid_over(raw, values | settings))


def pairs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens and labels [2 * PAIRS, LENGTH], chosen and rejected in turn.

    Pairs share a prompt and have answers of any length. The last step's last pair is only padding.
    """
    generator = torch.Generator().manual_seed(step)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows, labels = (
        torch.zeros((2 * PAIRS, LENGTH), dtype=torch.int64),
        torch.full((2 * PAIRS, LENGTH), -100),
    )
    for pair in range(PAIRS - (step == STEPS)):
        prompt = torch.randint(3, 67, (number(2, 6),), generator=generator)
        for side in (0, 1):
            row = torch.cat(
                [prompt, torch.randint(3, 67, (number(1, LENGTH - 5),), generator=generator)]
            )
            rows[2 * pair + side, : len(row) - 1] = row[:-1]
            labels[2 * pair + side, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
    return rows, labels


def log_probs(network, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    all_log_probs = network(input_ids=rows).logits.float().log_softmax(-1)
    told = all_log_probs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (told * (labels >= 0)).sum(1)


def pair_losses(
    kind: str, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes losses and reward margins of each pair, by the formulas of the papers."""
    c, r = policy[0::2], policy[1::2]
    if kind == "simpo":
        difference = 2.0 * c / lengths[0::2] - 2.0 * r / lengths[1::2]
        return -torch.log(torch.sigmoid(difference - 0.5)), difference
    if kind == "orpo":
        p = torch.exp(torch.stack([c / lengths[0::2], r / lengths[1::2]]))
        odds = p / (1 - p)
        return -torch.log(p[0]) - 0.7 * torch.log(
            torch.sigmoid(torch.log(odds[0] / odds[1]))
        ), 0.7 * torch.log(p[0] / p[1])
    beta = {"dpo": 0.3, "smooth": 0.1}.get(kind, 0.5)
    difference = beta * ((c - reference[0::2]) - (r - reference[1::2]))
    share = 0.2 if kind == "smooth" else 0.0
    return -(1 - share) * torch.log(torch.sigmoid(difference)) - share * torch.log(
        torch.sigmoid(-difference)
    ), difference


def shifted(name: str, shape: tuple[int, ...], value: torch.Tensor) -> torch.Tensor:
    """Randomizes adapters, so that the model differs from its reference."""
    return (
        value + normal_slice(99, name, shape, tuple(slice(0, size) for size in shape), std=0.1)
        if "lora_B" in name
        else value
    )


def make_network(kind: str, folder: Path):
    config, architecture = make_config(kind, folder), read_config(load_hf_config(MODEL))
    if not config.lora.rank:
        return transformers_twin(MODEL, make_stage(config, architecture)).train()
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_config(load_hf_config(MODEL), attn_implementation="eager")
    adapters = give_weights(make_stage(config, architecture), network)
    network = get_peft_model(
        network,
        LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=config.lora.targets),
    )
    missed = set_peft_model_state_dict(
        network,
        {name: shifted(name, tuple(value.shape), value) for name, value in adapters.items()},
    )
    assert not missed.unexpected_keys
    return network.train()


def reference(kind: str, folder: Path):
    """Trains with plain torch; returns losses, norms, reward margins and accuracies."""
    network = make_network(kind, folder)
    steps = range(1, STEPS + 1)
    with torch.no_grad(), network.disable_adapter() if kind.startswith("lora") else nullcontext():
        began = [log_probs(network, *pairs(step)) for step in steps]
    margins = []

    def loss(step: int) -> torch.Tensor:
        rows, labels = pairs(step)
        used = (labels >= 0).any(1)
        policy = log_probs(network, rows, labels)[used]
        each, difference = pair_losses(
            kind, policy, began[step - 1][used], (labels >= 0).sum(1)[used]
        )
        margins.append((difference.mean().item(), float((difference > 0).float().mean())))
        return each.mean()

    plain = train(
        {name: p for name, p in network.named_parameters() if p.requires_grad},
        loss,
        steps=STEPS,
        lr=LR,
    )
    return plain.losses, plain.norms, margins


@torch.no_grad()
def shift(optimizer) -> None:
    for fragment in optimizer.state.fragments():
        s, master = fragment.sharding, fragment.tensors["master"]
        part = s.shard(shifted(s.name, s.shape, torch.zeros(s.shape)))
        master.add_(part.flatten()[fragment.start : fragment.start + master.numel()])
    optimizer.state.copy_masters_to_weights()


def run_layout(rank: int, world_size: int, config):
    from megatrain.training.ref_logprobs import make_ref_logprobs
    from megatrain.training.step_runner import StepRunner, reference_mode

    p, size = config.parallel, config.train.micro_batch_size
    mesh = make_mesh(rank, tensor=p.tensor, pipeline=p.pipeline, data=config.data_size(world_size))

    def batches(number: int) -> list[Batch]:
        position = torch.arange(LENGTH).expand(size, LENGTH)
        split = zip(
            *(x.split(size)[mesh.data.rank :: mesh.data.size] for x in pairs(number + 1)),
            strict=True,
        )
        return [Batch(rows, labels, position, torch.zeros_like(position)) for rows, labels in split]

    runner = StepRunner(
        config, read_config(load_hf_config(config.model)), mesh, torch.device("cpu")
    )
    if config.lora.rank:
        shift(runner.optimizer)
    if reference_mode(config) == "beforehand":
        runner.ref_logprobs = make_ref_logprobs(config, runner, [(batches, STEPS)], resumed=False)
    reports = [runner.train_step(step, batches(step - 1)) for step in range(1, STEPS + 1)]
    return (
        [r.loss for r in reports],
        [r.grad_norm for r in reports],
        [(r.measures["rewards/margins"], r.measures["rewards/accuracy"]) for r in reports],
    )


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    cache: dict = {}

    def get(kind: str):
        same = kind.removesuffix("-beforehand")
        if same not in cache:
            cache[same] = reference(same, tmp_path_factory.mktemp("reference"))
        return cache[same]

    return get


def row(kind: str, world: int = 1, **settings):
    name = "-".join([kind, f"w{world}", *(f"{k}{v}" for k, v in settings.items())])
    return pytest.param(
        kind,
        world,
        {
            f"{'train' if k in ('recompute', 'micro_batch_size') else 'parallel'}.{k}": v
            for k, v in settings.items()
        },
        id=name,
    )


TP, PP, TP_PP = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}


@pytest.mark.parametrize(
    ("kind", "world", "settings"),
    [
        *[row(kind) for kind in ("smooth", "simpo", "orpo", "lora-beforehand")],
        row("dpo", micro_batch_size=4),
        row("dpo", 2, **PP),
        row("lora", 2, **TP),
        row("lora", 2, zero=3),
        row("dpo", 2, zero=2),
        row("simpo", 2, schedule="zb-v", **PP),
        row("dpo", 4, **TP_PP),
        row("lora", 4, sequence=True, schedule="zb-h1", recompute="full", **TP_PP),
        row("dpo", 8, **TP_PP),
    ],
)
def test_equals_the_formulas_on_transformers(kind, world, settings, references, tmp_path):
    results = run_ranks(run_layout, world, make_config(kind, tmp_path, **settings), folder=tmp_path)
    losses, norms, margins = references(kind)
    for ours, our_norms, our_margins in results:
        assert (ours, our_norms, our_margins) == results[0]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(our_norms), torch.tensor(norms), rtol=3e-5, atol=0)
        torch.testing.assert_close(
            torch.tensor(our_margins), torch.tensor(margins), rtol=1e-4, atol=1e-5
        )


def extend_reference(rank: int, world_size: int, config):
    """Reads and extends the reference as a resumed run does."""
    from megatrain.training.ref_logprobs import make_ref_logprobs
    from megatrain.training.step_runner import StepRunner

    position = torch.arange(LENGTH).expand(2 * PAIRS, LENGTH)

    def batches(number: int) -> list[Batch]:
        return [Batch(*pairs(number + 1), position, torch.zeros_like(position))]

    runner = StepRunner(
        config, read_config(load_hf_config(config.model)), make_mesh(rank), torch.device("cpu")
    )
    first = make_ref_logprobs(config, runner, [(batches, 2)], resumed=False)
    begun = dict(first.table)
    other = replace(config, run=replace(config.run, seed=8))
    folder = Path(config.run.output_dir)
    # Earlier versions wrote the file under another name.
    (folder / "ref_logprobs.safetensors").rename(folder / "reference.safetensors")
    again = make_ref_logprobs(other, runner, [(batches, 2)], resumed=True)
    assert again.table == begun, "what it began from is read, whatever the weights are now"
    try:
        make_ref_logprobs(config, runner, [(batches, STEPS)], resumed=True)
    except CheckpointError as error:
        refused = str(error)
    adapted = replace(config, lora=LoraConfig(rank=2))
    assert len(make_ref_logprobs(adapted, runner, [(batches, STEPS)], resumed=True).table) > len(
        begun
    )
    (folder / "ref_logprobs.safetensors").write_bytes(b"x")
    try:
        make_ref_logprobs(config, runner, [(batches, 2)], resumed=False)
    except CheckpointError as error:
        return refused, str(error)
    return None


def test_reference_is_read_and_never_computed_with_other_weights(tmp_path):
    refused, damaged = run_ranks(
        extend_reference,
        1,
        make_config("dpo", tmp_path, **{"train.micro_batch_size": 8}),
        folder=tmp_path,
    )[0]
    assert (
        "lacks log-probabilities of these data, which only the initial weights of the run give"
        in refused
    )
    assert "is damaged" in damaged
