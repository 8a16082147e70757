"""Every ConfigError that the code can raise carries a fix that removes it, or a hint.

Each row of `ROWS` makes an error from settings and words, applies the fix and makes sure that the
error is gone. `ConfigError` calls are found in the source: one that neither a row makes nor
`WITHOUT_ROW` names fails the test.
"""

import ast
import copy
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import megatrain
from megatrain.config.loader import from_dict, load
from megatrain.config.validation import check
from megatrain.errors import ConfigError, format_override
from megatrain.models.config import load_hf_config, read_config

PACKAGE = Path(megatrain.__file__).parent


# ---------------------------------------------------------------------------------------------
# the places where the code makes a ConfigError


class Site(NamedTuple):
    """The `number`-th ConfigError of a function, counted in the order of the source."""

    file: str
    function: str
    number: int


def _sites():
    """Returns each site with its first and last line and the names of its keywords."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "ConfigError(" in text:
            counts, file = Counter(), path.relative_to(PACKAGE).as_posix()
            for function, call in _calls(ast.parse(text), ""):
                found[Site(file, function, counts[function])] = call
                counts[function] += 1
    return found


def _calls(node, function):
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call) and getattr(child.func, "id", "") == "ConfigError":
            yield inner, child
        yield from _calls(child, inner)


SITES = _sites()


def _site_of(frame):
    file = Path(frame.f_code.co_filename)
    if PACKAGE not in file.parents:
        return None
    name = file.relative_to(PACKAGE).as_posix()
    for site, call in SITES.items():
        if site.file == name and call.lineno <= frame.f_lineno <= call.end_lineno:
            return site
    return None


@pytest.fixture
def made_by(monkeypatch):
    """The sites of all ConfigErrors that are made during a test, by error."""
    sites = {}
    original = ConfigError.__init__

    def record(self, *args, **kwargs):
        original(self, *args, **kwargs)
        sites[id(self)] = _site_of(sys._getframe(1))

    monkeypatch.setattr(ConfigError, "__init__", record)
    return sites


# ---------------------------------------------------------------------------------------------
# the table


class Row(NamedTuple):
    """Settings by name, and the function that raises an error for them."""

    settings: dict
    raises: object = None


def _load(settings):
    return load(None, [format_override(name, value) for name, value in settings.items()])


def _nested(settings):
    raw = {}
    for name, value in settings.items():
        *parents, key = name.split(".")
        target = raw
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = copy.deepcopy(value)
    return raw


def _model(settings):
    return read_config(load_hf_config(_nested(settings)["model"]))


def _world(world_size):
    return lambda settings: _load(settings).data_size(world_size)


def row(raises=_load, **settings):
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return Row(named if "train.tokens" in named else {"train.steps": 100, **named}, raises)


LLAMA = {
    "model.model_type": "llama",
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.num_hidden_layers": 2,
}


def model(**fields):
    return Row({**LLAMA, **{f"model.{name}": value for name, value in fields.items()}}, _model)


ROLLBACK = {"stability__on_loss_spike": "rollback", "checkpoint__save_every": 5}
DPO = {"task": "dpo", "train__micro_batch_size": 2, "train__global_batch_size": 8}

ROWS = {
    "unknown section": row(trian={"log_every": 2}),
    "old name": row(train__save_every=5),
    "typo in a name": row(train__log_evry=5),
    "wrong choice": row(train__dtype="bf17"),
    "quoted number": row(parallel__zero="1"),
    "infinite": row(optimizer__lr=float("inf")),
    "too large": row(run__seed=1e30),
    "wrong type": row(optimizer__lr="fast"),
    "number as text": row(optimizer__lr="0.001x"),
    "empty": row(train__log_every=None),
    "out of range": row(train__log_every=0),
    "port": row(run__master_port=70000),
    "betas": row(optimizer__betas=[0.9]),
    "no length": Row({}, _load),
    "two lengths": row(train__tokens=5, train__steps=5),
    "warmup": row(lr_schedule__warmup_steps=200),
    "min_lr": row(lr_schedule__min_lr=1.0),
    "keep_every": row(checkpoint__keep_every=4),
    "verify": row(checkpoint__verify="full", checkpoint__resume="never"),
    "early stopping": row(eval__early_stopping_patience=3),
    "early stopping metric": row(eval__early_stopping_metric="valid_accuracy"),
    "unused threshold": row(stability__on_loss_spike="off", stability__spike_threshold=5.0),
    "unused rollbacks": row(stability__max_rollbacks=5),
    "spike window": row(stability__spike_window=8),
    "rollback without checkpoints": row(stability__on_loss_spike="rollback"),
    "rollback of epochs": Row(
        {"train.epochs": 2, "stability.on_loss_spike": "rollback", "checkpoint.save_every": 5},
        _load,
    ),
    "rollback of dpo": row(**ROLLBACK, **DPO),
    "traced steps": row(profile__steps=[20]),
    "traced steps beyond the end": row(profile__steps=[99, 120]),
    "zero": row(parallel__zero=2, parallel__pipeline=2),
    "sequence": row(parallel__sequence=True),
    "sequence length": row(parallel__sequence=True, parallel__tensor=3),
    "autotune memory": row(parallel__autotune_memory_gib=3.0),
    "autotuned chunks": row(parallel__schedule="auto", parallel__virtual=2),
    "unused lora": row(lora__alpha=8.0, lora__dora=True),
    "lora of random weights": row(lora__rank=8, lora__alpha=8.0),
    "lora targets": row(lora__rank=8, train__init_from="base", lora__targets=[]),
    "unused margin": row(**DPO, preference__margin=2.0),
    "adapters-off": row(**DPO, preference__reference="adapters-off"),
    "odd pairs": row(**{**DPO, "train__micro_batch_size": 1}),
    "packed pairs": row(**DPO, data__packing=True),
    "all tokens of pairs": row(**DPO, data__train_on="all"),
    "unused dropout": row(classification__dropout=0.1),
    "unused augmentation": row(task="classification", classification__augment_share=0.2),
    "smoothed regression": row(
        task="classification",
        classification__problem="regression",
        classification__label_smoothing=0.1,
    ),
    "regression of two": row(
        task="classification",
        classification__problem="regression",
        classification__labels=["a", "b"],
    ),
    "one label": row(task="classification", classification__labels=["a"]),
    "label twice": row(task="classification", classification__labels=["a", "b", "a"]),
    "batch": row(train__global_batch_size=9, parallel__data=2),
    "too many microbatches": row(train__global_batch_size=10**7, parallel__data=1),
    "ranks": row(_world(6), parallel__pipeline=4),
    "ranks of replicas": row(_world(8), parallel__data=3, train__global_batch_size=24),
    "no model type": Row({"model.hidden_size": 32}, _model),
    "unknown model type": Row({"model.model_type": "lama"}, _model),
    "unknown field": model(hidden_sise=32),
    "field of nothing": model(vocab_size=0),
    "too many layers": model(num_hidden_layers=10**6),
    "key-value heads": model(num_key_value_heads=3),
    "gpt2 heads": Row({"model.model_type": "gpt2", "model.n_embd": 32, "model.n_head": 5}, _model),
    "padding token": model(vocab_size=67, pad_token_id=67),
    "activation": model(hidden_act="tanh"),
    "unread rope field": model(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}
    ),
}

WITHOUT_FIX = {
    "not a section": row(train=5),
    "model of a number": row(model=5),
    "no equals sign": Row({}, lambda settings: load(None, ["steps"])),
    "setting below a value": Row({}, lambda settings: load(None, ["run.name=a", "run.name.b=1"])),
    "no file": Row({}, lambda settings: load("/nowhere.yaml")),
    "model not there": Row({}, lambda settings: load_hf_config("/nowhere")),
    "no model": Row({}, lambda settings: load_hf_config("")),
}
"""Errors that no value of a setting removes: they have a hint."""


def _error_of(entry, settings):
    """Returns the error, and its site."""
    try:
        entry.raises(settings)
    except ConfigError as error:
        return error
    return None


def _apply(error, settings):
    """Returns the settings after the fix, which replaces an unknown name."""
    fixed = {name: value for name, value in settings.items() if name.split("[")[0] != error.setting}
    if error.setting in settings and error.setting in error.fix:
        fixed[error.setting] = error.fix[error.setting]
    for name in error.fix:  # a fix of a field replaces it inside a mapping
        parent, _, key = name.rpartition(".")
        if isinstance(fixed.get(parent), dict):
            fixed[parent] = {**fixed[parent], key: error.fix[name]}
        else:
            fixed[name] = error.fix[name]
    return fixed


@pytest.mark.parametrize("name", ROWS)
def test_fix_removes_the_error(name, made_by):
    entry = ROWS[name]
    error = _error_of(entry, entry.settings)
    assert error is not None
    assert made_by[id(error)] in SITES
    assert error.fix, f"no fix for {error}"
    fixed = entry.settings
    for _ in range(3):  # several values can have the same error
        fixed = _apply(error, fixed)
        again = _error_of(entry, fixed)
        if again is None:
            return
        assert str(again) != str(error)
        error = again
    pytest.fail(f"{error} remains")


@pytest.mark.parametrize("name", WITHOUT_FIX)
def test_error_without_fix_has_a_hint(name):
    error = _error_of(WITHOUT_FIX[name], WITHOUT_FIX[name].settings)
    assert error is not None
    assert error.hint


def test_wrong_fix_is_noticed(monkeypatch):
    entry = ROWS["warmup"]
    error = _error_of(entry, entry.settings)
    error.fix = {"lr_schedule.warmup_steps": 300}
    assert _error_of(entry, _apply(error, entry.settings)) is not None


def test_every_site_has_a_row_or_a_fix(made_by):
    """Sites that need files, ranks or a GPU are looked at in the source: fix, command or hint."""
    errors = [_error_of(entry, entry.settings) for entry in (ROWS | WITHOUT_FIX).values()]
    assert None not in errors
    reached = {made_by[id(error)] for error in errors}
    of_config = {site for site in SITES if site.file.startswith("config/")}
    assert of_config - reached <= UNREACHED
    without = [
        site
        for site, call in SITES.items()
        if site not in reached
        and len(call.args) < 4
        and not {"fix", "command", "hint"} & {keyword.arg for keyword in call.keywords}
    ]
    assert without == []


UNREACHED = {
    Site("config/loader.py", "_read_yaml", 1),
    Site("config/loader.py", "_read_yaml", 2),
    Site("config/loader.py", "_read_yaml", 3),
    Site("config/loader.py", "apply_override", 1),
}
"""Files that cannot be read: `test_loader` makes them."""


def test_checked_config_is_valid():
    check(from_dict({"train": {"steps": 1}}))
