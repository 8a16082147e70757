"""Gated activations."""

import pytest
import torch

from megatrain.ops.activation import _gate_backward, activate, gated_activation


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gate_gradients_equal_autograd(name):
    """The formula of the compiled backward equals autograd in double precision."""
    generator = torch.Generator().manual_seed(3)
    gate, up, grad = (torch.randn(4, 5, generator=generator, dtype=torch.float32) for _ in range(3))
    gate_wide, up_wide = gate.double().requires_grad_(), up.double().requires_grad_()
    (activate(gate_wide, name) * up_wide).backward(grad.double())
    dgate, dup = _gate_backward(gate, up, grad, name)
    torch.testing.assert_close(dgate, gate_wide.grad.float())
    torch.testing.assert_close(dup, up_wide.grad.float())


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation_equals_autograd(name):
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, name), inputs)
