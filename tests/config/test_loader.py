"""Configs are read from YAML and overrides; unknown names, types and values are refused."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from megatrain.config.documentation import to_commented_yaml, to_markdown
from megatrain.config.loader import Config, check, from_dict, load, to_dict, to_yaml
from megatrain.errors import ConfigError


def made(*words):
    return load(None, ["train.steps=10", *words])


def refusal(*words):
    with pytest.raises(ConfigError) as caught:
        made(*words)
    return str(caught.value)


def written(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


# -- reading -------------------------------------------------------------------------------------


def test_defaults_are_a_valid_config():
    assert made() == dataclasses.replace(
        Config(), train=dataclasses.replace(Config().train, steps=10)
    )


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    file = written(tmp_path, "train: {steps: 5, micro_batch_size: 2}\noptimizer:\n")
    read = load(file, ["train.steps=7", "train.steps=8"])
    assert (read.train.steps, read.train.micro_batch_size, read.optimizer) == (
        8,
        2,
        Config().optimizer,
    )


def test_overrides_fill_a_section_that_the_file_leaves_empty(tmp_path):
    read = load(
        written(tmp_path, "train: {steps: 5}\nmodel:\noptimizer:\n"),
        ["optimizer.lr=2e-4", "model.model_type=gpt2"],
    )
    assert (read.optimizer.lr, read.model) == (2e-4, {"model_type": "gpt2"})


def test_what_is_merged_may_be_given_once_more(tmp_path):
    read = load(
        written(
            tmp_path,
            "train: {steps: 5}\nmodel:\n  a: &a {x: 1, y: 2}\n  b: &b {<<: *a, x: 3}\n"
            "  c: {<<: *b, y: 4}\n",
        )
    )
    assert read.model == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def test_overrides_reach_into_the_model(tmp_path):
    file = written(tmp_path, "train: {steps: 5}\nmodel: {model_type: gpt2, n_layer: 2}\n")
    assert load(file, ["model.n_layer=3", "model.rope_parameters.factor=2"]).model == {
        "model_type": "gpt2",
        "n_layer": 3,
        "rope_parameters": {"factor": 2},
    }


def test_a_model_folder_is_looked_up_beside_the_config(tmp_path):
    (tmp_path / "tiny").mkdir()
    file = written(tmp_path, "train: {steps: 5}\nmodel: tiny\n")
    assert load(file).model == str(tmp_path / "tiny")
    assert load(file, ["model=elsewhere"]).model == "elsewhere"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("2", 2.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("1.", 1.0),
        ("3.0e-4", 3e-4),
    ],
)
def test_numbers_are_numbers(tmp_path, text, value):
    assert made(f"optimizer.lr={text}", "lr_schedule.min_lr=0").optimizer.lr == value
    assert (
        load(written(tmp_path, f"train: {{steps: 1}}\noptimizer: {{lr: {text}}}\n")).optimizer.lr
        == value
    )


def test_whole_numbers_may_be_written_as_floats_and_only_whole_ones():
    read = load(None, ["train.tokens=1e9", "data.sequence_length=1024.0"])
    assert (read.train.tokens, read.data.sequence_length) == (10**9, 1024)
    assert isinstance(read.train.tokens, int)
    zero = made("parallel.zero=1.0").parallel.zero
    assert (zero, type(zero)) == (1, int)
    assert "must be a whole number" in refusal("train.log_every=1.5")


def test_off_is_off_although_yaml_reads_it_as_false(tmp_path):
    assert made("stability.on_loss_spike=off").stability.on_loss_spike == "off"
    read = load(written(tmp_path, "train: {steps: 1}\nstability: {on_loss_spike: off}\n"))
    assert load(written(tmp_path, to_yaml(read))) == read


def test_null_takes_a_setting_back():
    assert (
        made("train.exit_after_step=3", "train.exit_after_step=null").train.exit_after_step is None
    )


def test_a_resolved_config_reads_back(tmp_path):
    read = made(
        "model={model_type: gpt2}",
        "data.train=[{path: a, weight: 0.3}]",
        "optimizer.betas=[0.8, 0.9]",
    )
    assert load(written(tmp_path, to_yaml(read))) == read
    assert from_dict(to_dict(read)) == read


def test_commented_yaml_has_every_default_and_a_meaning():
    raw = yaml.safe_load(to_commented_yaml())
    assert {**raw, "model": ""} == to_dict(Config())
    assert all("  # " in line for line in to_commented_yaml().splitlines() if line.startswith("  "))


def test_settings_page_is_up_to_date():
    """`megatrain config --markdown > docs/settings.md` updates it."""
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == to_markdown()


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().train.steps = 3


BAD_FILES = {
    "train: [": "must be valid YAML",
    "- a\n": "must contain sections",
    "train: {steps: 1, steps: 2}": "duplicate key 'steps'",
    "train: 5": "train=5 must be a section of settings",
    "model: 5": "model=5 must be a folder",
    "trian: {}": "trian={} is not a section of the config; did you mean `train`?",
    "train: {stepz: 1}": "train.stepz=1 is not a setting; did you mean `steps`?",
    "train: {steps: !!python/object/apply:os.getcwd []}": "must be valid YAML",
    "run:\n  name: 2024-13-45": (
        "must be valid YAML: '2024-13-45' cannot be read (month must be in 1..12) "
        "(line 2, column 9)"
    ),
    "train: {steps: " + "9" * 5000 + "}": "cannot be read (Exceeds the limit",
    "train: " + "[" * 5000: "must be valid YAML: nested too deeply",
    "train: {[steps]: 1}": (
        "must be valid YAML: a key must be text, not a list or mapping (line 1, column 9)"
    ),
    "on: {a: 1}": "true={'a': 1} is not a section of the config",
    "5:": "5=null is not a section of the config",
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.items())
def test_files_that_are_refused(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"CONFIG=.*none.yaml does not exist"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(file)


# -- invalid settings and their messages ---------------------------------------------------------

REFUSED = {
    "steps": "argument=steps must have the form section.key=value",
    "=3": "argument==3 must have the form",
    "train.steps=[1": "train.steps=[1 must be a YAML value",
    "train.steps.more=1": "requires `steps` to be a section, not 10",
    "xyz.steps=1": "xyz={'steps': 1} is not a section of the config; known: run, model,",
    "train.step=1": "train.step=1 is not a setting; did you mean `steps`?",
    "train.steps=ten": "train.steps=ten must be a whole number or null, not text",
    "train.log_every=true": "train.log_every=true must be a whole number, not true or false",
    "train.log_every=null": "train.log_every=null must be a whole number, not null",
    "run.verbose=1": "run.verbose=1 must be true or false, not a whole number",
    "run.name=5": "run.name=5 must be text",
    "optimizer.lr=fast": "optimizer.lr=fast must be a number",
    "run.name=2024-12-05": "run.name=2024-12-05 must be text, not date",
    "run.name=2024-13-45": "run.name=2024-13-45 must be a YAML value",
    "train.log_every=" + "[" * 5000: "[[[... must be a YAML value",
    "parallel.zero='1'": "parallel.zero=1 must be one of 0, 1, 2, 3",
    "train.log_every=1e30": "train.log_every=1e+30 must be at most 9223372036854775807",
    "run.seed=-1e30": "run.seed=-1e+30 must be at most",
    "optimizer.betas=0.9": "optimizer.betas=0.9 must be a list",
    "optimizer.betas=[0.9, x]": "optimizer.betas[1]=x must be a number",
    "data.train=[a]": "data.train[0]=a must be a mapping",
    "train.dtype=bf17": "train.dtype=bf17 must be one of fp32, bf16, fp16; did you mean `bf16`?",
    "stability.on_loss_spike=on": "stability.on_loss_spike=true must be one of off, warn, rollback",
    "stability.max_rollbacks=5": (
        "stability.max_rollbacks=5 has no effect with stability.on_loss_spike=warn; "
        "set stability.on_loss_spike=rollback"
    ),
    "stability.spike_threshold=0": "stability.spike_threshold=0.0 must be above 0",
    "stability.on_loss_spike=rollback": (
        "stability.on_loss_spike=rollback requires checkpoints, "
        "but checkpoint.save_every=0 saves only at the end"
    ),
    "parallel.zero=4": "parallel.zero=4 must be one of 0, 1, 2, 3",
    "parallel.zero=true": "parallel.zero=true must be one of 0, 1, 2, 3",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] must be two numbers in [0, 1)",
    "optimizer.betas=[0.9, 1.0]": "must be two numbers in [0, 1)",
    "optimizer.momentum=1.0": "optimizer.momentum=1.0 must be in [0, 1)",
    "optimizer.lr=.nan": "optimizer.lr=nan must be a finite number",
    "optimizer.lr=.inf": "optimizer.lr=inf must be a finite number",
    "optimizer.betas=[.nan, 0.9]": "optimizer.betas[0]=nan must be a finite number",
    f"optimizer.lr=1{'0' * 400}": "must be a finite number",
    "train.tokens=.inf": "train.tokens=inf must be a whole number or null",
    "train.steps=.nan": "train.steps=nan must be a whole number or null",
    "parallel.zero=.nan": "parallel.zero=nan must be one of 0, 1, 2, 3",
    "parallel.zero=[1]": "parallel.zero=[1] must be one of 0, 1, 2, 3",
    "parallel.zero=1.5": "parallel.zero=1.5 must be one of 0, 1, 2, 3",
    "train.dtype=1": "train.dtype=1 must be one of fp32, bf16, fp16",
    "run.master_port=70000": "run.master_port=70000 must be in [0, 65535]",
    "lr_schedule.stable_fraction=1.1": "lr_schedule.stable_fraction=1.1 must be in [0, 1]",
    "lr_schedule.warmup_steps=11": (
        "lr_schedule.warmup_steps=11 must be at most 10, the steps of the schedule"
    ),
    "lr_schedule.min_lr=1": "lr_schedule.min_lr=1.0 must be at most optimizer.lr=0.0003",
    "train.tokens=5": "train.tokens=5 cannot be combined with train.steps=10; set exactly one of",
    "train.steps=null": "train.steps=null is missing; set exactly one of",
    "eval.early_stopping_metric=valid_accuracy": (
        "eval.early_stopping_metric=valid_accuracy has no effect with "
        "eval.early_stopping_patience=0"
    ),
    "parallel.sequence=true": "parallel.sequence=true requires parallel.tensor of at least 2",
}


@pytest.mark.parametrize(("word", "message"), REFUSED.items())
def test_refused(word, message):
    assert message in refusal(word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["stability.on_loss_spike=off", "stability.spike_threshold=5"],
            "stability.spike_threshold=5.0 has no effect with stability.on_loss_spike=off; "
            "set stability.on_loss_spike=warn or rollback",
        ),
        (
            ["stability.spike_window=8", "stability.spike_patience=3"],
            "stability.spike_window=8 must be at least 12 with stability.spike_patience=3",
        ),
        (
            [
                "stability.on_loss_spike=rollback",
                "checkpoint.save_every=5",
                "train.steps=null",
                "train.epochs=2",
            ],
            "skips samples, but train.epochs requires every sample",
        ),
        (
            [
                "stability.on_loss_spike=rollback",
                "checkpoint.save_every=5",
                "task=dpo",
                "train.micro_batch_size=2",
            ],
            "without reference log-probabilities",
        ),
    ],
)
def test_settings_of_spikes_that_mean_nothing_or_cannot_work(words, message):
    assert message in refusal(*words)


def numeric_settings():
    return {
        f"{section.name}.{item.name}"
        for section in dataclasses.fields(Config)
        if section.name not in ("model", "task")
        for item in dataclasses.fields(section.default_factory)
        if {"int", "float"} & set(str(item.type).split(" | "))
    }


@pytest.mark.parametrize("name", sorted(numeric_settings()))
def test_every_number_has_a_range(name):
    steps = "train.steps=null" if name in ("train.tokens", "train.epochs") else "run.seed=1"
    assert refusal(steps, f"{name}=-1").startswith(f"{name}=-1")


def test_ranges_name_the_least_value():
    assert refusal("train.log_every=0") == "train.log_every=0 must be at least 1"
    assert refusal("run.seed=-1") == "run.seed=-1 must be at least 0"


def test_a_share_of_augmented_words_needs_augmentation():
    words = ["task=classification", "classification.augment_share=0.3"]
    assert refusal(*words).startswith(
        "classification.augment_share=0.3 has no effect with classification.augment=none"
    )
    assert made(*words, "classification.augment=mix").classification.augment_share == 0.3


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_2_and_3_need_one_stage(zero):
    message = refusal(f"parallel.zero={zero}", "parallel.pipeline=2")
    assert f"parallel.zero={zero} requires parallel.pipeline=1, not 2" in message
    assert "keep ZeRO with parallel.pipeline=1 and parallel.data=2" in message
    assert made(f"parallel.zero={zero}").parallel.zero == zero


def test_sequence_parallel_divides_the_sequence():
    words = ["parallel.sequence=true", "parallel.tensor=3"]
    assert refusal(*words, "data.sequence_length=1024").endswith(
        "must be a multiple of parallel.tensor=3 with parallel.sequence"
    )
    assert made(*words, "data.sequence_length=1023").parallel.sequence


# -- values derived from several settings --------------------------------------------------------


def test_data_size_is_derived():
    read = made("parallel.tensor=2", "parallel.pipeline=3")
    assert read.model_ranks == 6
    assert [read.data_size(world) for world in (6, 12)] == [1, 2]
    with pytest.raises(
        ConfigError,
        match="pipeline 3 does not divide the 8 ranks of this run; start a multiple of 6",
    ):
        read.data_size(8)


def test_a_given_data_size_must_fit():
    read = made("parallel.tensor=2", "parallel.data=2")
    assert read.data_size(4) == 2
    with pytest.raises(ConfigError, match="x data 2 requires 4 ranks, not 8; start 4 ranks"):
        read.data_size(8)


def test_microbatches():
    read = made("train.global_batch_size=12", "train.micro_batch_size=2")
    assert [read.microbatches(data) for data in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(
        ConfigError, match=r"size=12 must be a multiple of .*=2 x data size 4; .* are 8 and 16"
    ):
        read.microbatches(4)
    with pytest.raises(ConfigError) as caught:
        read.microbatches(8)
    assert caught.value.fix == {"train.global_batch_size": 16}
    assert "must be a multiple of" in refusal("train.global_batch_size=9", "parallel.data=2")


def test_steps_of_a_token_budget_are_rounded_up():
    words = ["train.global_batch_size=4", "data.sequence_length=8"]
    assert made(*words).tokens_per_step == 32
    assert [load(None, [*words, f"train.tokens={tokens}"]).steps for tokens in (1, 32, 33)] == [
        1,
        1,
        2,
    ]
    assert made().steps == 10


def test_warmup_is_held_against_the_schedules_own_length():
    assert (
        made("lr_schedule.warmup_steps=15", "lr_schedule.decay_steps=20").lr_schedule.warmup_steps
        == 15
    )
    assert "must be at most 4, the steps of the schedule" in refusal(
        "lr_schedule.warmup_steps=5", "lr_schedule.decay_steps=4"
    )
    assert made("train.steps=0", "lr_schedule.warmup_steps=5").steps == 0


def test_a_runs_name():
    assert made("run.output_dir=a/b").run_name == "b"
    assert made("run.output_dir=a/b", "run.name=c").run_name == "c"


def test_check_takes_what_load_takes():
    check(made())
