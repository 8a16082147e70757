"""Ranks from the environment that each launcher sets."""

import pytest

from megatrain.distributed.env import (
    RankEnv,
    attempt,
    expand_hosts,
    from_environment,
    is_local_rank_zero,
)
from megatrain.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_JOB_NODELIST": "node[1-4]",
}


@pytest.mark.parametrize(
    "environ", [TORCHRUN, DEEPSPEED, ACCELERATE], ids=["torchrun", "deepspeed", "accelerate"]
)
def test_launchers_that_set_rank(environ):
    assert from_environment(environ) == RankEnv(5, 8, 1, 4, "node1", 29500)


def test_srun_uses_its_first_host():
    env = from_environment(SRUN)
    assert env[:5] == (5, 8, 1, 4, "node1")
    assert 20000 <= env.master_port < 32000


def test_srun_ports_follow_from_job_and_step():
    ports = {from_environment({**SRUN, "SLURM_PROCID": str(rank)}).master_port for rank in range(8)}
    assert len(ports) == 1
    assert from_environment({**SRUN, "SLURM_JOB_ID": "42"}).master_port not in ports
    assert from_environment({**SRUN, "SLURM_STEP_ID": "1"}).master_port not in ports


def test_rendezvous_address_of_a_batch_script():
    env = from_environment(
        {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "8"}
    )
    assert (env.master_addr, env.master_port) == ("10.0.0.1", 1234)


def test_torchrun_inside_srun_is_torchrun():
    assert from_environment({**SRUN, **TORCHRUN, "RANK": "3"}).rank == 3


def test_uneven_nodes():
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x1),1,2(x2)", "SLURM_NODEID": "2"}
    assert from_environment(environ).local_size == 2


OUTSIDE = {
    "nothing": {},
    "an exported rendezvous address": {"MASTER_ADDR": "node1", "MASTER_PORT": "1"},
    "a batch script": {
        "SLURM_JOB_ID": "41",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_JOB_NODELIST": "node1",
    },
    "Slurm's own batch step": {**SRUN, "SLURM_STEP_ID": "4294967291"},
    "salloc's interactive step": {**SRUN, "SLURM_STEP_ID": "4294967290"},
    "a shell of srun --pty": {**SRUN, "SLURM_PTY_PORT": "40001"},
}


@pytest.mark.parametrize("environ", OUTSIDE.values(), ids=OUTSIDE)
def test_outside_a_launcher(environ):
    assert from_environment(environ) is None


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_missing_variables_of_a_launcher(name):
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(
        UserError, match=rf"^{name} is missing from the environment although .*RANK is set"
    ):
        from_environment(environ)


def test_local_rank_without_rank():
    with pytest.raises(UserError, match=r"^RANK is missing"):
        from_environment({"LOCAL_RANK": "0"})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"])
def test_missing_variables_of_srun(name):
    environ = {key: value for key, value in SRUN.items() if key != name}
    with pytest.raises(UserError, match=rf"^{name} is missing"):
        from_environment(environ)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "rank 8 .* must be below the world size, 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 .* must be below .* its machine, 4"),
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE=eight .* must be a whole number"),
    ],
)
def test_invalid_values(change, message):
    with pytest.raises(UserError, match=message):
        from_environment({**TORCHRUN, **change})


def test_launcher_with_one_rank():
    environ = {
        **TORCHRUN,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    assert from_environment(environ)[:4] == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("node_list", "names"),
    [
        ("node7", "node7"),
        ("node[1-3,7]", "node1 node2 node3 node7"),
        ("a[08-10],b,c1-2", "a08 a09 a10 b c1-2"),
        ("r[1-2]n[1-2].x", "r1n1.x r1n2.x r2n1.x r2n2.x"),
        ("gpu-a-[007,009-011],gpu-b-7", "gpu-a-007 gpu-a-009 gpu-a-010 gpu-a-011 gpu-b-7"),
        (
            "gpu-a-007.cluster.example,gpu-a-[008,010]",
            "gpu-a-007.cluster.example gpu-a-008 gpu-a-010",
        ),
        ("x[098-101]", "x098 x099 x100 x101"),
    ],
)
def test_expand_hosts_lists_all_names(node_list, names):
    assert " ".join(expand_hosts(node_list)) == names


def test_one_rank_per_machine_is_local_rank_zero():
    assert is_local_rank_zero({})
    assert not is_local_rank_zero(TORCHRUN)
    assert is_local_rank_zero({**TORCHRUN, "LOCAL_RANK": "0"})
    assert not is_local_rank_zero(SRUN)


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 1),
        ({"SLURM_RESTART_COUNT": "2"}, 3),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, 1),
        ({"SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RESTART_COUNT": "2"}, 4),
        ({"SLURM_RESTART_COUNT": "?"}, 1),
    ],
)
def test_attempt_counts_restarts_of_slurm_and_torchrun(environ, number):
    assert attempt(environ) == number
