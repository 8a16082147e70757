"""The command `megatrain schedule`."""

import json

import pytest

from megatrain.__main__ import main

SIZE = ["--ranks", "4", "--microbatches", "8"]


def test_json(capsys):
    assert main(["schedule", "1f1b", *SIZE, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output == {
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
    output = capsys.readouterr().out
    assert [line.split() for line in output.splitlines()[:3]] == [
        ["rank", "busy", "bubble", "peak", "activations"],
        ["0", "24", "11.1%", "4"],
        ["1", "24", "11.1%", "4"],
    ]
    assert "\nactivations: one per microbatch, of all layers of a rank\n" in output
    assert "\n3  ......F0I0F1I1F2I2F3I3W0" in output
    assert max(map(len, output.split("\n\n")[1].splitlines())) < 60


def test_the_table_names_the_unit_of_activations(capsys):
    assert main(["schedule", "zb-v", *SIZE]) == 0
    assert (
        "\nactivations: one per microbatch and virtual stage; 2 are those of all layers\n"
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
    ("arguments", "message"),
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
def test_errors(capsys, arguments, message):
    assert main(["schedule", *arguments]) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "0"],
        ["--microbatches", "x"],
        ["--times", "1,1"],
        ["--times", "1,1,1,nan"],
        ["--times", "0,0,0,1"],
        ["--times", "1,-1,1,0"],
    ],
)
def test_invalid_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["schedule", "1f1b", *SIZE, *arguments])
    assert end.value.code == 2


def test_auto_finds_the_fastest_for_the_times(capsys, tmp_path):
    assert main(["schedule", "auto", *SIZE, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["schedule"], output["makespan"], max(output["peak_activations"])) == (
        "zb-v",
        25.5,
        8,
    )
    assert main(["schedule", "auto", *SIZE]) == 0
    assert capsys.readouterr().out.startswith(
        "auto: zb-v, 2 virtual stages per rank in a V: the fastest for these times"
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
        == "error: --virtual=2 is not supported with auto, which chooses it; "
        "leave --virtual out, or name a schedule\n"
    )
