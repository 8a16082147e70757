"""What ranks do in test_launch.py, and a server that starts them quickly.

The server imports torch and deepspeed once. For each line of JSON that it reads it forks a process that launches one
scenario with its output in files, as a shell would; tests signal that process and ask for its exit code.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from helpers.free_ports import reserved_port
from megatrain.config import loader
from megatrain.distributed import device
from megatrain.distributed.activity import WorldGroup
from megatrain.distributed.env import from_environment
from megatrain.errors import DataError
from megatrain.launch import supervisor, watchdog_coordinator
from megatrain.launch.local import _die_with, import_before_fork, run_local
from megatrain.launch.worker import start_rank


def folder_of(run):
    return Path(run.run.output_dir)


def come_up(run, place):
    """Leave a file with this rank's process id, whole from its first moment."""
    new = folder_of(run) / f"new-{place.rank}"
    new.write_text(str(os.getpid()))
    new.rename(folder_of(run) / f"up-{place.rank}")


def meet():
    """Wait for all ranks, as a collective in a step does."""
    import torch
    import torch.distributed

    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return int(total)


def work(run, place, activity):
    import deepspeed
    import torch

    deepspeed.init_distributed()
    logging.getLogger("megatrain").info("%d ranks met", meet())
    asked = os.environ["OMP_NUM_THREADS"]
    print(f"noise of rank {place.rank} with {torch.get_num_threads()} threads, {asked} asked for")
    os.system("echo noise of a child process")


def raise_on_one(run, place, activity):
    if place.rank == 1:
        raise ValueError("the cause")
    meet()


def consequence_first(run, place, activity):
    meet()
    if place.rank == 0:
        raise RuntimeError("[gloo] Connection closed by peer")
    time.sleep(0.1)
    raise ValueError("the cause")


def only_consequences(run, place, activity):
    raise RuntimeError("[gloo] Connection closed by peer")


def raise_user_error(run, place, activity):
    meet()  # a rank that finds nobody to join, because the others have failed before, has another thing to say
    raise DataError("there is no file x.bin")


def die(run, place, activity):
    print(f"last words of rank {place.rank}")
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    meet()


def leave_with_3(run, place, activity):
    if place.rank == 1:
        sys.exit(3)
    meet()


def count_signals(run, place, activity):
    seen = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
    come_up(run, place)
    while not seen:
        time.sleep(0.02)
    time.sleep(0.5)
    (folder_of(run) / f"seen-{place.rank}").write_text(" ".join(seen))


def ignore_signals(run, place, activity):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sleep(run, place, activity)


def sleep(run, place, activity):
    come_up(run, place)
    time.sleep(600)


# -- steps, in which something happens to a rank ------------------------------------------------------------------------


def steps(activity, world_size, trouble, *, last=6):
    """As a run of `last` steps notes them: data are loaded, work is done, and all meet."""
    for step in range(1, last + 1):
        activity.begin_step(step)
        activity.set("loading data")
        trouble(step)
        activity.set("F0")
        with activity.collective("all-reduce", WorldGroup(range(world_size), "data")):
            meet()


def freeze(run, place, activity):
    """The rank that run.seed names is stopped in step 3, in the middle of its work."""
    come_up(run, place)

    def trouble(step):
        if (step, place.rank) == (3, run.run.seed):
            os.kill(os.getpid(), signal.SIGSTOP)

    steps(activity, place.world_size, trouble)


def sleep_over_data(run, place, activity):
    come_up(run, place)
    steps(
        activity,
        place.world_size,
        lambda step: time.sleep(600) if (step, place.rank) == (3, 1) else None,
    )


def vanish(run, place, activity):
    """The rank that run.seed names is killed in step 3."""
    come_up(run, place)
    print(f"last words of rank {place.rank}")

    def trouble(step):
        if (step, place.rank) == (3, run.run.seed):
            os.kill(os.getpid(), signal.SIGKILL)

    steps(activity, place.world_size, trouble)


def raise_in_step(run, place, activity):
    def trouble(step):
        if (step, place.rank) == (3, 1):
            raise ValueError("the cause")

    steps(activity, place.world_size, trouble)


def raise_in_steps_to_come(run, place, activity):
    """Rank 1 fails once in each of the first run.seed steps, whatever the start."""

    def trouble(step):
        mark = folder_of(run) / f"failed-{step}"
        if place.rank == 1 and step <= run.run.seed and not mark.exists():
            mark.touch()
            raise ValueError(f"the cause in step {step}")

    steps(activity, place.world_size, trouble)


def launch_locally(target, run, world_size):
    return run_local(target, run, world_size=world_size)


def launch_as_torchrun(target, run, world_size):
    """Start the ranks as a launcher does: RANK and its kin in the environment, nobody watching."""
    with reserved_port() as port:
        return start_ranks(target, run, world_size, port)


def launch_as_torchrun_again(target, run, world_size):
    """As torchrun --max-restarts=1 does on one machine: its process holds the store, the same one for both starts."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        os.environ |= {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        code = start_ranks(target, run, world_size, store.port)
        if code == 0:
            break
    return code


def start_ranks(target, run, world_size, port):
    children = []
    for rank in range(world_size):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        children.append(in_a_fork(lambda: start_rank(target, run, from_environment(os.environ))))
    return ended(children, Path(run.run.output_dir))


def ended(children, folder):
    """The largest exit code of all ranks, once each has ended by itself; those that are stopped are killed then. `codes` has all."""
    codes, stopped = {}, set()
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(child)
        else:
            codes[child] = os.waitstatus_to_exitcode(status)
        if stopped and stopped | set(codes) == set(children):
            for pid in stopped - set(codes):
                os.kill(pid, signal.SIGKILL)
    (folder / "codes").write_text(json.dumps([codes[child] for child in children]))
    return max(codes.values())


def in_a_fork(function):
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = function()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(order):
    def launch():
        os.setsid()
        for name, fd in (("out", 1), ("err", 2)):
            os.dup2(
                os.open(
                    Path(order["folder"]) / name,
                    os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
                ),
                fd,
            )
        run = loader.load(
            None, ["train.steps=1", f"run.output_dir={order['folder']}", *order["overrides"]]
        )
        return globals()[order["launcher"]](globals()[order["scenario"]], run, order["world_size"])

    return in_a_fork(launch)


def main():
    import torch  # noqa: F401  before any thread is asked for, so that ranks have to set theirs

    _die_with(os.getppid())
    device.set_environment(ranks_here=4)
    import_before_fork()
    supervisor.SECONDS_FOR_CAUSES = watchdog_coordinator.SECONDS_FOR_CAUSES = (
        60.0  # ranks of a busy machine take longer to say theirs
    )
    del os.environ["OMP_NUM_THREADS"]
    for line in sys.stdin:
        order = json.loads(line)
        if "stop" in order:
            break
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = start(order)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
