"""DHEN on a GPU against the CPU: run with `pytest -m gpu tests/ops tests/nn`, torch and triton suffice."""

import copy

import pytest
import torch

from c2al.config import FMConfig, ModelConfig
from c2al.nn.dhen import DHEN

pytestmark = pytest.mark.gpu


def results(dhen, x_BMD, precision):
    """[out, gradient of x, gradients of the parameters]."""
    x_BMD = x_BMD.clone().requires_grad_()
    with torch.autocast(x_BMD.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        out = dhen(x_BMD)
    # Not a norm: that of a normalised output is the same whatever the weights, and its gradient is rounding alone.
    generator = torch.Generator().manual_seed(1)
    (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)).sum().backward()
    return [out.detach(), x_BMD.grad, *(p.grad for p in dhen.parameters())]


@pytest.mark.parametrize("layout", ["paper", "wukong"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_output_and_every_gradient_equal_those_of_the_cpu(precision, layout):
    """Relative Frobenius error: float32 accumulates some thousand roundings of 6e-8 through two layers and their
    LayerNorms; bfloat16 is judged against the CPU's own distance to float64, on other roundings of the same size.
    The bias of linear compression shifts whole tokens, which LayerNorm takes out: its gradient is 0, and its error is
    judged by the size of the others."""
    torch.manual_seed(0)
    every = ("fm_attention", "linear", "cross", "attention")
    config = ModelConfig(embedding_dim=16, interactions=every, layers=2, fm=FMConfig(layout=layout, k=8))
    dhen = DHEN(config, fields=12)
    x_BMD = torch.randn(64, 12, 16)
    exact = results(copy.deepcopy(dhen).double(), x_BMD.double(), "float32")
    cpu = results(copy.deepcopy(dhen), x_BMD, precision)
    gpu = results(dhen.cuda(), x_BMD.cuda(), precision)
    scale = torch.stack([e.norm() for e in exact[2:]]).median()
    for a, c, e in zip(gpu, cpu, exact, strict=True):
        size = torch.maximum(e.norm(), 0.1 * scale)
        error, of_cpu = (a.cpu().double() - e).norm() / size, (c.double() - e).norm() / size
        assert error <= (1e-4 if precision == "float32" else 1.5 * of_cpu + 1e-3)
