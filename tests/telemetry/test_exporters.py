"""Exporters to Weights & Biases and Prometheus, whose failures never stop a run."""

import importlib.util
import logging

import pytest

from megatrain.config import loader as configuration
from megatrain.errors import ConfigError
from megatrain.telemetry import exporters
from megatrain.telemetry.exporters import Exporters, check_exporters


def make_config(folder, **run):
    raw = {
        "run": {"output_dir": str(folder), "name": "a run", **run},
        "train": {"steps": 9, "log_every": 2},
    }
    return configuration.from_dict(raw)


def open_exporters(folder, *, after_step=0, **run):
    config = make_config(folder, **run)
    return Exporters(
        config.run,
        run_name=config.run_name,
        log_every=config.train.log_every,
        settings=configuration.to_dict(config),
        run_folder=folder,
        after_step=after_step,
    )


@pytest.mark.parametrize(
    ("setting", "library"), [("wandb", "wandb"), ("prometheus", "prometheus_client")]
)
def test_a_missing_library_is_an_error_with_its_install_command(
    setting, library, tmp_path, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == library else find_spec(name, *more),
    )
    with pytest.raises(
        ConfigError,
        match=rf"run.{setting}=x.prom requires {library}.*pip install .megatrain\[{setting}\]",
    ):
        check_exporters(make_config(tmp_path, **{setting: "x.prom"}).run)
    check_exporters(make_config(tmp_path).run)


def test_prometheus_files_must_end_in_prom(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in .prom") as error:
        check_exporters(make_config(tmp_path, prometheus="x.txt").run)
    assert error.value.fix == {"run.prometheus": "x.txt.prom"}


def test_a_missing_folder_is_an_error_on_rank_0s_machine(tmp_path):
    pytest.importorskip(
        "prometheus_client", reason="comes with the extra `prometheus`, which `make install` brings"
    )
    config = make_config(tmp_path, prometheus=str(tmp_path / "none" / "x.prom"))
    check_exporters(config.run)  # other machines need no such folder
    with pytest.raises(ConfigError, match=r"requires the folder .* on rank 0's machine"):
        open_exporters(tmp_path, prometheus=config.run.prometheus)


def test_prometheus_reads_the_last_metrics_every_log_every_steps_and_at_the_end(tmp_path):
    pytest.importorskip(
        "prometheus_client", reason="comes with the extra `prometheus`, which `make install` brings"
    )
    from prometheus_client.parser import text_string_to_metric_families

    def read():
        families = text_string_to_metric_families((tmp_path / "x.prom").read_text())
        return {
            sample.name: (sample.value, sample.labels)
            for family in families
            for sample in family.samples
        }

    out = open_exporters(tmp_path, prometheus=str(tmp_path / "x.prom"))
    out.write(1, {"loss": 3.0, "skipped": False, "mfu": None})
    assert not (tmp_path / "x.prom").exists()
    out.write(
        2,
        {"loss": 2.5, "skipped": False, "mfu": None, "rewards/accuracy": 0.5, "phase": "text"},
    )
    labels = {"run": "a run"}
    assert read() == {
        "megatrain_step": (2, labels),
        "megatrain_loss": (2.5, labels),
        "megatrain_skipped": (0, labels),
        "megatrain_rewards_accuracy": (0.5, labels),
    }
    out.write(3, {"loss": float("nan"), "skipped": True})
    assert read()["megatrain_step"] == (2, labels)
    out.close()
    assert (read()["megatrain_step"], read()["megatrain_loss"], read()["megatrain_skipped"]) == (
        (3, labels),
        (2.5, labels),
        (1, labels),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.prom"]


def test_an_exporter_that_fails_is_logged_once_and_removed(tmp_path, monkeypatch):
    class Failing:
        name = "run.wandb"

        def write(self, step, values):
            raise RuntimeError("the service is gone")

    class Counting:
        name, steps = "run.prometheus", 0

        def write(self, step, values):
            self.steps += 1

    warnings = []
    monkeypatch.setattr(logging.getLogger("megatrain"), "warning", warnings.append)
    out, counting = open_exporters(tmp_path), Counting()
    out._open = [Failing(), counting]
    for step in (1, 2, 3):
        out.write(step, {})
    assert warnings == ["run.wandb is disabled after step 1: the service is gone"]
    assert counting.steps == 3


def test_all_attempts_share_one_wandb_run(tmp_path, monkeypatch):
    pytest.importorskip(
        "wandb", reason="optional; pip install megatrain[wandb] to have this checked"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for after_step, loss in ((0, 2.515625), (2, 2.484375)):
        out = open_exporters(tmp_path, wandb="a project", after_step=after_step)
        out.write(after_step + 1, {"loss": loss, "mfu": None})
        out.close()
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1]
    first, second = (
        path.read_bytes()
        for path in sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    )
    assert all(
        text.encode() in first for text in (ids[0], "a project", "a run", "loss", "2.515625")
    )
    assert b"2.484375" in second
    assert b"2.515625" not in second
    assert exporters._wandb_run_id(tmp_path, new=True) != ids[0], (
        "a start from scratch is a new run"
    )
