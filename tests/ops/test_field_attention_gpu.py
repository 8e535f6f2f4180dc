"""The kernel of attention among fields on a GPU: run with `pytest -m gpu tests/ops tests/nn`."""

import pytest
import torch

from c2al.ops.field_attention import field_attention

pytestmark = pytest.mark.gpu

SIZES = [(64, 64, 64, 4), (512, 27, 16, 2), (33, 1, 6, 3), (7, 128, 64, 1), (5, 100, 128, 2), (4096, 16, 32, 1)]


def both(qkv_BMF, heads, backend, dtype):
    """[out, gradient of qkv] for a gradient of the output that `dtype` holds."""
    qkv_BMF = qkv_BMF.detach().clone().requires_grad_()
    out_BMD = field_attention(qkv_BMF, heads, backend)
    generator = torch.Generator("cuda").manual_seed(1)
    grad_BMD = torch.randn(out_BMD.shape, generator=generator, device="cuda").to(dtype).to(out_BMD.dtype)
    return [out_BMD.detach(), *torch.autograd.grad(out_BMD, qkv_BMF, grad_BMD)]


def errors(found, exact):
    return [
        ((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, (t.double() for t in exact), strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_it_errs_no_more_than_torchs_attention(size, dtype):
    batch, fields, dim, heads = size
    qkv_BMF = torch.randn(batch, fields, 3 * dim, device="cuda").to(dtype)
    exact = both(qkv_BMF.float(), heads, "eager", dtype)
    of_torch, of_ours = (errors(both(qkv_BMF, heads, backend, dtype), exact) for backend in ("eager", "triton"))
    assert all(ours <= 1.2 * theirs + 1e-4 for ours, theirs in zip(of_ours, of_torch, strict=True))


def test_compiled_it_stands_in_the_graph_and_gives_the_same():
    qkv_BMF = torch.randn(64, 27, 48, device="cuda").bfloat16()
    compiled = torch.compile(lambda qkv: field_attention(qkv, 2, "triton"), fullgraph=True)
    assert torch.equal(compiled(qkv_BMF), field_attention(qkv_BMF, 2, "triton"))


def test_float32_takes_torchs_attention():
    qkv_BMF = torch.randn(5, 27, 48, device="cuda")
    torch.testing.assert_close(field_attention(qkv_BMF, 2), field_attention(qkv_BMF, 2, "eager"), rtol=0, atol=0)
