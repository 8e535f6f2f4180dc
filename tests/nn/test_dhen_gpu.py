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
    """Relative Frobenius errors against float64. float32 accumulates some thousand roundings of 6e-8 through two layers
    and their LayerNorms. bfloat16 rounds elsewhere on a GPU than on a CPU, so one tensor alone may fare worse: the root
    mean square over all tensors must be that of the CPU, and no tensor thrice the CPU's. The bias of linear compression
    shifts whole tokens, which LayerNorm takes out: its gradient is 0, and its error is judged by the others' size."""
    torch.manual_seed(0)
    every = ("fm_attention", "linear", "cross", "attention")
    config = ModelConfig(embedding_dim=16, interactions=every, layers=2, fm=FMConfig(layout=layout, k=8))
    dhen = DHEN(config, fields=12)
    x_BMD = torch.randn(64, 12, 16)
    exact = results(copy.deepcopy(dhen).double(), x_BMD.double(), "float32")
    cpu = results(copy.deepcopy(dhen), x_BMD, precision)
    gpu = results(dhen.cuda(), x_BMD.cuda(), precision)
    scale = torch.stack([e.norm() for e in exact[2:]]).median()
    size = [torch.maximum(e.norm(), 0.1 * scale) for e in exact]
    of_gpu, of_cpu = (
        torch.stack([(a.cpu().double() - e).norm() / n for a, e, n in zip(found, exact, size, strict=True)])
        for found in (gpu, cpu)
    )
    if precision == "float32":
        assert of_gpu.max() <= 1e-4
    else:
        assert of_gpu.square().mean().sqrt() <= 1.2 * of_cpu.square().mean().sqrt()
        assert (of_gpu <= 3 * of_cpu + 1e-3).all()
