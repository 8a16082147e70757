"""`megatrain schedule`, as typed."""

import json

import pytest

from megatrain.__main__ import main

SIZE = ["--ranks", "4", "--microbatches", "8"]


def test_json(capsys):
    assert main(["schedule", "1f1b", *SIZE, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "makespan": 33,
        "bubble": pytest.approx(3 / 11),
        "peak_activations": [4, 3, 2, 1],
    }
    assert (
        main(["schedule", "interleaved", *SIZE, "--virtual", "4", "--times", "2,2,2,0", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["makespan"] == pytest.approx(2 * (24 + 9 / 4))


def test_table_and_drawing_fit_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["schedule", "zb-h1", *SIZE]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()[:3]] == [
        ["rank", "busy", "bubble", "peak", "activations"],
        ["0", "24", "11.1%", "4"],
        ["1", "24", "11.1%", "4"],
    ]
    assert "\nactivations: one is a microbatch's in all layers of a rank\n" in shown
    assert "\n3  ......F0I0F1I1F2I2F3I3W0" in shown
    assert max(map(len, shown.split("\n\n")[1].splitlines())) < 60


def test_the_unit_of_activations_is_said(capsys):
    assert main(["schedule", "zb-v", *SIZE]) == 0
    assert (
        "\nactivations: one is a microbatch's in one of the 2 chunks of a rank's layers; 2 are those of all its layers\n"
        in capsys.readouterr().out
    )


def test_files(capsys, tmp_path):
    csv, svg = tmp_path / "s.csv", tmp_path / "s.svg"
    assert main(["schedule", "zb-v", *SIZE, "--json", "--csv", str(csv), "--svg", str(svg)]) == 0
    first = capsys.readouterr().out
    assert svg.read_text().startswith("<svg")
    assert main(["schedule", str(csv), *SIZE, "--json"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zb", *SIZE], "error: parallel.schedule=zb is not a schedule"),
        (
            ["dualpipev", "--ranks", "4", "--microbatches", "4"],
            "error: train.global_batch_size=4 gives 4 microbatches",
        ),
        (
            ["zb-h1", *SIZE, "--virtual", "2"],
            "error: parallel.virtual=2 is not supported by parallel.schedule=zb-h1",
        ),
        (["none.csv", *SIZE], "error: parallel.schedule=none.csv cannot be read"),
        (["1f1b", *SIZE, "--svg", "/nowhere/x.svg"], "error: /nowhere/x.svg cannot be written"),
    ],
)
def test_what_cannot_work(capsys, words, said):
    assert main(["schedule", *words]) == 1
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    "words",
    [
        ["--ranks", "0"],
        ["--microbatches", "x"],
        ["--times", "1,1"],
        ["--times", "1,1,1,nan"],
        ["--times", "0,0,0,1"],
        ["--times", "1,-1,1,0"],
    ],
)
def test_numbers_that_are_none(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(["schedule", "1f1b", *SIZE, *words])
    assert end.value.code == 2


def test_auto_plans_from_times(capsys, tmp_path):
    assert main(["schedule", "auto", *SIZE, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schedule"], shown["makespan"], max(shown["peak_activations"])) == (
        "zb-v",
        25.5,
        8,
    )
    assert main(["schedule", "auto", *SIZE]) == 0
    assert capsys.readouterr().out.startswith(
        "auto: zb-v, 2 chunks a rank in a V: the fastest for these times"
    )
    few = ["--ranks", "4", "--microbatches", "4"]
    assert main(["schedule", "auto", *few, "--json", "--csv", str(tmp_path / "made.csv")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made.pop("schedule") == "list"
    assert main(["schedule", str(tmp_path / "made.csv"), *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    assert main(["schedule", "auto", *SIZE, "--virtual", "2"]) == 1
    assert (
        capsys.readouterr().err
        == "error: --virtual=2 is given and auto chooses it; leave --virtual out, or name a schedule\n"
    )
