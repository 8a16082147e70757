"""Losses of a classification head, from labels or from targets of the problem's own dtype."""

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import LLAMA, make_microbatch, tokens

from megatrain.distributed.mesh import make_mesh
from megatrain.models.classification_config import with_classifier
from megatrain.models.classification_head import ClassificationHead
from megatrain.models.config import load_hf_config
from megatrain.models.init import initialize
from megatrain.models.params import ParamFactory
from megatrain.models.transformer import HiddenStates

NUM_LABELS = 100
"""More than an int64 has bits."""


@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_loss_of_many_classes(problem):
    config = load_hf_config(LLAMA)
    config.id2label = {number: str(number) for number in range(NUM_LABELS)}
    config.problem_type = f"{problem}_classification"
    config.pad_token_id = 0
    architecture = with_classifier(config, of_tokens=False)
    params = ParamFactory(
        architecture,
        make_mesh(0, connect=False),
        sequence=False,
        dtype=torch.float32,
        device="cpu",
    )
    head = ClassificationHead(params)
    initialize(head, 1)
    generator = torch.Generator().manual_seed(2)
    hidden = HiddenStates(torch.randn(16, 3, 32, generator=generator))
    labels = torch.full((3, 16), -100)
    labels[0, 5], labels[2, 15] = (70, 99) if problem == "single_label" else (0, 0)
    microbatch = make_microbatch(architecture, tokens(), labels)
    scores = head.scores(hidden, microbatch)
    assert scores.shape == (2, NUM_LABELS)
    if problem == "single_label":
        expected = F.cross_entropy(scores, torch.tensor([70, 99]), reduction="sum")
    else:
        microbatch.targets = torch.randint(0, 2, (3, NUM_LABELS), generator=generator).float()
        targets = microbatch.targets[[0, 2]]
        expected = F.binary_cross_entropy_with_logits(scores, targets, reduction="mean") * 2
    torch.testing.assert_close(head(hidden, microbatch), expected)
