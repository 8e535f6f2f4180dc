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


def errors(layout, precision, seed):
    """Relative Frobenius errors of every tensor against float64, (of the GPU, of the CPU)."""
    torch.manual_seed(seed)
    every = ("fm_attention", "linear", "cross", "attention")
    config = ModelConfig(embedding_dim=16, interactions=every, layers=2, fm=FMConfig(layout=layout, k=8))
    dhen = DHEN(config, fields=12)
    x_BMD = torch.randn(64, 12, 16)
    exact = results(copy.deepcopy(dhen).double(), x_BMD.double(), "float32")
    cpu = results(copy.deepcopy(dhen), x_BMD, precision)
    gpu = results(dhen.cuda(), x_BMD.cuda(), precision)
    # The bias of linear compression shifts whole tokens, which LayerNorm takes out: its gradient is 0, and its error
    # is judged by the others' size.
    scale = torch.stack([e.norm() for e in exact[2:]]).median()
    size = [torch.maximum(e.norm(), 0.1 * scale) for e in exact]
    return [
        torch.stack([(a.cpu().double() - e).norm() / n for a, e, n in zip(found, exact, size, strict=True)])
        for found in (gpu, cpu)
    ]


@pytest.mark.parametrize("layout", ["paper", "wukong"])
def test_float32_equals_the_cpu(layout):
    """Some thousand roundings of 6e-8 through two layers and their LayerNorms."""
    of_gpu, _ = errors(layout, "float32", seed=0)
    assert of_gpu.max() <= 1e-4


@pytest.mark.parametrize("layout", ["paper", "wukong"])
def test_bfloat16_errs_no_more_than_on_the_cpu(layout):
    """A GPU rounds elsewhere than a CPU, and an early difference passes through all later tensors, so one draw of the
    weights may fare a third better or worse. The mean over sixteen draws of the root mean square over all tensors is
    the CPU's, and no tensor errs thrice as much."""
    found = [errors(layout, "bfloat16", seed) for seed in range(16)]
    of_gpu, of_cpu = (torch.stack(errs) for errs in zip(*found, strict=True))
    assert of_gpu.square().mean(1).sqrt().mean() <= 1.1 * of_cpu.square().mean(1).sqrt().mean()
    assert (of_gpu.mean(0) <= 3 * of_cpu.mean(0) + 1e-3).all()
