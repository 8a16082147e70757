"""Masks and rotations are shared by microbatches of equal positions, unless documents differ."""

from __future__ import annotations

import torch
from helpers.model_variants import BASES

from megatrain.config import loader as configuration
from megatrain.data.dataloader import Batch
from megatrain.distributed.mesh import make_mesh
from megatrain.models.config import load_hf_config, read_config
from megatrain.models.microbatch import Microbatch, MicrobatchFactory
from megatrain.planner.memory import predict
from megatrain.planner.run_spec import Cluster, RunSpec

LENGTH, WINDOWS = 16, (5, None)
ARCHITECTURE = read_config(load_hf_config(BASES["gemma3_text"]))


def make_factory(*, separate_documents=False):
    return MicrobatchFactory(
        ARCHITECTURE,
        make_mesh(0, connect=False),
        torch.device("cpu"),
        dtype=torch.float32,
        separate_documents=separate_documents,
        seed=0,
    )


def batch(length=LENGTH, *, first=4):
    """Returns two sequences of two documents; the very first document has `first` tokens."""
    tokens = torch.zeros((2, length), dtype=torch.int64)
    documents = torch.stack([(torch.arange(length) >= end).long() for end in (first, 2 * first)])
    return Batch(tokens, tokens, torch.arange(length).expand(2, length), documents)


def test_microbatches_share_one_mask_a_window():
    factory = make_factory()
    trained, another = (factory.make(batch(), step=1, index=index) for index in (0, 1))
    evaluated = factory.make(batch(), step=None, index=0)
    for window in WINDOWS:
        mask = trained.mask(window)
        assert mask is another.mask(window) is evaluated.mask(window)
        alone = Microbatch(*batch()[:3]).mask(window)
        assert mask is alone is None if window is None else mask.equal(alone)
    assert trained.rotations is another.rotations


def test_other_lengths_have_separate_masks():
    factory = make_factory()
    long, short, again = (
        factory.make(batch(length), step=1, index=0) for length in (LENGTH, 8, LENGTH)
    )
    assert [microbatch.mask(5).shape[-1] for microbatch in (long, short, again)] == [
        LENGTH,
        8,
        LENGTH,
    ]


def test_document_masks_are_not_shared():
    factory = make_factory(separate_documents=True)
    one, other = (factory.make(batch(first=first), step=1, index=0) for first in (4, 6))
    for window in WINDOWS:
        assert one.mask(window).shape == (2, 1, LENGTH, LENGTH)
        assert not one.mask(window).equal(other.mask(window))


def test_memory_estimate_counts_a_shared_mask_once():
    """Further microbatches take only their tokens, labels, positions and a document mask each."""

    def bytes_of_a_microbatch(**data):
        raw = {"model": BASES["mistral"], "data": {"sequence_length": 64, **data}}
        sizes = []
        for count in (4, 8):
            config = configuration.from_dict(
                {
                    **raw,
                    "train": {"steps": 1, "global_batch_size": 2 * count, "micro_batch_size": 2},
                }
            )
            model = read_config(load_hf_config(config.model))
            sizes.append(predict(RunSpec.create(config, model, Cluster(1, 1, "cpu")))[0].working)
        return (sizes[1] - sizes[0]) / 4

    fields, rotations = 2 * 64 * 8, 2 * 64 * 8 * 4
    assert bytes_of_a_microbatch() == 3 * fields
    assert bytes_of_a_microbatch(document_mask=True) >= 4 * fields + 2 * rotations + 2 * 64 * 64
