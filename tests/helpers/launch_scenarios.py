"""Scenarios of ranks for tests of launches, and a server that starts them quickly.

The server imports torch and deepspeed once. For each line of JSON it forks a process that launches
one scenario with its output in files, as a shell does. Tests signal that process and request its
exit code.
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
from megatrain.launch import supervisor, watchdog
from megatrain.launch.local import die_with_parent, import_before_fork, run_local
from megatrain.launch.worker import start_rank


def folder_of(run):
    return Path(run.run.output_dir)


def announce(run, env):
    """Writes a file with this rank's process id atomically."""
    new = folder_of(run) / f"new-{env.rank}"
    new.write_text(str(os.getpid()))
    new.rename(folder_of(run) / f"up-{env.rank}")


def all_reduce():
    """Waits for all ranks, as a collective of a step does."""
    import torch
    import torch.distributed

    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    return int(total)


def work(run, env, activity):
    import deepspeed
    import torch

    deepspeed.init_distributed()
    logging.getLogger("megatrain").info("%d ranks met", all_reduce())
    asked = os.environ["OMP_NUM_THREADS"]
    print(f"noise of rank {env.rank} with {torch.get_num_threads()} threads, {asked} asked for")
    os.system("echo noise of a child process")


def raise_on_one(run, env, activity):
    if env.rank == 1:
        raise ValueError("the cause")
    all_reduce()


def consequence_first(run, env, activity):
    all_reduce()
    if env.rank == 0:
        raise RuntimeError("[gloo] Connection closed by peer")
    time.sleep(0.1)
    raise ValueError("the cause")


def only_consequences(run, env, activity):
    raise RuntimeError("[gloo] Connection closed by peer")


def raise_user_error(run, env, activity):
    all_reduce()  # a rank whose peers failed before it joined reports another error
    raise DataError("there is no file x.bin")


def die(run, env, activity):
    print(f"last line of rank {env.rank}")
    if env.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce()


def leave_with_3(run, env, activity):
    if env.rank == 1:
        sys.exit(3)
    all_reduce()


def count_signals(run, env, activity):
    seen = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
    announce(run, env)
    while not seen:
        time.sleep(0.02)
    time.sleep(0.5)
    (folder_of(run) / f"seen-{env.rank}").write_text(" ".join(seen))


def ignore_signals(run, env, activity):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sleep(run, env, activity)


def sleep(run, env, activity):
    announce(run, env)
    time.sleep(600)


# -- steps with an incident on one rank ----------------------------------------------------------


def steps(activity, world_size, incident, *, last=6):
    """Runs `last` steps: loads data, computes, joins a collective."""
    for step in range(1, last + 1):
        activity.begin_step(step)
        activity.set("loading data")
        incident(step)
        activity.set("F0")
        with activity.collective("all-reduce", WorldGroup(range(world_size), "data")):
            all_reduce()


def freeze(run, env, activity):
    """Stops rank `run.seed` in step 3."""
    announce(run, env)

    def incident(step):
        if (step, env.rank) == (3, run.run.seed):
            os.kill(os.getpid(), signal.SIGSTOP)

    steps(activity, env.world_size, incident)


def sleep_over_data(run, env, activity):
    announce(run, env)
    steps(
        activity,
        env.world_size,
        lambda step: time.sleep(600) if (step, env.rank) == (3, 1) else None,
    )


def vanish(run, env, activity):
    """Kills rank `run.seed` in step 3."""
    announce(run, env)
    print(f"last line of rank {env.rank}")

    def incident(step):
        if (step, env.rank) == (3, run.run.seed):
            os.kill(os.getpid(), signal.SIGKILL)

    steps(activity, env.world_size, incident)


def raise_in_step(run, env, activity):
    def incident(step):
        if (step, env.rank) == (3, 1):
            raise ValueError("the cause")

    steps(activity, env.world_size, incident)


def raise_in_steps_to_come(run, env, activity):
    """Fails once on rank 1 in each of the first `run.seed` steps."""

    def incident(step):
        mark = folder_of(run) / f"failed-{step}"
        if env.rank == 1 and step <= run.run.seed and not mark.exists():
            mark.touch()
            raise ValueError(f"the cause in step {step}")

    steps(activity, env.world_size, incident)


def launch_locally(function, run, world_size):
    return run_local(function, run, world_size=world_size)


def launch_as_torchrun(function, run, world_size):
    """Starts the ranks as a launcher does: with RANK etc. in the environment, unsupervised."""
    with reserved_port() as port:
        return start_ranks(function, run, world_size, port)


def launch_as_torchrun_again(function, run, world_size):
    """Starts ranks as torchrun --max-restarts=1 on one machine: one store for both attempts."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        os.environ |= {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        code = start_ranks(function, run, world_size, store.port)
        if code == 0:
            break
    return code


def start_ranks(function, run, world_size, port):
    children = []
    for rank in range(world_size):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        children.append(in_a_fork(lambda: start_rank(function, run, from_environment(os.environ))))
    return ended(children, Path(run.run.output_dir))


def ended(children, folder):
    """Returns the largest exit code once all ranks have exited; stopped ranks are killed then."""
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


def start(command):
    def launch():
        os.setsid()
        for name, fd in (("out", 1), ("err", 2)):
            os.dup2(
                os.open(
                    Path(command["folder"]) / name,
                    os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
                ),
                fd,
            )
        run = loader.load(
            None, ["train.steps=1", f"run.output_dir={command['folder']}", *command["overrides"]]
        )
        return globals()[command["launcher"]](
            globals()[command["scenario"]], run, command["world_size"]
        )

    return in_a_fork(launch)


def main():
    import torch  # noqa: F401  before the ranks set their threads

    die_with_parent(os.getppid())
    device.set_environment(ranks_here=4)
    import_before_fork()
    supervisor.SECONDS_FOR_CAUSES = watchdog.SECONDS_FOR_CAUSES = (
        60.0  # on a busy machine reports take longer
    )
    del os.environ["OMP_NUM_THREADS"]
    for line in sys.stdin:
        command = json.loads(line)
        if "stop" in command:
            break
        if "wait" in command:
            answer = os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])
        else:
            answer = start(command)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
