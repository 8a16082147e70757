"""A real Slurm of a few nodes on one machine: each node is a network namespace with a host name.

    namespace NAMEctl:  br0 10.77.0.1   slurmctld, and the user's sbatch, squeue, scancel
                         |        |
    namespace NAME1:    10.77.0.11 node1: slurmd     NAME2:  10.77.0.12 node2: slurmd     ...

Ranks of two nodes connect over a network, so a script that uses localhost for another node fails
as on a cluster. Requires root. If Slurm is not installed, Debian's packages are unpacked into a
folder. Only processes that were started here are ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "libmunge2",
    "libhwloc15",
    "liblua5.1-0",
)
_SUBNET = "10.77.0"
_RUNNING = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "REQUEUED",
    "SIGNALING",
    "STAGE_OUT",
)


class Missing(Exception):
    """The reason why this machine cannot run a cluster."""


def find_programs(folder: Path) -> dict[str, str]:
    """Returns the environment for Slurm's programs; unpacks them into `folder` if necessary.

    Raises Missing if that is impossible.
    """
    if os.geteuid() != 0:
        raise Missing("network namespaces need root")
    for program in ("ip", "unshare", "mount"):
        if shutil.which(program) is None:
            raise Missing(f"`{program}` is missing (Debian: iproute2, util-linux, mount)")
    probe = f"mtprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        raise Missing("network namespaces are not allowed here")
    subprocess.run(["ip", "netns", "del", probe], check=True)
    if all(shutil.which(program) for program in ("slurmctld", "slurmd", "munged", "sbatch")):
        return {}
    return _unpacked(folder)


def _shell_environment() -> dict[str, str]:
    """Returns the environment without the variables that other tests set for ranks."""
    set_for_ranks = ("GLOO_", "MASTER_", "SLURM_", "RANK", "LOCAL_", "WORLD_SIZE", "DS_ACCELERATOR")
    return {name: value for name, value in os.environ.items() if not name.startswith(set_for_ranks)}


def _unpacked(folder: Path) -> dict[str, str]:
    ready = folder / "ready"
    if not ready.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise Missing("Slurm is not installed, and apt-get is missing")
        folder.mkdir(parents=True, exist_ok=True)
        for command in (["apt-get", "update", "-qq"], ["apt-get", "download", "-qq", *_PACKAGES]):
            if not _succeeds(command, folder):
                raise Missing(f"Slurm is not installed and `{' '.join(command[:2])}` fails")
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)
        # Slurm's daemons take their role from the name of the program.
        for name in ("slurmctld", "slurmd", "slurmstepd"):
            link = folder / "root/usr/sbin" / name
            if not link.exists():
                link.symlink_to(f"{name}-wlm")
        ready.write_text("")
    root = folder / "root"
    (plugins,) = root.glob("usr/lib/*/slurm-wlm")
    return {
        "PATH": f"{root}/usr/bin:{root}/usr/sbin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}",
        "SLURM_PREFIX": str(root),
        "SLURM_PLUGINS": str(plugins),
    }


def _succeeds(command: list[str], folder: Path) -> bool:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Cluster:
    """Nodes of the given names with `cpus` claimed cores each, from `start` to `stop`.

    The host name of a node is its name and `domain`. The names in `unknown` do not resolve: Slurm
    reaches these nodes by address.
    """

    def __init__(
        self,
        folder: Path,
        *,
        programs: dict[str, str],
        names: Sequence[str] = ("node1", "node2"),
        domain: str = "",
        unknown: Sequence[str] = (),
        cpus: int = 16,
    ) -> None:
        self.folder, self.names, self.domain, self.unknown, self.cpus, self.programs = (
            folder,
            names,
            domain,
            unknown,
            cpus,
            programs,
        )
        self.name = f"mt{os.urandom(3).hex()}"
        self.disk = folder / "disk"
        """A file system of 4 MB that jobs may fill."""
        self.host = socket.gethostname().partition(".")[0]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **_shell_environment(),
            **programs,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    # -- commands of the user --------------------------------------------------------------------

    def run(
        self, *command: object, check: bool = True, cwd: Path | None = None, **more: str
    ) -> str:
        """Runs a command on the login node with additional environment; returns its output."""
        done = subprocess.run(
            self._within("ctl", command),
            env={**self.environment, **more},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def wait(self, job: str, *, timeout: float) -> str:
        """Returns the job's last state. (`sbatch --wait` polls ever more rarely.)"""
        until = time.monotonic() + timeout
        while (state := self.state(job)) in _RUNNING and time.monotonic() < until:
            time.sleep(0.3)
        return state

    # -- daemons ---------------------------------------------------------------------------------

    def start(self) -> None:
        for name in ("log", "state", "munge", *(f"spool/{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._write_configuration()
        self.disk.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", self.disk], check=True
        )  # before daemons have mounts of their own
        self._connect()
        m = self.folder / "munge"
        self._daemon(
            "munged",
            None,
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.folder}/munge.sock",
            f"--pid-file={m}/pid",
            f"--log-file={m}/log",
            f"--seed-file={m}/seed",
            "--num-threads=4",
        )
        self._until(lambda: (self.folder / "munge.sock").exists(), "munged's socket")
        self._daemon("slurmctld", "ctl", "slurmctld", "-D", "-c")
        prefix = self.programs.get("SLURM_PREFIX")
        stepd = ["-d", f"{prefix}/usr/sbin/slurmstepd"] if prefix else []
        for i, name in self._numbered():
            self._daemon(name, str(i), "slurmd", *stepd, "-D", "-N", name)
        self._until(self._all_idle, "idle nodes")

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", "--user=root", check=False)
            self._until(
                lambda: not self.run("squeue", "-h", "-t", "R,CG,S,PD", "-o", "%i", check=False),
                "the end of all jobs",
            )
        for name in [*self.names, "slurmctld", "munged"]:
            self._end(name)
        for name in ("ctl", *(str(i) for i, _ in self._numbered())):
            subprocess.run(["ip", "netns", "del", self.name + name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{self.name}{name}", ignore_errors=True)
        subprocess.run(["umount", "--lazy", self.disk], capture_output=True)

    def _daemon(self, name: str, namespace: str | None, *command: str) -> None:
        with (self.folder / f"log/{name}.out").open("wb") as log:
            self.daemons[name] = subprocess.Popen(
                command if namespace is None else self._within(namespace, command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        if (daemon := self.daemons.pop(name, None)) is None:
            return
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _all_idle(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split() == ["idle"] * len(
            self.names
        )

    def _until(self, condition: object, what: str) -> None:
        until = time.monotonic() + 60
        while not condition():  # type: ignore[operator]
            if time.monotonic() > until:
                logs = "\n".join(
                    path.read_text(errors="replace")[-2000:]
                    for path in (self.folder / "log").iterdir()
                )
                raise AssertionError(f"no {what} after 60 s:\n{logs}")
            time.sleep(0.1)

    # -- network ---------------------------------------------------------------------------------

    def _numbered(self) -> list[tuple[int, str]]:
        return list(enumerate(self.names, start=1))

    def _within(self, namespace: str, command: tuple[object, ...]) -> list[str]:
        """Returns the command that runs `command` in a namespace, with the node's host name."""
        arguments = [str(argument) for argument in command]
        if namespace != "ctl":
            arguments = [
                "unshare",
                "--uts",
                "sh",
                "-c",
                'hostname "$0" && exec "$@"',
                self.names[int(namespace) - 1] + self.domain,
                *arguments,
            ]
        return ["ip", "netns", "exec", self.name + namespace, *arguments]

    def _connect(self) -> None:
        control = f"{self.name}ctl"
        known = [(i, name) for i, name in self._numbered() if name not in self.unknown]
        hosts = [
            f"127.0.0.1 localhost\n{_SUBNET}.1 {self.host}",
            *(f"{_SUBNET}.{10 + i} {name}{self.domain} {name}" for i, name in known),
        ]
        commands = [
            f"ip netns add {control}",
            f"ip -n {control} link set lo up",
            f"ip -n {control} link add br0 type bridge",
            f"ip -n {control} addr add {_SUBNET}.1/24 dev br0",
            f"ip -n {control} link set br0 up",
        ]
        for i, _ in self._numbered():
            node = f"{self.name}{i}"
            commands += [
                f"ip netns add {node}",
                f"ip -n {node} link set lo up",
                f"ip -n {node} link add eth0 type veth peer name v{i} netns {control}",
                f"ip -n {node} addr add {_SUBNET}.{10 + i}/24 dev eth0",
                f"ip -n {node} link set eth0 up",
                f"ip -n {control} link set v{i} master br0 up",
            ]
        for name in (control, *(f"{self.name}{i}" for i, _ in self._numbered())):
            # `ip netns exec` mounts these files over /etc.
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text("\n".join(hosts) + "\n")
        for command in commands:
            subprocess.run(command.split(), check=True)

    def _write_configuration(self) -> None:
        f = self.folder
        # slurmd always loads a cgroup plugin; v1 loads without mounted cgroups.
        (f / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        plugins = (
            f"PluginDir={self.programs['SLURM_PLUGINS']}"
            if "SLURM_PLUGINS" in self.programs
            else ""
        )
        nodes_of_partition = ",".join(self.names)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name}{self.domain} NodeAddr={_SUBNET}.{10 + i} "
            f"CPUs={self.cpus} RealMemory=8000"
            for i, name in self._numbered()
        )
        (f / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={self.host}({_SUBNET}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
{plugins}
# cred_expire is also the pause before a requeued job starts: by default 120 s, at least 5.
AuthInfo=socket={f}/munge.sock,cred_expire=5
MailProg=/bin/true
StateSaveLocation={f}/state
SlurmdSpoolDir={f}/spool/%n
SlurmctldPidFile={f}/slurmctld.pid
SlurmdPidFile={f}/%n.pid
SlurmctldLogFile={f}/log/slurmctld.log
SlurmdLogFile={f}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
# A node may claim more cores than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=10
MinJobAge=3600
JobRequeue=1
PropagateResourceLimits=NONE
{nodes}
PartitionName=test Nodes={nodes_of_partition} Default=YES DefaultTime=10 MaxTime=UNLIMITED State=UP
""")
