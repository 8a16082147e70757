"""Old setting names are refused with the new ones, and migrated in files of run folders."""

import json

import pytest
import yaml

from megatrain.checkpoint.train_state import read_train_state
from megatrain.config.loader import Config, from_dict, load, read, to_dict
from megatrain.config.renamed import RENAMED, migrate
from megatrain.errors import ConfigError, format_override
from megatrain.report.run_folder import read_run

OLD = """
run: {output_dir: runs/a, stall_seconds: 30.0}
parallel: {pipeline: 2, memory_gib: 3.0}
train:
  steps: 5
  save_every: 2
  keep_last: 1
  resume_margin: 0.5
  eval_every: 3
  early_stop: 2
  early_stop_metric: valid_accuracy
  spike: rollback
  spike_steps: 2
  max_bad_steps: 4
  trace_steps: [2, 3]
  stop_after: 4
"""


def value_of(config, name):
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_is_refused_with_new_name(old, new, tmp_path):
    value = value_of(Config(), new)
    section, key = old.split(".")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({section: {key: value}}))
    for arguments in ((None, [format_override(old, value)]), (tmp_path / "run.yaml", [])):
        config, (error,) = read(*arguments)
        assert (error.setting, error.requirement) == (old, f"was renamed to {new}")
        assert error.fix == {new: value}
        assert value_of(config, new) == value


def test_old_name_keeps_its_value():
    with pytest.raises(
        ConfigError, match=r"train\.save_every=5 was renamed to checkpoint\.save_every"
    ):
        load(None, ["train.steps=1", "train.save_every=5"])
    _, (error,) = read(None, ["train.spike=off"])  # YAML reads `off` as false
    assert error.fix == {"stability.on_loss_spike": "off"}
    assert error.fix_text == "stability.on_loss_spike='off'"


def test_new_names_are_settings():
    for new in RENAMED.values():
        value_of(Config(), new)


def test_migrated_file_has_the_same_values():
    config = from_dict(migrate(yaml.safe_load(OLD)))
    assert (config.run.hang_timeout, config.parallel.autotune_memory_gib) == (30.0, 3.0)
    assert (config.checkpoint.save_every, config.checkpoint.resume_loss_tolerance) == (2, 0.5)
    assert (config.eval.every, config.eval.early_stopping_patience) == (3, 2)
    assert config.stability.on_loss_spike == "rollback"
    assert (config.profile.steps, config.train.exit_after_step) == ([2, 3], 4)


def test_migrating_changes_no_new_file_and_not_its_argument():
    new = to_dict(Config())
    assert migrate(new) == new
    raw = yaml.safe_load(OLD)
    migrate(raw)
    assert raw == yaml.safe_load(OLD)
    assert migrate({"train": None, "run": 3}) == {"train": None, "run": 3}


def test_old_run_folder_and_checkpoint_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text(OLD)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert read_run(tmp_path).setting("checkpoint.save_every") == 2
    raw = {"data": {}, "optimizer": {}, **yaml.safe_load(OLD)}
    state = {"step": 1, "tokens": 1, "updates": 1, "bad_steps": 0}
    (tmp_path / "trainer.json").write_text(
        json.dumps({**state, "layout": {}, "model": {}, "config": raw})
    )
    assert read_train_state(tmp_path).run.config["checkpoint"]["keep_last"] == 1
