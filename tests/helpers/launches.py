"""Starts the scenarios of launch_scenarios.py as a shell starts a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.telemetry import events

LONG = 300
"""Seconds that no scenario takes, on any machine."""


class Launched:
    """A running launch in a process of its own, and the files that it writes."""

    def __init__(self, server, folder, pid, world_size):
        self.server, self.folder, self.pid, self.world_size = server, folder, pid, world_size

    def wait(self):
        return request(self.server, {"wait": self.pid})

    def rank_pids(self):
        """Returns the process id of each rank, once all run their function."""
        files = [self.folder / f"up-{rank}" for rank in range(self.world_size)]
        until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def text(self, name):
        return (self.folder / name).read_text()

    def events(self, name):
        return [event for event in events.read(self.folder) if event.event == name]

    def log(self, rank):
        return self.text(f"logs/rank-{rank:05d}.log")

    def lines(self, rank):
        """Returns the lines of the rank's JSON log."""
        return [json.loads(line) for line in self.text(f"logs/rank-{rank:05d}.jsonl").splitlines()]


def request(server, command):
    server.stdin.write(json.dumps(command) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def until(condition, *, seconds=LONG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is not met after {seconds} s"
        time.sleep(0.02)


def runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def signal_again(pid):
    """Returns True if the process has ended; sends another SIGTERM otherwise."""
    if runs(pid):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    return not runs(pid)


@pytest.fixture(scope="session")
def extensions(tmp_path_factory):
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="session")
def server(extensions):
    outside = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMP_", "RANK"))
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.launch_scenarios"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **outside,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TORCH_EXTENSIONS_DIR": str(extensions),
        },
    )
    yield process
    # Closing the pipe does not end it: ranks that other tests forked hold the pipe too.
    process.stdin.write(json.dumps({"stop": True}) + "\n")
    process.stdin.flush()
    assert process.wait(timeout=LONG) == 0


@pytest.fixture
def launch(server, tmp_path):
    started = []

    def start(scenario, *, world_size=4, launcher="launch_locally", overrides=(), name="."):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = {
            "scenario": scenario,
            "folder": str(folder),
            "world_size": world_size,
            "launcher": launcher,
        }
        started.append(request(server, {**command, "overrides": list(overrides)}))
        return Launched(server, folder, started[-1], world_size)

    yield start
    for pid in started:
        if runs(pid):
            os.killpg(pid, signal.SIGKILL)
