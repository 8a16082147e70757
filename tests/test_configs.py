"""Every YAML in configs/ loads, and its layout fits its model."""

from importlib.util import find_spec

import pytest
from helpers.checkout_paths import CONFIGS
from helpers.shipped_configs import WRITTEN_FOR

from megatrain.__main__ import main
from megatrain.config import loader
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.counts import matrix_weights


def test_table_lists_all_configs():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(WRITTEN_FOR)


@pytest.mark.parametrize("name", WRITTEN_FOR)
def test_dry_run(name, capsys, monkeypatch, tmp_path):
    """Stages are built without memory, and add up to the model; missing data are only noted."""
    monkeypatch.chdir(tmp_path)
    command = "finetune" if name.startswith("finetune") else "pretrain"
    assert main([command, str(CONFIGS / f"{name}.yaml"), "--dry-run"]) == 0
    output = capsys.readouterr().out
    loaded = loader.load(CONFIGS / f"{name}.yaml")
    notes = (
        ["there is no file"] * 2
        if command == "pretrain"
        else [str(loaded.data.train), str(loaded.data.valid)]
    )
    notes += ["train.init_from="] if loaded.train.init_from else []
    notes += [f"data.tokenizer={loaded.data.tokenizer} does not exist"]
    notes += (
        ["lora.quantize=nf4 needs bitsandbytes"]
        if loaded.lora.quantize == "nf4" and find_spec("bitsandbytes") is None
        else []
    )
    assert all(f"\nnote: {note}" in output for note in notes)
    assert output.count("\nnote: ") == len(notes)
    stages = loader.load(CONFIGS / f"{name}.yaml").parallel.pipeline
    assert (
        sum(
            line.split()[0].isdigit()
            for line in output.splitlines()
            if line.startswith("  ") and line.strip()
        )
        == stages
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITTEN_FOR)
def test_layout_fits_the_model(name):
    ranks, billions = WRITTEN_FOR[name]
    loaded = loader.load(CONFIGS / f"{name}.yaml")
    architecture = read_config(load_hf_config(loaded.model))
    tensor, pipeline = loaded.parallel.tensor, loaded.parallel.pipeline
    assert loaded.microbatches(loaded.data_size(ranks)) >= pipeline
    assert architecture.num_heads % tensor == 0
    assert architecture.num_kv_heads % tensor == 0
    assert architecture.num_layers % pipeline == 0
    assert loaded.data.sequence_length <= architecture.max_positions
    assert matrix_weights(architecture.config) / 1e9 == pytest.approx(billions, rel=0.01)
