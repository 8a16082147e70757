"""What a run that ended before its time says to do."""

import pytest

from megatrain.checkpoint import manifest
from megatrain.config import loader as configuration
from megatrain.launch.failures import FailureReport, RankExit
from megatrain.launch.recovery_hint import recovery_hint

KILLED = RankExit(1, -9, 0.0)


@pytest.fixture
def run(tmp_path):
    """A config by its words, with whole checkpoints after these steps, and one that is not."""

    def make(*words, saved=(), torn=None):
        for step in saved:
            writing = tmp_path / "checkpoints" / f".writing-{step}"
            writing.mkdir(parents=True)
            (writing / "x").write_text("x")
            manifest.commit(
                writing,
                tmp_path / "checkpoints" / f"step-{step:08d}",
                [manifest.make_record(writing, writing / "x")],
            )
        if torn is not None:
            (tmp_path / "checkpoints" / f"step-{torn:08d}").mkdir(parents=True)
        return configuration.load(None, ["train.steps=90", f"run.output_dir={tmp_path}", *words])

    return make


def test_where_the_same_command_goes_on(run):
    assert (
        recovery_hint(run(saved=(20, 40), torn=60), KILLED, step=73)
        == "started again, the same command goes on from step 40"
    )
    assert (
        recovery_hint(run(), KILLED, step=None)
        == "started again, the same command goes on from step 40"
    ), "also of a run that had not begun"


def test_where_it_does_not(run, tmp_path):
    assert recovery_hint(run("checkpoint.resume=never", saved=(40,)), KILLED, step=73) == (
        "started again, the same command begins afresh (checkpoint.resume=never); with checkpoint.resume=auto it goes on from step 40"
    )
    assert recovery_hint(run("checkpoint.resume=start"), KILLED, step=73).startswith(
        "started again, the same command begins again from start (checkpoint.resume=start); "
    )


def test_what_is_lost(run):
    begins = "started again, the same command begins afresh"
    assert (
        recovery_hint(run(), KILLED, step=73)
        == f"there is no whole checkpoint (checkpoint.save_every=0 saves at the end only): {begins}, and the steps done are lost"
    )
    assert (
        recovery_hint(run("checkpoint.save_every=80", torn=80), KILLED, step=83)
        == f"there is no whole checkpoint (checkpoint.save_every=80): {begins}, and the steps done are lost"
    )
    assert recovery_hint(run(), KILLED, step=1) == f"no step was done: {begins}"
    assert recovery_hint(run(), KILLED, step=0) == f"no step was done: {begins}"


def test_who_says_it_already(run):
    """A mistake of the user's is to be mended first; an evaluation has nothing to go on with."""
    assert (
        recovery_hint(
            run(saved=(40,)), FailureReport(0, "user", "there is no file x.bin", 0.0), step=0
        )
        == ""
    )
    assert recovery_hint(run("train.steps=0"), KILLED, step=0) == ""
    assert recovery_hint(run(), FailureReport(0, "error", "Traceback", 0.0), step=41) != ""
