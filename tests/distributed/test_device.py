"""The device, threads and environment of a rank; values set by the user are kept."""

import pytest
import torch

from megatrain.distributed import device
from megatrain.distributed.env import RankEnv

ENV = RankEnv(3, 8, 1, 2, "node1", 1234)


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """An environment of its own, and a machine with 6 cores and no GPU."""
    own = {"DS_ACCELERATOR": "cpu"}
    monkeypatch.setattr(device.os, "environ", own)
    monkeypatch.setattr(device, "cpu_cores", lambda: 6)
    return own


@pytest.mark.parametrize(("ranks", "threads"), [(1, "6"), (4, "1"), (2, "3"), (12, "1")])
def test_cores_are_shared_among_ranks(environ, ranks, threads):
    device.set_environment(ranks)
    assert environ["OMP_NUM_THREADS"] == threads


def test_values_set_by_the_user_are_kept(environ):
    environ |= {"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth7"}
    before = torch.get_num_threads()
    try:
        device.set_rank_environment(ENV._replace(master_addr="127.0.0.1"))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
    assert (environ["OMP_NUM_THREADS"], environ["GLOO_SOCKET_IFNAME"]) == ("5", "eth7")


def test_variables_that_libraries_read(environ):
    before = torch.get_num_threads()
    try:
        device.set_rank_environment(ENV)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {name: value for name, value in environ.items() if name != "PYTEST_CURRENT_TEST"} == {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "3",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "1234",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")],
)
def test_user_selects_cpus(monkeypatch, name, value):
    own = {name: value}
    monkeypatch.setattr(device.os, "environ", own)
    monkeypatch.setattr(device.Path, "glob", lambda path, pattern: iter(["nvidia0"]))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert not device.has_gpu()
    assert device.select_device(ENV) == torch.device("cpu")
    own.clear()
    assert device.has_gpu()


@pytest.mark.parametrize(
    ("visible", "in_srun", "index"), [(2, False, 1), (1, True, 0), (8, True, 1)]
)
def test_device_of_a_rank(monkeypatch, environ, visible, in_srun, index):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if in_srun:
        environ["SLURM_STEP_ID"] = "0"
    assert device.select_device(ENV) == torch.device("cuda", index)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        device.UserError, match="2 ranks were started on this machine, which has 1 GPUs"
    ):
        device.select_device(ENV)
