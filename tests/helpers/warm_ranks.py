"""Slurm's tasks, forked from one process that has imported everything: a rank that starts from nothing spends 3 s of CPU on it.

    srun on node2   PROGRAM megatrain/pretrain.py CONFIG     in place of python: tells the server its arguments, environment,
          |                                                  streams and process id, passes signals on, ends as the rank does
    the server      forks; the child enters the network, host name and files of that process, and is the rank

So a rank that is killed ends its task by the same signal, and a task that Slurm kills takes its rank with it. What a test asks
of the ranks beside that, it says in variables of the job (marks.py).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class WarmPython:
    """The server, from `start` to `stop`, and the program that stands in for python."""

    def __init__(self, folder: Path) -> None:
        self.program, self._socket = folder / "python", folder / "socket"
        self._log = folder / "server.out"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = " ".join(
            f'"{word}"' for word in (sys.executable, "-IS", __file__, "run", self._socket)
        )
        self.program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.program.chmod(0o755)
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, __file__, "serve", self._socket],
                stdin=subprocess.DEVNULL,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n", self._log.read_text()

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()  # its children die with it
            self._server.wait()


# ---------------------------------------------------------------------------------------------------------------------
# in place of python, under srun


def run(path: str, words: list[str]) -> None:
    """Have the server run the words, and end as they do."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)

    def pass_on(number: int, frame: FrameType | None) -> None:
        server.send(bytes([number]))

    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    order = json.dumps(
        {
            "words": words,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "like": os.getpid(),
        }
    ).encode()
    streams = array.array("i", [1, 2])
    server.sendmsg(
        [len(order).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
    )
    server.sendall(order)
    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    answer = server.recv(16)
    code = int(answer) if answer else 70
    if code < 0:
        for number in _PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# in the process that imports


def serve(path: str) -> None:
    import selectors

    import transformers.models.auto.tokenization_auto  # noqa: F401

    import megatrain.training.run  # noqa: F401
    from megatrain.launch.local import import_before_fork

    import_before_fork()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(256)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                task = _Task(listener.accept()[0])
                ready.register(task.client, selectors.EVENT_READ, (task, task.hear))
                ready.register(task.end, selectors.EVENT_READ, (task, task.answer))
            else:
                task, heard = key.data
                if not heard():
                    ready.unregister(key.fileobj)
                    if key.fileobj == task.end:
                        os.close(task.end)


class _Task:
    """A client and the child that runs its words."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        head, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(8))
        streams = array.array("i", ancillary[0][2])
        size, order = int.from_bytes(head, "big"), b""
        while len(order) < size:
            order += client.recv(size - len(order))
        self.child = os.fork()
        if not self.child:
            _become(json.loads(order), *streams)
        for stream in streams:
            os.close(stream)
        self.end = os.pidfd_open(self.child)

    def hear(self) -> bool:
        """A signal that the client passes on; the end of a client ends its child."""
        try:
            heard = self.client.recv(1)
        except ConnectionResetError:
            heard = b""
        if self.child:
            os.kill(self.child, heard[0] if heard else signal.SIGKILL)
        if not heard:
            self.client.close()
        return bool(heard)

    def answer(self) -> bool:
        """The child has ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        self.child = 0
        with contextlib.suppress(OSError):
            self.client.send(str(code).encode())
        return False


def _become(order: dict, out: int, err: int) -> None:
    """Be the task: never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        for number in (*_PASSED_ON, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(out, 1)
        os.dup2(err, 2)
        _enter(order["like"])
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"], DS_ACCELERATOR="cpu")
        code = _work(order["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _enter(process: int) -> None:
    """The network, host name and mounts of another process."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for handle in [
        os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "mnt")
    ]:
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")


def _work(words: list[str]) -> int:
    """What python would do with the words, of those that jobs use."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers import fault_marks
    from megatrain.__main__ import main

    fault_marks.install(os.environ)
    if words[:2] == ["-m", "megatrain"]:
        return main(words[2:])
    script = Path(words[0])
    assert script.parent.name == "megatrain", words
    return main([script.stem, *words[1:]])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        run(sys.argv[2], sys.argv[3:])
