"""Runs `megatrain` commands in processes that are forked from one that has imported everything.

Imports take longer than the small runs of these tests. The importing process starts with the first
command and lives as long as pytest. Each command has its own session and output files.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_server: subprocess.Popen[str] | None = None


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """A started command; `pid` may be signalled until `wait` has returned."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder
        self._end = os.pidfd_open(pid)

    def has_ended(self, timeout: float = 0.0) -> bool:
        return bool(select.select([self._end], [], [], timeout)[0])

    def wait(self, timeout: float = 300.0) -> Ended:
        """Returns the exit code (negative after a signal) and the output.

        Kills the command and raises AssertionError after `timeout` seconds.
        """
        late = not self.has_ended(timeout)
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        code = _request({"wait": self.pid})
        os.close(self._end)
        out, err = (self.folder / "out").read_text(), (self.folder / "err").read_text()
        assert not late, f"no end in {timeout:.0f} s:\n{out}{err}"
        return Ended(code, out, err)


def start(*arguments: object, folder: Path) -> Command:
    """Starts `megatrain ARGUMENTS` in the current folder, with a new output folder in `folder`."""
    own = folder / f"command-{os.urandom(4).hex()}"
    own.mkdir()
    return Command(
        _request(
            {
                "arguments": [str(argument) for argument in arguments],
                "folder": str(own),
                "cwd": os.getcwd(),
            }
        ),
        own,
    )


def run(*arguments: object, folder: Path, timeout: float = 300.0) -> Ended:
    return start(*arguments, folder=folder).wait(timeout)


def _request(request: dict[str, object]) -> int:
    global _server
    if _server is None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        }
        _server = subprocess.Popen(
            [sys.executable, "-m", "helpers.readme_commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,
        )
    assert _server.stdin is not None
    assert _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return int(_server.stdout.readline())


@atexit.register
def stop() -> None:
    """Ends the importing process and all running commands; the next command starts a new one.

    A message ends it, because the end of its input does not: ranks forked later hold the pipe too.
    """
    global _server
    if _server is None:
        return
    assert _server.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        _server.stdin.write(json.dumps({"stop": True}) + "\n")
        _server.stdin.flush()
    try:
        _server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        _server.kill()
    _server = None


# -- in the importing process --------------------------------------------------------------------


def _fork(arguments: list[str], folder: str, cwd: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(cwd)
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(
                os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                descriptor,
            )
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        from megatrain.__main__ import main

        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    import megatrain.training.run  # noqa: F401
    from megatrain.launch.local import die_with_parent, import_before_fork

    die_with_parent(os.getppid())
    import_before_fork()
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "stop" in request:
            break
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            running.remove(request["wait"])
        else:
            answer = _fork(request["arguments"], request["folder"], request["cwd"])
            running.add(answer)
        print(answer, flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
