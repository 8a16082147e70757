"""Figures that go to Weights & Biases and Prometheus, and runs that neither can end."""

import importlib.util
import logging

import pytest

from megatrain.config import loader as configuration
from megatrain.errors import ConfigError
from megatrain.telemetry import exporters
from megatrain.telemetry.exporters import Exporters, check_exporters


def settings(folder, **run):
    raw = {
        "run": {"output_dir": str(folder), "name": "a run", **run},
        "train": {"steps": 9, "log_every": 2},
    }
    return configuration.from_dict(raw)


@pytest.mark.parametrize(
    ("setting", "library"), [("wandb", "wandb"), ("prometheus", "prometheus_client")]
)
def test_a_library_that_is_not_there_is_named_with_the_line_that_brings_it(
    setting, library, tmp_path, monkeypatch
):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == library else there(name, *more),
    )
    with pytest.raises(
        ConfigError,
        match=rf"run.{setting}=x.prom needs {library}.*pip install .megatrain\[{setting}\]",
    ):
        check_exporters(settings(tmp_path, **{setting: "x.prom"}))
    check_exporters(settings(tmp_path))


def test_a_file_that_node_exporter_would_not_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in .prom.*set run.prometheus=x.txt.prom"):
        check_exporters(settings(tmp_path, prometheus="x.txt"))


def test_a_folder_that_is_not_there_is_refused_on_rank_0s_machine(tmp_path):
    pytest.importorskip(
        "prometheus_client", reason="comes with the extra `prometheus`, which `make install` brings"
    )
    config = settings(tmp_path, prometheus=str(tmp_path / "none" / "x.prom"))
    check_exporters(config)  # the folder is one of rank 0's machine
    with pytest.raises(ConfigError, match="no folder of rank 0's machine"):
        Exporters(config, tmp_path, after_step=0)


def test_prometheus_reads_the_last_figures_every_log_every_steps_and_at_the_end(tmp_path):
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

    out = Exporters(settings(tmp_path, prometheus=str(tmp_path / "x.prom")), tmp_path, after_step=0)
    out.write(1, {"loss": 3.0, "skipped": False, "mfu": None})
    assert not (tmp_path / "x.prom").exists()
    out.write(
        2,
        {"loss": 2.5, "skipped": False, "mfu": None, "rewards/accuracy": 0.5, "words": "no figure"},
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


def test_one_that_fails_is_said_once_and_left_out(tmp_path, monkeypatch):
    class Failing:
        name = "run.wandb"

        def write(self, step, values):
            raise RuntimeError("the service is gone")

    class Counting:
        name, steps = "run.prometheus", 0

        def write(self, step, values):
            self.steps += 1

    said = []
    monkeypatch.setattr(logging.getLogger("megatrain"), "warning", said.append)
    out, counting = Exporters(settings(tmp_path), tmp_path, after_step=0), Counting()
    out._open = [Failing(), counting]
    for step in (1, 2, 3):
        out.write(step, {})
    assert said == ["run.wandb gets no more figures after step 1: the service is gone"]
    assert counting.steps == 3


def test_weights_and_biases_has_one_run_for_all_starts(tmp_path, monkeypatch):
    pytest.importorskip(
        "wandb", reason="optional; pip install megatrain[wandb] to have this checked"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for after_step, loss in ((0, 2.515625), (2, 2.484375)):
        out = Exporters(settings(tmp_path, wandb="a project"), tmp_path, after_step=after_step)
        out.write(after_step + 1, {"loss": loss, "mfu": None})
        out.close()
        ids.append((tmp_path / "wandb-id").read_text().strip())
    assert ids[0] == ids[1]
    first, second = (
        path.read_bytes()
        for path in sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    )
    assert all(
        words.encode() in first for words in (ids[0], "a project", "a run", "loss", "2.515625")
    )
    assert b"2.484375" in second
    assert b"2.515625" not in second
    assert exporters._kept_id(tmp_path, afresh=True) != ids[0], (
        "a run that is begun afresh is another"
    )
