"""Slurm's tasks, forked from one process that has imported everything, which takes 3 s of CPU.

    srun on node2   PROGRAM megatrain/pretrain.py CONFIG, in place of python: sends the server its
          |         arguments, environment, streams and process id; forwards signals; ends as the
          |         rank ends
    the server      forks; the child enters the namespaces of that process and becomes the rank

A rank that is killed ends its task by the same signal, and a task that Slurm kills ends its rank.
Tests configure faults of ranks by variables of the job (fault_marks.py).
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

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class WarmPython:
    """The server, from `start` to `stop`, and the program that replaces python."""

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


# -- in place of python, under srun ----------------------------------------------------------------


def run(path: str, arguments: list[str]) -> None:
    """Runs the arguments on the server and ends as they end."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)

    def forward(number: int, frame: FrameType | None) -> None:
        server.send(bytes([number]))

    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    request = json.dumps(
        {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "namespaces_of": os.getpid(),
        }
    ).encode()
    streams = array.array("i", [1, 2])
    server.sendmsg(
        [len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
    )
    server.sendall(request)
    for number in _FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    answer = server.recv(16)
    code = int(answer) if answer else 70
    if code < 0:
        for number in _FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


# -- in the importing process --------------------------------------------------------------------


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
                ready.register(task.client, selectors.EVENT_READ, (task, task.receive))
                ready.register(task.end, selectors.EVENT_READ, (task, task.answer))
            else:
                task, received = key.data
                if not received():
                    ready.unregister(key.fileobj)
                    if key.fileobj == task.end:
                        os.close(task.end)


class _Task:
    """A client and the child that runs its arguments."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        head, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(8))
        streams = array.array("i", ancillary[0][2])
        size, request = int.from_bytes(head, "big"), b""
        while len(request) < size:
            request += client.recv(size - len(request))
        self.child = os.fork()
        if not self.child:
            _run_task(json.loads(request), *streams)
        for stream in streams:
            os.close(stream)
        self.end = os.pidfd_open(self.child)

    def receive(self) -> bool:
        """Forwards a signal of the client; kills the child if the client has ended."""
        try:
            received = self.client.recv(1)
        except ConnectionResetError:
            received = b""
        if self.child:
            os.kill(self.child, received[0] if received else signal.SIGKILL)
        if not received:
            self.client.close()
        return bool(received)

    def answer(self) -> bool:
        """Sends the exit code of the child to the client."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        self.child = 0
        with contextlib.suppress(OSError):
            self.client.send(str(code).encode())
        return False


def _run_task(request: dict, out: int, err: int) -> None:
    """Runs the task in this process and exits."""
    code = 70
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        for number in (*_FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(out, 1)
        os.dup2(err, 2)
        _enter_namespaces(request["namespaces_of"])
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"], DS_ACCELERATOR="cpu")
        code = _run_python(request["arguments"])
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


def _enter_namespaces(process: int) -> None:
    """Enters the network, host name and mounts of another process."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for handle in [
        os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "mnt")
    ]:
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")


def _run_python(arguments: list[str]) -> int:
    """Does what python would do with the arguments; supports those that jobs use."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers import fault_marks
    from megatrain.__main__ import main

    fault_marks.install(os.environ)
    if arguments[:2] == ["-m", "megatrain"]:
        return main(arguments[2:])
    script = Path(arguments[0])
    assert script.parent.name == "megatrain", arguments
    return main([script.stem, *arguments[1:]])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        run(sys.argv[2], sys.argv[3:])
