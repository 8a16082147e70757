"""Distribution of samples to data ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from megatrain.data.dataloader import DataLoader
from megatrain.data.gpt_dataset import Sample
from megatrain.errors import ConfigError, DataError


class Counting:
    """Samples whose tokens are their position."""

    def __init__(self, fail_at=None):
        self.fail_at, self.threads = fail_at, {}

    def fetch(self, position):
        self.threads[position] = threading.current_thread().name
        if position == self.fail_at:
            raise DataError(f"bad sample {position}")
        tokens = np.full(3, position, dtype=np.int64)
        return Sample(tokens, tokens + 1, np.arange(3), np.zeros(3, dtype=np.int64))


def make_loader(samples=None, *, batch=8, micro=2, rank=0, size=1):
    return DataLoader(
        samples or Counting(),
        global_batch_size=batch,
        micro_batch_size=micro,
        data_rank=rank,
        data_size=size,
    )


def positions_of(loader, step):
    return [batch.tokens[:, 0].tolist() for batch in loader.microbatches(step)]


def test_example_of_the_docstring():
    assert [list(some) for some in make_loader(rank=0, size=2).positions(0)] == [[0, 1], [4, 5]]
    assert [list(some) for some in make_loader(rank=1, size=2).positions(0)] == [[2, 3], [6, 7]]
    assert [list(some) for some in make_loader(rank=1, size=2).positions(3)] == [[26, 27], [30, 31]]


@pytest.mark.parametrize(
    ("micro", "size"), [(1, 1), (2, 1), (8, 1), (1, 8), (2, 2), (4, 2), (2, 4), (1, 3)]
)
def test_every_layout_takes_the_same_samples_in_a_step(micro, size):
    batch = 24
    for step in (0, 5):
        union = []
        for rank in range(size):
            loader = make_loader(batch=batch, micro=micro, rank=rank, size=size)
            union += [position for some in positions_of(loader, step) for position in some]
            loader.close()
        assert sorted(union) == list(range(step * batch, (step + 1) * batch))


def test_a_batch_holds_int64_tensors_of_its_own():
    loader = make_loader()
    first = loader.microbatches(0)[0]
    assert [tuple(field.shape) for field in first[:4]] == [(2, 3)] * 4
    assert {field.dtype for field in first[:4]} == {torch.int64}
    assert first.targets is None
    first.positions.zero_()
    assert loader.microbatches(0)[0].positions.tolist() == [[0, 1, 2]] * 2
    loader.close()


def test_resume_needs_the_next_step_only():
    loader = make_loader()
    run = [positions_of(loader, step) for step in range(6)]
    loader.close()
    resumed = make_loader()
    assert [positions_of(resumed, step) for step in (4, 5, 2)] == [run[4], run[5], run[2]]
    resumed.close()


def test_the_next_step_is_fetched_in_the_background():
    samples = Counting()
    loader = make_loader(samples)
    loader.microbatches(0)
    loader.microbatches(1)
    loader.close()
    assert samples.threads[0] == threading.current_thread().name
    assert samples.threads[8] == "loader_0"


def test_an_error_is_raised_by_the_step_that_needs_the_data():
    loader = make_loader(Counting(fail_at=8))
    loader.microbatches(0)
    with pytest.raises(DataError, match="bad sample 8"):
        loader.microbatches(1)
    loader.close()


def test_a_batch_that_cannot_be_dealt_evenly():
    with pytest.raises(
        ConfigError, match=r"train\.global_batch_size=10 must be a multiple of .*micro_batch_size=2"
    ):
        make_loader(batch=10, size=2)
